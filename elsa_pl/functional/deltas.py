"""Adapters on their way to a mean and back: the difference to what the receiver has, in 8 or 4 bits for each number.

A round moves an adapter a little, so the difference to what was given is small and alike in size, and a few bits for it
lose less than the same bits for the adapter itself. Both ends go on from the decoded values, so they never drift apart:
while a sender keeps its own values, what was lost of a difference is part of the next one. Between rounds nobody does;
all go on from the decoded mean, as if that had been the mean.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from elsa_pl.functional.quantization import BlockFormat, dequantize, quantize


def encode_deltas(
    adapters: Mapping[str, Tensor], known: Mapping[str, Tensor], format: BlockFormat
) -> dict[str, Tensor]:
    """Encode adapters as differences to those that the receiver has.

    An adapter of another shape than the receiver's, one that it does not have, and one that is not finite go as they
    are.

    Args:
        adapters: by name, of any shape [*].
        known: what both ends have.
        format: blocks run over all numbers of an adapter.

    Returns:
        By name: bytes, uint8 [P], codes and then scales; or the adapter itself.

    Example:
        >>> known = {"a": torch.zeros(2, 64)}
        >>> sent = encode_deltas({"a": torch.ones(2, 64)}, known, BlockFormat(block=64))
        >>> sent["a"].shape, bool((decode_deltas(sent, known, BlockFormat(block=64))["a"] - 1).abs().max() < 0.01)
        (torch.Size([132]), True)
    """
    sent = {}
    for name, value in adapters.items():
        before = known.get(name)
        if before is None or before.shape != value.shape or not value.isfinite().all():
            sent[name] = value
            continue
        codes, scales = quantize((value - before).flatten(), format)
        sent[name] = torch.cat([codes, scales.view(torch.uint8)])
    return sent


def decode_deltas(sent: Mapping[str, Tensor], known: Mapping[str, Tensor], format: BlockFormat) -> dict[str, Tensor]:
    """Undo `encode_deltas`, but for the rounding.

    Args:
        sent: as it was returned.
        known: what both ends have.
        format: that of `encode_deltas`.

    Raises:
        ValueError: bytes for an adapter that is not known, or that do not fit it.
    """
    adapters = {}
    for name, value in sent.items():
        if value.dtype != torch.uint8:
            adapters[name] = value
            continue
        if name not in known or value.numel() != format.num_bytes(known[name].numel()):
            expected = f"{format.num_bytes(known[name].numel())} bytes" if name in known else "no such adapter"
            raise ValueError(f"{name}: expected {expected}; got {value.numel()} bytes: both ends need the same format")
        before = known[name]
        width = before.numel()
        codes, scales = value.split([format.num_packed(width), value.numel() - format.num_packed(width)])
        scales = scales.clone().view(format.scale_dtype)  # a copy, because a view needs it to begin at an even byte
        adapters[name] = before + dequantize(codes, scales, width, format, dtype=before.dtype).view_as(before)
    return adapters
