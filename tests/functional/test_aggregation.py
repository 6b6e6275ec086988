"""Means and their robust stand-ins against the obvious slow loops, and who takes part in a round."""

import random
import statistics

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.aggregation import (
    AGGREGATORS,
    Aggregator,
    krum,
    median,
    sample_clients,
    trimmed_mean,
    weighted_mean,
)

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


@pytest.mark.parametrize("merge", AGGREGATORS.values())
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
def test_refused(merge: Aggregator, adapters: list[dict[str, Tensor]], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(adapters, weights)


@pytest.mark.parametrize("merge", AGGREGATORS.values())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(merge: Aggregator, bad: float) -> None:
    with pytest.raises(ValueError, match="weights"):
        merge(draw({"a": (2,)}, 2), [1.0, bad])


def slow_middle(adapters: list[dict[str, Tensor]], drop: int) -> dict[str, list[float]]:
    """Element by element: sort the senders' values, leave out `drop` at each end, average."""
    merged: dict[str, list[float]] = {}
    for name, first in adapters[0].items():
        merged[name] = []
        for index in range(first.numel()):
            values = sorted(sent[name].flatten()[index].item() for sent in adapters)
            merged[name].append(statistics.fmean(values[drop : len(values) - drop]))
    return merged


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 12])
def test_median_against_the_slow_loop(shapes: dict[str, tuple[int, ...]], count: int) -> None:
    adapters = draw(shapes, count)
    merged = median(adapters, [1.0] * count)
    assert list(merged) == list(shapes)
    for name, value in merged.items():
        expected = [
            statistics.median(sent[name].flatten()[i].item() for sent in adapters) for i in range(value.numel())
        ]
        assert value.shape == shapes[name]
        torch.testing.assert_close(value.flatten(), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("count", "trim", "drop"), [(1, 0.25, 0), (3, 0.25, 0), (4, 0.25, 1), (10, 0.25, 2), (10, 0.49, 4), (5, 0.0, 0)]
)
def test_trimmed_mean_against_the_slow_loop(
    shapes: dict[str, tuple[int, ...]], count: int, trim: float, drop: int
) -> None:
    adapters = draw(shapes, count)
    merged = trimmed_mean(adapters, [1.0] * count, trim)
    for name, expected in slow_middle(adapters, drop).items():
        assert merged[name].shape == shapes[name]
        torch.testing.assert_close(merged[name].flatten(), torch.tensor(expected, dtype=torch.float32))


def slow_krum(adapters: list[dict[str, Tensor]], num_faulty: int) -> int:
    """Blanchard et al. 2017, section 4, word by word."""
    vectors = [torch.cat([value.double().flatten() for value in sent.values()]) for sent in adapters]
    scores = []
    for i, mine in enumerate(vectors):
        distances = sorted(float(((mine - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(vectors) - num_faulty - 2]))
    return scores.index(min(scores))


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("count", "faulty", "num_faulty"), [(3, 0.25, 0), (5, 0.25, 1), (8, 0.25, 2), (9, 0.25, 2), (9, 0.45, 3)]
)
def test_krum_against_the_slow_loop(
    shapes: dict[str, tuple[int, ...]], count: int, faulty: float, num_faulty: int
) -> None:
    for seed in range(5):
        adapters = draw(shapes, count, seed)
        chosen = adapters[slow_krum(adapters, num_faulty)]
        merged = krum(adapters, [1.0] * count, faulty)
        assert list(merged) == list(shapes)
        for name, value in merged.items():
            assert torch.equal(value, chosen[name])
            assert value.data_ptr() != chosen[name].data_ptr() or value.numel() == 0


@pytest.mark.parametrize("merge", [median, trimmed_mean, krum])
def test_liars_do_not_move_the_robust_ones(merge: Aggregator) -> None:
    honest = [{"a": 1 + 0.01 * noise["a"]} for noise in draw({"a": (20,)}, 9)]
    liars = [{"a": torch.full((20,), value)} for value in (-1e6, 40.0, -50.0)]
    merged = merge([*liars, *honest], [1.0] * 12)
    assert (merged["a"] - 1).abs().max() < 0.05
    assert (weighted_mean([*liars, *honest], [1.0] * 12)["a"] - 1).abs().max() > 1e4


@pytest.mark.parametrize("merge", [median, trimmed_mean, krum])
def test_one_sender_of_the_robust_ones(merge: Aggregator) -> None:
    (sent,) = draw({"a": (3,), "b": ()}, 1)
    merged = merge([sent], [5.0])
    assert all(torch.equal(merged[name], value) for name, value in sent.items())
    assert all(merged[name].data_ptr() != value.data_ptr() for name, value in sent.items())


@pytest.mark.parametrize("merge", [median, trimmed_mean, krum])
def test_two_senders_of_the_robust_ones(merge: Aggregator) -> None:
    """Nobody can tell which of two is faulty: their mean, with equal weights."""
    sent = [{"a": torch.tensor([0.0, 4.0])}, {"a": torch.tensor([1.0, 2.0])}]
    assert merge(sent, [10.0, 1.0])["a"].tolist() == [0.5, 3.0]


@pytest.mark.parametrize("merge", [median, trimmed_mean, krum])
def test_a_large_claim_does_not_buy_influence(merge: Aggregator) -> None:
    adapters = draw({"a": (5, 2)}, 7)
    equal = merge(adapters, [1.0] * 7)
    claimed = merge(adapters, [1.0] * 6 + [1e9])
    assert torch.equal(equal["a"], claimed["a"])


@pytest.mark.parametrize("merge", [median, trimmed_mean, krum])
def test_weight_0_is_left_out(merge: Aggregator) -> None:
    adapters = draw({"a": (5, 2)}, 6)
    broken = {"a": torch.full((5, 2), float("nan"))}
    without = merge(adapters, [1.0] * 6)
    assert torch.equal(merge([broken, *adapters], [0.0] + [1.0] * 6)["a"], without["a"])


@pytest.mark.parametrize("merge", [median, trimmed_mean, krum])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_adapters_that_are_no_numbers(merge: Aggregator, bad: float) -> None:
    adapters = draw({"a": (3,), "b": (2,)}, 3)
    adapters[1]["b"][0] = bad
    with pytest.raises(ValueError, match=r"senders \[1\].*weight 0"):
        merge(adapters, [1.0] * 3)


@pytest.mark.parametrize("merge", [median, trimmed_mean, krum])
def test_dtype_stays_in_the_robust_ones(merge: Aggregator) -> None:
    adapters = [{"a": torch.full((2,), value, dtype=torch.bfloat16)} for value in (1.0, 2.0, 3.0)]
    assert merge(adapters, [1.0] * 3)["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("share", [-0.1, 0.5, float("nan")])
def test_shares_out_of_range(share: float) -> None:
    adapters = draw({"a": (2,)}, 3)
    with pytest.raises(ValueError, match=r"0 <= trim < 0.5"):
        trimmed_mean(adapters, [1.0] * 3, share)
    with pytest.raises(ValueError, match=r"0 <= faulty < 0.5"):
        krum(adapters, [1.0] * 3, share)


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
