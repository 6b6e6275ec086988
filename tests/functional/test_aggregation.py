"""Means against the obvious slow loop, and who takes part in a round."""

import random

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.aggregation import sample_clients, weighted_mean

SHAPES: list[dict[str, tuple[int, ...]]] = [
    {"a": (3,)},
    {"a": (2, 3), "b": (4, 1)},
    {"scalar": (), "empty": (0, 2), "deep": (2, 1, 3)},
]


def draw(shapes: dict[str, tuple[int, ...]], count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def slow_mean(adapters: list[dict[str, Tensor]], weights: list[float]) -> dict[str, list[float]]:
    """Element by element, in Python's own numbers."""
    return {
        name: [
            sum(w * sent[name].flatten()[index].item() for sent, w in zip(adapters, weights, strict=True))
            / sum(weights)
            for index in range(first.numel())
        ]
        for name, first in adapters[0].items()
    }


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("weights", [[1.0], [1.0, 3.0], [10.0, 0.0, 2.5], [1e-3, 1e6, 7.0, 7.0]])
def test_against_the_slow_loop(shapes: dict[str, tuple[int, ...]], weights: list[float]) -> None:
    adapters = draw(shapes, len(weights))
    mean = weighted_mean(adapters, weights)
    expected = slow_mean(adapters, weights)
    assert list(mean) == list(shapes)
    for name, value in mean.items():
        assert value.shape == shapes[name]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.flatten(), torch.tensor(expected[name], dtype=torch.float32))


def test_inputs_stay() -> None:
    adapters = draw({"a": (3,)}, 2)
    before = [sent["a"].clone() for sent in adapters]
    mean = weighted_mean(adapters, [1, 2])
    mean["a"].zero_()
    assert all(torch.equal(sent["a"], value) for sent, value in zip(adapters, before, strict=True))


def test_one_sender_is_copied() -> None:
    (sent,) = draw({"a": (3,)}, 1)
    mean = weighted_mean([sent], [5])
    assert torch.equal(mean["a"], sent["a"])
    assert mean["a"].data_ptr() != sent["a"].data_ptr()


def test_mean_of_means_is_the_flat_mean() -> None:
    adapters = draw({"a": (50, 8)}, 7)
    weights = [3.0, 1.0, 10.0, 2.0, 2.0, 8.0, 5.0]
    edges = [slice(0, 3), slice(3, 4), slice(4, 7)]
    means = [weighted_mean(adapters[edge], weights[edge]) for edge in edges]
    nested = weighted_mean(means, [sum(weights[edge]) for edge in edges])
    torch.testing.assert_close(nested["a"], weighted_mean(adapters, weights)["a"], rtol=0, atol=2.5e-7)


def test_dtype_stays_and_sums_are_exact() -> None:
    """In half precision the sum of many ones would stop growing at 2048."""
    adapters = [{"a": torch.ones(1, dtype=torch.float16)} for _ in range(5000)]
    mean = weighted_mean(adapters, [1.0] * 5000)
    assert mean["a"].dtype == torch.float16
    assert mean["a"].item() == 1.0


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        ([], [], "at least one sender"),
        ([{"a": torch.ones(1)}], [1.0, 2.0], "got 1 and 2"),
        ([{"a": torch.ones(1)}], [0.0], "not all 0"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(1)}], [2.0, -1.0], "at least 0 and"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [1.0, 1.0], r"layers \['a', 'b'\]"),
    ],
)
def test_refused(adapters: list[dict[str, Tensor]], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_mean(adapters, weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(ValueError, match="weights"):
        weighted_mean(draw({"a": (2,)}, 2), [1.0, bad])


CLIENTS = [f"client-{index}" for index in range(10)]


@pytest.mark.parametrize(("participation", "count"), [(1.0, 10), (0.5, 5), (0.26, 3), (0.01, 1)])
def test_number_of_participants(participation: float, count: int) -> None:
    for round_number in range(5):
        drawn = sample_clients(CLIENTS, participation, 0, round_number)
        assert len(drawn) == count
        assert drawn <= set(CLIENTS)


def test_draws_depend_on_seed_and_round_only() -> None:
    draws = [sample_clients(CLIENTS, 0.5, 0, round_number) for round_number in range(20)]
    random.seed(1)
    torch.manual_seed(1)
    assert draws == [sample_clients(CLIENTS, 0.5, 0, round_number) for round_number in range(20)]
    assert len(set(draws)) > 10
    assert draws != [sample_clients(CLIENTS, 0.5, 1, round_number) for round_number in range(20)]


def test_everybody_has_a_turn() -> None:
    counts = dict.fromkeys(CLIENTS, 0)
    for round_number in range(400):
        for name in sample_clients(CLIENTS, 0.3, 0, round_number):
            counts[name] += 1
    assert all(90 < count < 150 for count in counts.values())  # expected 120, standard deviation 9
