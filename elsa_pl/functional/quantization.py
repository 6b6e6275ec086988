"""Block-wise int8 and int4: fewer bits for each number of a state, with a scale for every few of them.

A state has a few coordinates far larger than the rest; with one scale for all of it they would leave nothing of the
others. So each block of the last dimension has its own scale.

    states [*, D] --quantize--> packed uint8 [*, P] and scales [*, S] --dequantize--> [*, D]

Rounding has no useful derivative. Two ways through it are here, both straight-through (the gradient passes as if
nothing had been rounded): `fake_quantize`, for states that stay where they are, and `to_wire` with `from_wire`, for
states that cross a link, where autograd takes floating-point tensors only and gradients should be packed as well.

Scales have bfloat16's range unless asked otherwise. Gradients of a mean over a batch are often below 1e-6, and float16
has nothing below 6e-8: their scales would be too coarse by far, at the same number of bytes.

Shapes: D hidden, S blocks of a state, P bytes of its packed codes, * any number of leading dimensions.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_BYTES: Final = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
_NEXT: Final = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Integers of the same size: of a positive number the next one up is the next integer up."""


@dataclass(frozen=True)
class BlockFormat:
    """How numbers are packed; both ends of a link need the same.

    Raises:
        ValueError: bits other than 8 and 4, a block that is not positive, or another dtype of the scales.

    Example:
        >>> BlockFormat(bits=4).num_bytes(384)  # of 1536 in float32
        216
    """

    bits: int = 8
    """8 or 4, of each number."""
    block: int = 32
    """Numbers that share a scale. The last block of a state is shorter where the width is no multiple of it."""
    scale_dtype: torch.dtype = torch.bfloat16
    """bfloat16, float16 or float32."""

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"expected 8 or 4 bits; got {self.bits}")
        if self.block < 1:
            raise ValueError(f"expected a block of at least one number; got {self.block}")
        if self.scale_dtype not in _BYTES:
            raise ValueError(f"expected scales in bfloat16, float16 or float32; got {self.scale_dtype}")

    @property
    def levels(self) -> int:
        """The largest code: 127 or 7. The smallest is its negative, so 0 stays 0 and signs are treated alike."""
        return 127 if self.bits == 8 else 7

    def num_blocks(self, width: int) -> int:
        """S, scales of a state."""
        return -(-width // self.block)

    def num_packed(self, width: int) -> int:
        """P, bytes of a state's codes; one of odd width ends in half a byte of nothing in 4 bits."""
        return -(-width * self.bits // 8)

    def num_bytes(self, width: int) -> int:
        """Bytes of a state, codes and scales."""
        return self.num_packed(width) + self.num_blocks(width) * _BYTES[self.scale_dtype]

    def wire_width(self, width: int) -> int:
        """float32 numbers that a state takes in `to_wire`."""
        return -(-self.num_bytes(width) // 4)


def quantize(states: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor]:
    r"""Round each block to integers of its own scale, and pack them into bytes.

    .. math::
        s_b = \frac{\max_{i \in b} \lvert x_i \rvert}{L}, \qquad q_i = \operatorname{round}(x_i / s_b),
        \qquad \lvert s_b q_i - x_i \rvert \le \frac{s_b}{2}

    with L = 127 or 7. The scale is rounded *up* to its dtype, by less than 0.8% in bfloat16 and 0.1% in float16, so
    that no number is cut off and the bound holds; below the dtype's normal range it is rounded up to its least number.
    Where the errors are uniform within the step, as in blocks of many unlike numbers, :math:`E (s q - x)^2 = s^2 / 12`.

    Args:
        states: any floating-point dtype; float64 is rounded in its own precision, all others in float32. [*, D]
        format: how.

    Returns:
        - packed: uint8. In 8 bits the codes in two's complement, in 4 bits the first half of the state's codes plus 8
          in the low halves of the bytes and the others in the high ones. [*, P]
        - scales: 0 for a block of zeros. [*, S]

    Raises:
        ValueError: states of no floating-point dtype, without a dimension or of width 0, numbers that are not finite,
            or a scale beyond the range of its dtype.

    Source:
        Dettmers et al. 2022, arXiv 2110.02861 (block-wise quantization; linear here, not dynamic).

    Example:
        >>> packed, scales = quantize(torch.tensor([127.0, -1.4, 0.0]), BlockFormat())
        >>> packed.view(torch.int8), scales
        (tensor([127,  -1,   0], dtype=torch.int8), tensor([1.], dtype=torch.bfloat16))
    """
    if not states.is_floating_point() or states.ndim < 1 or not states.shape[-1]:
        raise ValueError(
            f"expected floating-point states [*, D] with D >= 1; got {states.dtype} {list(states.shape)}: integers "
            "need no quantization"
        )
    width = states.shape[-1]
    blocks = _in_blocks(states.detach(), format)
    largest = blocks.abs().amax(-1)
    scales = _rounded_up(largest / format.levels, format.scale_dtype)
    if not scales.isfinite().all():
        _refuse(states, largest, format)
    divisor = scales.to(blocks.dtype)
    divisor = divisor.masked_fill(divisor == 0, 1).unsqueeze(-1)
    codes = (blocks / divisor).round_().flatten(-2)[..., :width]
    if format.bits == 8:
        return codes.to(torch.int8).view(torch.uint8), scales
    return _pack_pairs(codes), scales


def dequantize(
    packed: Tensor, scales: Tensor, width: int, format: BlockFormat, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Undo `quantize`, but for the rounding: codes times scales.

    Args:
        packed: uint8. [*, P]
        scales: [*, S]
        width: D, which the number of bytes does not tell.
        format: that of `quantize`.
        dtype: of the states to return.

    Returns:
        [*, D]

    Raises:
        ValueError: tensors that are not those of a state of this width and format.

    Example:
        >>> format = BlockFormat(bits=4, block=2)
        >>> dequantize(*quantize(torch.tensor([7.0, 1.4, -3.5]), format), 3, format)
        tensor([ 7.0000,  1.0000, -3.5000])
    """
    expected = [*packed.shape[:-1], format.num_packed(width)], [*packed.shape[:-1], format.num_blocks(width)]
    if packed.dtype != torch.uint8 or scales.dtype != format.scale_dtype:
        raise ValueError(
            f"expected codes in torch.uint8 and scales in {format.scale_dtype}; got {packed.dtype} and "
            f"{scales.dtype}: both ends of a link need the same format"
        )
    if (list(packed.shape), list(scales.shape)) != expected:
        raise ValueError(
            f"expected codes {expected[0]} and scales {expected[1]} for width {width} in {format.bits} bits and blocks "
            f"of {format.block}; got {list(packed.shape)} and {list(scales.shape)}: both ends of a link need the same "
            "format"
        )
    computed = torch.promote_types(dtype, torch.float32)
    codes = packed.view(torch.int8) if format.bits == 8 else _unpack_pairs(packed, width)
    blocks = _in_blocks(codes.to(computed), format)
    return blocks.mul_(scales.to(computed).unsqueeze(-1)).flatten(-2)[..., :width].to(dtype)


def fake_quantize(states: Tensor, format: BlockFormat, *, gradients: bool = False) -> Tensor:
    """The states as the receiver of `quantize` would have them; straight-through.

    Args:
        states: [*, D]
        format: how.
        gradients: round the gradient in the same format on its way back, as a link does. Otherwise it passes as it is.

    Returns:
        In the states' dtype. [*, D]

    Raises:
        ValueError: as `quantize`; with `gradients` also in the backward pass.

    Source:
        Bengio et al. 2013, arXiv 1308.3432 (straight-through).

    Example:
        >>> states = torch.tensor([127.0, -1.4], requires_grad=True)
        >>> fake_quantize(states, BlockFormat())
        tensor([127.,  -1.], grad_fn=<_FakeQuantizeBackward>)
    """
    rounded: Tensor = _FakeQuantize.apply(states, format, gradients)  # type: ignore[no-untyped-call]  # torch has no types for it
    return rounded


def to_wire(states: Tensor, format: BlockFormat) -> Tensor:
    """Pack states into the bits of float32 numbers, which autograd and dist_autograd carry; straight-through.

    Backward unpacks the gradient, which `from_wire` packed at the other end, so that both directions of a link carry
    `BlockFormat.num_bytes` of each state, rounded up to 4. The numbers mean nothing, and some are nan: they must reach
    `from_wire` as they are, in one piece and once, since two gradients in this form cannot be added.

    Args:
        states: [*, D]
        format: how.

    Returns:
        float32. [*, `BlockFormat.wire_width` of D]

    Raises:
        ValueError: as `quantize`.

    Example:
        >>> format = BlockFormat(bits=4)
        >>> wire = to_wire(torch.full((2, 384), 7.0), format)
        >>> wire.shape, torch.equal(from_wire(wire, 384, format), torch.full((2, 384), 7.0))
        (torch.Size([2, 54]), True)
    """
    wire: Tensor = _ToWire.apply(states, format)  # type: ignore[no-untyped-call]  # torch has no types for it
    return wire


def from_wire(wire: Tensor, width: int, format: BlockFormat, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Undo `to_wire`, but for the rounding; straight-through, with the gradient packed in the same format.

    Args:
        wire: from `to_wire`. [*, `BlockFormat.wire_width` of D]
        width: D.
        format: that of `to_wire`.
        dtype: of the states to return.

    Returns:
        [*, D]

    Raises:
        ValueError: a tensor that is not one of `to_wire` for this width and format; in the backward pass as `quantize`.

    Example:
        >>> format = BlockFormat()
        >>> from_wire(to_wire(torch.tensor([127.0, -1.4]), format), 2, format)
        tensor([127.,  -1.])
    """
    states: Tensor = _FromWire.apply(wire, width, format, dtype)  # type: ignore[no-untyped-call]  # torch has no types for it
    return states


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, format: BlockFormat, gradients: bool) -> Tensor:
        ctx.format = format if gradients else None
        return _rounded(states, format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient if ctx.format is None else _rounded(gradient, ctx.format), None, None


class _ToWire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, format: BlockFormat) -> Tensor:
        ctx.format, ctx.width, ctx.dtype = format, states.shape[-1] if states.ndim else 0, states.dtype
        return _packed(states, format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _unpacked(gradient, ctx.width, ctx.format, ctx.dtype), None


class _FromWire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wire: Tensor, width: int, format: BlockFormat, dtype: torch.dtype) -> Tensor:
        ctx.format = format
        return _unpacked(wire, width, format, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _packed(gradient, ctx.format), None, None, None


def _rounded(states: Tensor, format: BlockFormat) -> Tensor:
    packed, scales = quantize(states, format)
    return dequantize(packed, scales, states.shape[-1], format, dtype=states.dtype)


def _packed(states: Tensor, format: BlockFormat) -> Tensor:
    """Codes, then scales, then up to three bytes of nothing, as float32."""
    packed, scales = quantize(states, format)
    width = states.shape[-1]
    filling = 4 * format.wire_width(width) - format.num_bytes(width)
    parts = [packed, scales.view(torch.uint8), packed.new_zeros(*packed.shape[:-1], filling)]
    return torch.cat(parts, -1).view(torch.float32)


def _unpacked(wire: Tensor, width: int, format: BlockFormat, dtype: torch.dtype) -> Tensor:
    if wire.dtype != torch.float32 or wire.ndim < 1 or wire.shape[-1] != format.wire_width(width):
        raise ValueError(
            f"expected torch.float32 [*, {format.wire_width(width)}] for width {width} in {format.bits} bits and "
            f"blocks of {format.block}; got {wire.dtype} {list(wire.shape)}: both ends of a link need the same format"
        )
    taken = format.num_packed(width)
    carried = wire.detach().contiguous().view(torch.uint8)
    # A copy, since a view as wider numbers must start at a multiple of their size.
    scales = carried[..., taken : format.num_bytes(width)].clone(memory_format=torch.contiguous_format)
    return dequantize(carried[..., :taken], scales.view(format.scale_dtype), width, format, dtype=dtype)


def _in_blocks(values: Tensor, format: BlockFormat) -> Tensor:
    """At least float32, the last dimension filled up with zeros: [*, D] -> [*, S, block]."""
    width = values.shape[-1]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    num_blocks = format.num_blocks(width)
    values = F.pad(values, (0, num_blocks * format.block - width)) if width % format.block else values
    blocks: Tensor = values.unflatten(-1, (num_blocks, format.block))
    return blocks


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of a dtype that are no less than the given, non-negative ones; inf beyond its range."""
    near = values.to(dtype)
    above = (near.view(_NEXT[dtype]) + 1).view(dtype)
    return torch.where(near.to(values.dtype) < values, above, near)


def _pack_pairs(codes: Tensor) -> Tensor:
    """Floats from -7 to 7, two in a byte, the row's first half in the low bits: [*, D] -> uint8 [*, (D + 1) // 2]."""
    half = (codes.shape[-1] + 1) // 2
    codes = F.pad(codes, (0, 1)) if codes.shape[-1] % 2 else codes
    # Over int32, from which uint8 is a truncation: torch's float to uint8 takes eight times as long.
    return torch.add(codes[..., :half], codes[..., half:], alpha=16).add_(8 + 8 * 16).to(torch.int32).to(torch.uint8)


def _unpack_pairs(packed: Tensor, width: int) -> Tensor:
    """Undo `_pack_pairs`: uint8 [*, (D + 1) // 2] -> int8 [*, D]."""
    pairs = torch.cat([packed & 15, packed >> 4], -1).view(torch.int8)
    return (pairs - 8)[..., :width]


def _refuse(states: Tensor, largest: Tensor, format: BlockFormat) -> None:
    bad = int((~states.isfinite()).sum())
    if bad:
        raise ValueError(
            f"expected finite states; got nan or inf in {bad} of {states.numel()} numbers: lower the learning rate or "
            "clip the gradients"
        )
    raise ValueError(
        f"expected states that scales in {format.scale_dtype} can hold; got a number of {float(largest.max()):.3g}: "
        "take scales in torch.bfloat16 or torch.float32"
    )
