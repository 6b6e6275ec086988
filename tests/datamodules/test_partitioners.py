"""Every partition uses every example once, repeats itself, and explains itself when it cannot be made."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from elsa_pl.datamodules import partitioners
from elsa_pl.datamodules.batches import Indices
from elsa_pl.datamodules.partitioners import by_column, dirichlet, iid, set_aside, shards


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(num_examples: int, num_labels: int, seed: int = 9) -> Indices:
    return rng(seed).integers(0, num_labels, num_examples)


PARTITIONS: dict[str, Callable[[Indices, int, np.random.Generator], list[Indices]]] = {
    "iid": iid,
    "dirichlet-0.1": lambda labels, n, g: dirichlet(labels, n, g, 0.1),
    "dirichlet-100": lambda labels, n, g: dirichlet(labels, n, g, 100.0),
    "shards-2": lambda labels, n, g: shards(labels, n, g, 2),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize(
    ("num_examples", "num_labels", "num_clients"), [(1, 1, 1), (40, 2, 3), (1000, 6, 8), (5000, 77, 20)]
)
def test_every_example_is_used_exactly_once(name: str, num_examples: int, num_labels: int, num_clients: int) -> None:
    labels = labels_of(num_examples, num_labels)
    try:
        parts = PARTITIONS[name](labels, num_clients, rng())
    except ValueError:
        assert num_examples < 2 * num_clients  # two shards of one example cannot be made
        return
    assert len(parts) == num_clients
    assert min(map(len, parts)) >= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


@pytest.mark.parametrize("name", PARTITIONS)
def test_same_generator_state_same_partition(name: str) -> None:
    labels = labels_of(600, 5)
    once, again, other = (PARTITIONS[name](labels, 6, rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def mix(labels: Indices, parts: list[Indices]) -> npt.NDArray[np.float64]:
    """Label proportions per client."""
    counts = np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])
    proportions: npt.NDArray[np.float64] = counts / counts.sum(axis=1, keepdims=True)
    return proportions


def test_alpha_goes_from_one_label_per_client_to_iid() -> None:
    labels = labels_of(4000, 5)
    skew = [mix(labels, dirichlet(labels, 10, rng(), alpha)).max(axis=1).mean() for alpha in (0.05, 0.5, 1000.0)]
    assert skew[0] > 0.75 > skew[1] > 0.4 > skew[2]


def test_few_examples_of_many_labels_do_not_all_go_to_the_same_clients() -> None:
    # Rounding each label's shares without an offset gave every single example to one and the same client.
    labels = np.arange(400) // 2
    sizes = [len(part) for part in dirichlet(labels, 20, rng(), 1000.0)]
    assert min(sizes) > 8
    assert max(sizes) < 40


def test_two_shards_hold_few_labels() -> None:
    labels = np.repeat(np.arange(10), 100)
    parts = shards(labels, 10, rng(), 2)
    assert all(len(set(labels[part])) <= 2 for part in parts)
    assert {len(part) for part in parts} == {100}


def test_by_column_names_the_clients() -> None:
    names, parts = by_column(["b", "a", "b", "c"])
    assert names == ["a", "b", "c"]
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]
    with pytest.raises(ValueError, match=r"min_examples=2 .* got a \(1\), c \(1\): remove"):
        by_column(["b", "a", "b", "c"], min_examples=2)
    with pytest.raises(ValueError, match="at least one example"):
        by_column([])


def test_the_error_names_settings_that_work_with_the_same_seed() -> None:
    labels = labels_of(300, 4)

    def make(num_clients: int, alpha: float) -> list[Indices]:
        return dirichlet(labels, num_clients, rng(3), alpha, min_examples=3)

    with pytest.raises(ValueError, match=r"got client-\d+ \(\d\)") as caught:
        make(40, 0.02)
    advice = (
        re.search(r"alpha=([\d.]+) or", str(caught.value)),
        re.search(r"num_clients=(\d+) works", str(caught.value)),
    )
    assert advice[0] is not None
    assert advice[1] is not None
    alpha, clients = float(advice[0][1]), int(advice[1][1])
    assert min(map(len, make(40, alpha))) >= 3
    assert min(map(len, make(clients, 0.02))) >= 3
    with pytest.raises(ValueError, match="got client-"):
        make(clients + 1, 0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid([0] * 5, 6, rng()), "use num_clients <= 5"),
        (lambda: iid([0] * 5, 0, rng()), "expected num_clients > 0"),
        (lambda: iid([0] * 10, 4, rng(), 3), "use num_clients <= 3"),
        (lambda: shards([0] * 10, 4, rng(), 3), "use num_clients <= 3"),
        (lambda: shards([0] * 10, 4, rng(), 0), "expected shards_per_client > 0"),
        (lambda: dirichlet([0] * 10, 2, rng(), 0.0), "expected alpha > 0"),
        (lambda: dirichlet([0] * 10, 2, rng(), float("nan")), "expected alpha > 0"),
    ],
)
def test_bad_values_are_refused_with_advice(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_redraws_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    original = partitioners._draw_counts

    def counted(*args: Any) -> Indices:
        draws.append(1)
        return original(*args)

    monkeypatch.setattr(partitioners, "_draw_counts", counted)
    with pytest.raises(ValueError, match="last of 20 dirichlet draws"):
        dirichlet(labels_of(200, 3), 190, rng(), 0.01)
    assert len(draws) < 250


def test_set_aside_keeps_the_mix_and_every_label() -> None:
    strata = np.repeat(["a", "b", "c", "d"], [500, 300, 199, 1])
    kept, aside = set_aside(strata, 0.1, rng())
    assert len(aside) == 100
    assert sorted(np.concatenate([kept, aside])) == list(range(1000))
    assert {name: int((strata[aside] == name).sum()) for name in "abcd"} == {
        "a": 50,
        "b": 30,
        "c": 20,
        "d": 0,
    }
    assert len(set_aside(strata, 0.0, rng())[1]) == 0
