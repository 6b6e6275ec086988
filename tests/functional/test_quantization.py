"""Block-wise rounding against slow loops, its error bound, bytes in odd sizes, and both ways through for gradients."""

import math

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.quantization import BlockFormat, dequantize, fake_quantize, from_wire, quantize, to_wire

SHAPES = [(1,), (7,), (2, 33), (2, 3, 64), (0, 5), (4, 0, 32)]
FORMATS = [
    BlockFormat(bits, block, scale_dtype)
    for bits in (8, 4)
    for block in (1, 5, 32)
    for scale_dtype in (torch.bfloat16, torch.float16, torch.float32)
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales_of_numbers(scales: Tensor, width: int, format: BlockFormat) -> Tensor:
    """The scale of each number of a state [*, D]."""
    return scales.double().repeat_interleave(format.block, -1)[..., :width]


def slow_codes(state: list[float], scales: list[float], format: BlockFormat) -> list[int]:
    """One number at a time; the scales are checked elsewhere."""
    codes = []
    for index, value in enumerate(state):
        scale = scales[index // format.block]
        codes.append(round(value / scale) if scale else 0)
    return codes


def slow_bytes(codes: list[int], format: BlockFormat) -> list[int]:
    if format.bits == 8:
        return [code % 256 for code in codes]
    half = (len(codes) + 1) // 2
    second = codes[half:] + [0] * (len(codes) % 2)
    return [(low + 8) + 16 * (high + 8) for low, high in zip(codes[:half], second, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_against_the_slow_loop(shape: tuple[int, ...], format: BlockFormat) -> None:
    states, width = draw(*shape), shape[-1]
    packed, scales = quantize(states, format)
    assert packed.shape == (*shape[:-1], format.num_packed(width))
    assert packed.dtype == torch.uint8
    assert scales.shape == (*shape[:-1], format.num_blocks(width))
    assert scales.dtype == format.scale_dtype
    decoded = dequantize(packed, scales, width, format)
    assert decoded.shape == states.shape
    for state, sent, scale, received in (
        zip(states.view(-1, width), packed.flatten(0, -2), scales.flatten(0, -2), decoded.view(-1, width), strict=True)
        if states.ndim > 1
        else [(states, packed, scales, decoded)]
    ):
        codes = slow_codes(state.tolist(), scale.tolist(), format)
        assert sent.tolist() == slow_bytes(codes, format)
        expected = [code * float(scale[index // format.block]) for index, code in enumerate(codes)]
        assert received.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_scales_are_the_least_that_cut_nothing_off(format: BlockFormat) -> None:
    states = draw(50, 66)
    _, scales = quantize(states, format)
    exact = torch.stack([block.abs().amax(-1) for block in states.split(format.block, -1)], -1) / format.levels
    eps = torch.finfo(format.scale_dtype).eps
    assert (scales.to(torch.float32) >= exact).all()
    least = torch.finfo(format.scale_dtype).smallest_normal * eps
    assert (scales.to(torch.float32) <= exact * (1 + eps) + least).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_error_is_at_most_half_a_step(format: BlockFormat) -> None:
    magnitudes = [1e-30, 1e-9, 1e-4, 1.0, 1e4]  # the next is beyond float16's range
    for magnitude in magnitudes if format.scale_dtype == torch.float16 else [*magnitudes, 1e30]:
        states = draw(20, 67) * magnitude
        packed, scales = quantize(states, format)
        error = (dequantize(packed, scales, 67, format) - states).double().abs()
        assert (error <= scales_of_numbers(scales, 67, format) * (0.5 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "expected"), [(8, 0.0054), (4, 0.098)])
def test_error_of_gaussian_numbers(bits: int, expected: float) -> None:
    states, format = draw(2000, 64), BlockFormat(bits)
    packed, scales = quantize(states, format)
    error = dequantize(packed, scales, 64, format) - states
    assert error.square().mean().item() == pytest.approx(
        (scales_of_numbers(scales, 64, format).square() / 12).mean().item(), rel=0.05
    )
    assert (error.norm() / states.norm()).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("width", [1, 2, 3, 15, 16, 31])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code_comes_back_in_every_place(width: int, bits: int) -> None:
    format = BlockFormat(bits, block=width + 1)
    codes = torch.arange(-format.levels, format.levels + 1).float()
    places = [codes.roll(place) for place in range(width)]
    states = torch.stack(
        [torch.full_like(codes, format.levels), *places], 1
    )  # the largest first, so that the scale is 1
    packed, scales = quantize(states, format)
    assert scales.unique().tolist() == [1]
    assert torch.equal(dequantize(packed, scales, width + 1, format), states)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rounding_twice_changes_nothing_more(format: BlockFormat) -> None:
    once = fake_quantize(draw(5, 33), format)
    torch.testing.assert_close(fake_quantize(once, format), once, atol=0.1, rtol=0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_zeros_stay_zeros(format: BlockFormat) -> None:
    states = torch.zeros(3, 40)
    states[1, 35:] = 2
    decoded = fake_quantize(states, format)
    assert torch.equal(decoded == 0, states == 0)
    assert decoded.isfinite().all()
    assert quantize(states, format)[1][0].tolist() == [0] * format.num_blocks(40)


def test_small_gradients_outlive_bfloat16_scales_and_not_float16_ones() -> None:
    """A mean over a batch has gradients of 1e-7; float16 has nothing below 6e-8, which is half a step of them here."""
    states = draw(50, 64) * 1e-8
    errors = {
        scale_dtype: ((fake_quantize(states, BlockFormat(8, 32, scale_dtype)) - states).norm() / states.norm()).item()
        for scale_dtype in (torch.bfloat16, torch.float16)
    }
    assert errors[torch.bfloat16] < 0.01
    assert errors[torch.float16] > 0.5


def test_bytes() -> None:
    """The figures of a width of 384: 3.76 and 7.11 times less than float32."""
    assert BlockFormat(8).num_bytes(384) == 384 + 12 * 2
    assert BlockFormat(4).num_bytes(384) == 192 + 12 * 2
    assert BlockFormat(4, 16, torch.float32).num_bytes(33) == 17 + 3 * 4
    assert BlockFormat(4, 16, torch.float32).wire_width(33) == 8
    for format in FORMATS:
        for width in (1, 2, 33, 64):
            packed, scales = quantize(draw(2, width), format)
            assert (packed.nbytes + scales.nbytes) / 2 == format.num_bytes(width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    states, format = draw(4, 33, dtype=dtype), BlockFormat(8)
    decoded = fake_quantize(states, format)
    assert decoded.dtype == dtype
    assert (decoded - states).double().abs().max() < 0.03
    packed, scales = quantize(states, format)
    assert packed.dtype == torch.uint8
    assert torch.equal(dequantize(packed, scales, 33, format, dtype=dtype), decoded)


def test_straight_through() -> None:
    states = draw(3, 33).requires_grad_()
    received, format = draw(3, 33, seed=1) * 1e-6, BlockFormat(4)
    fake_quantize(states, format).backward(received)
    assert states.grad is not None
    assert torch.equal(states.grad, received)
    states.grad.zero_()
    fake_quantize(states, format, gradients=True).backward(received)
    assert torch.equal(states.grad, fake_quantize(received, format))
    assert not torch.equal(states.grad, received)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("width", [1, 7, 33, 64])
def test_the_wire_carries_packed_states_and_gradients(format: BlockFormat, width: int) -> None:
    states = draw(2, 3, width).requires_grad_()
    received = draw(2, 3, width, seed=1)
    carried: list[Tensor] = []
    wire = to_wire(states, format)
    wire.register_hook(carried.append)
    decoded = from_wire(wire, width, format)
    decoded.backward(received)
    assert states.grad is not None
    for sent in (wire, *carried):
        assert sent.dtype == torch.float32
        assert sent.shape == (2, 3, format.wire_width(width))
        assert sent.element_size() * format.wire_width(width) < format.num_bytes(width) + 4
    assert len(carried) == 1
    assert torch.equal(decoded, fake_quantize(states, format))
    assert torch.equal(states.grad, fake_quantize(received, format))


def test_the_wire_keeps_the_dtypes_of_both_ends() -> None:
    states = draw(2, 33, dtype=torch.bfloat16).requires_grad_()
    decoded = from_wire(to_wire(states, BlockFormat()), 33, BlockFormat(), dtype=torch.float64)
    decoded.sum().backward()
    assert decoded.dtype == torch.float64
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16


def test_inputs_stay() -> None:
    states = draw(3, 32)
    before = states.clone()
    packed, scales = quantize(states, BlockFormat(4))
    sent = packed.clone()
    dequantize(packed, scales, 32, BlockFormat(4))
    assert torch.equal(states, before)
    assert torch.equal(packed, sent)


def test_strided_states() -> None:
    states = draw(33, 6).T
    assert torch.equal(fake_quantize(states, BlockFormat(4)), fake_quantize(states.contiguous(), BlockFormat(4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_numbers_that_are_not_finite_are_refused(bad: float, format: BlockFormat) -> None:
    states = draw(3, 33)
    states[1, 32] = bad
    for what in (quantize, fake_quantize, to_wire):
        with pytest.raises(ValueError, match="nan or inf in 1 of 99 numbers: lower the learning rate"):
            what(states, format)
    fine = draw(3, 33).requires_grad_()
    with pytest.raises(ValueError, match="nan or inf in 1 of 99 numbers"):
        fake_quantize(fine, format, gradients=True).backward(states)


def test_numbers_beyond_the_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scales in torch.float16 can hold; got a number of 1e\+07: take scales in"):
        quantize(torch.tensor([1e7]), BlockFormat(8, 32, torch.float16))
    assert fake_quantize(torch.tensor([1e7]), BlockFormat(8)).item() == pytest.approx(1e7, rel=0.01)


def test_bad_formats() -> None:
    with pytest.raises(ValueError, match="8 or 4 bits; got 2"):
        BlockFormat(bits=2)
    with pytest.raises(ValueError, match="at least one number; got 0"):
        BlockFormat(block=0)
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32; got torch.float64"):
        BlockFormat(scale_dtype=torch.float64)


def test_bad_states() -> None:
    for wrong in (torch.tensor(1.0), torch.ones(2, 0), torch.ones(2, 3, dtype=torch.long)):
        for what in (quantize, fake_quantize, to_wire):
            with pytest.raises(ValueError, match=r"floating-point states \[\*, D\] with D >= 1; got"):
                what(wrong, BlockFormat())


def test_ends_that_disagree() -> None:
    format = BlockFormat(8)
    packed, scales = quantize(draw(2, 64), format)
    with pytest.raises(ValueError, match=r"codes \[2, 32\] and scales \[2, 2\] for width 64 in 4 bits.*got \[2, 64\]"):
        dequantize(packed, scales, 64, BlockFormat(4))
    with pytest.raises(ValueError, match=r"scales \[2, 4\] for width 64 in 8 bits and blocks of 16; got .* \[2, 2\]"):
        dequantize(packed, scales, 64, BlockFormat(8, 16))
    with pytest.raises(ValueError, match=r"scales in torch.float16; got torch.uint8 and torch.bfloat16: both ends"):
        dequantize(packed, scales, 64, BlockFormat(8, 32, torch.float16))
    with pytest.raises(ValueError, match=r"codes in torch.uint8 .*; got torch.int8"):
        dequantize(packed.view(torch.int8), scales, 64, format)
    wire = to_wire(draw(2, 64), format)
    for sent in (wire, wire.double(), wire[..., :0]):
        with pytest.raises(ValueError, match=r"torch.float32 \[\*, 9\] for width 64 in 4 bits .*both ends of a link"):
            from_wire(sent, 64, BlockFormat(4))
