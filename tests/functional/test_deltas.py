"""Differences of adapters in few bits."""

import pytest
import torch

from elsa_pl.functional.deltas import decode_deltas, encode_deltas
from elsa_pl.functional.quantization import BlockFormat

SHAPES = [(8, 384), (384, 8), (6,), (1,), (77, 384), (3, 5, 7)]


@pytest.mark.parametrize("bits", [8, 4])
def test_each_number_is_within_half_a_step(bits: int) -> None:
    form = BlockFormat(bits=bits, block=16)
    generator = torch.Generator().manual_seed(0)
    known = {str(shape): torch.randn(shape, generator=generator) for shape in SHAPES}
    moves = {name: 0.01 * torch.randn(value.shape, generator=generator) for name, value in known.items()}
    adapters = {name: value + moves[name] for name, value in known.items()}
    sent = encode_deltas(adapters, known, form)
    got = decode_deltas(sent, known, form)
    for name, value in adapters.items():
        assert sent[name].numel() == form.num_bytes(value.numel())
        padded = torch.nn.functional.pad(moves[name].flatten(), (0, -value.numel() % 16)).view(-1, 16)
        step = padded.abs().amax(1, keepdim=True) / form.levels * 1.01  # scales are rounded up
        bound = (step / 2).expand_as(padded).flatten()[: value.numel()].view_as(value)
        assert ((got[name] - value).abs() <= bound + 1e-6).all(), name


def test_both_ends_have_the_same_whatever_was_lost_before() -> None:
    """Errors do not add up, as they would if differences were taken between exact values."""
    form = BlockFormat(bits=4, block=64)
    generator = torch.Generator().manual_seed(1)
    value, known = {"a": torch.zeros(640)}, {"a": torch.zeros(640)}
    for _ in range(50):
        value = {"a": value["a"] + 0.1 * torch.randn(640, generator=generator)}
        known = decode_deltas(encode_deltas(value, known, form), known, form)
    assert (known["a"] - value["a"]).abs().max() < 0.1 * 4 / 7


def test_what_is_new_or_not_finite_goes_as_it_is() -> None:
    form = BlockFormat()
    known = {"shape": torch.zeros(4), "nan": torch.zeros(4), "inf": torch.zeros(4)}
    adapters = {
        "shape": torch.ones(5),
        "new": torch.ones(3),
        "nan": torch.tensor([1.0, float("nan"), 0, 0]),
        "inf": torch.tensor([1.0, float("inf"), 0, 0]),
    }
    sent = encode_deltas(adapters, known, form)
    assert all(sent[name] is value for name, value in adapters.items())
    got = decode_deltas(sent, known, form)
    assert all(torch.equal(got[name], value) or name == "nan" for name, value in adapters.items())


def test_ends_that_disagree() -> None:
    known = {"a": torch.zeros(64)}
    sent = encode_deltas({"a": torch.ones(64)}, known, BlockFormat(bits=8))
    with pytest.raises(ValueError, match="a: expected 36 bytes; got 68 bytes: both ends need the same format"):
        decode_deltas(sent, known, BlockFormat(bits=4))
    with pytest.raises(ValueError, match="a: expected no such adapter; got 68 bytes"):
        decode_deltas(sent, {}, BlockFormat(bits=8))
