"""Planted groups: what is planted is there, nothing else is, and no example is used twice."""

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from elsa_pl.datamodules import planted
from elsa_pl.datamodules.batches import Indices
from elsa_pl.datamodules.planted import groups, sources

Floats = npt.NDArray[np.float64]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(num_examples: int, num_labels: int, seed: int = 9) -> Indices:
    return rng(seed).integers(0, num_labels, num_examples)


def counts_of(labels: Indices, parts: list[Indices]) -> Indices:
    return np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def mixes_of(labels: Indices, parts: list[Indices]) -> Floats:
    counts = counts_of(labels, parts)
    mixes: Floats = counts / counts.sum(axis=1, keepdims=True)
    return mixes


DIALECTS = ("please could you kindly", "yo gimme dat", "error code failure trace", "how do i ever")


def spoken(labels: Indices, num_dialects: int, seed: int = 4) -> tuple[list[str], Indices]:
    """A text for every label, said in one of the dialects, as many in each for each label as can be."""
    draw = rng(seed)
    dialects = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        dialects[rows] = draw.permutation(np.arange(len(rows)) % num_dialects)
    texts = [
        f"{DIALECTS[dialect]} subject{label} thing{draw.integers(20)}"
        for label, dialect in zip(labels, dialects, strict=True)
    ]
    return texts, dialects


@pytest.mark.parametrize(
    ("num_examples", "num_labels", "num_clients", "num_groups"),
    [(1, 1, 1, 1), (40, 2, 3, 3), (1000, 6, 8, 3), (5000, 77, 20, 4)],
)
def test_groups_use_no_example_twice_and_clients_have_equal_sizes(
    num_examples: int, num_labels: int, num_clients: int, num_groups: int
) -> None:
    parts, members = groups(labels_of(num_examples, num_labels), num_clients, rng(), num_groups, 1.0)
    used = np.concatenate(parts)
    assert len(np.unique(used)) == len(used)
    assert all(np.array_equal(part, np.sort(part)) for part in parts)
    assert used.min() >= 0
    assert used.max() < num_examples
    sizes = np.array([len(part) for part in parts])
    # rounding is by label, so a group may be off by some examples of its labels
    assert sizes.min() >= 1
    assert np.ptp(sizes) <= 2 + num_labels * num_groups / num_clients
    memberships = np.bincount(members, minlength=num_groups)
    assert memberships.max() - memberships.min() <= 1


def test_the_scarcest_label_is_used_up() -> None:
    labels = labels_of(3000, 5)
    parts, _ = groups(labels, 12, rng(1), 4, 0.5)
    left = np.bincount(labels) - counts_of(labels, parts).sum(axis=0)
    assert left.min() == 0
    assert left.max() > 0


def test_clients_of_a_group_are_alike_and_groups_differ_but_overlap() -> None:
    labels = labels_of(12000, 6)
    parts, members = groups(labels, 12, rng(), 4, 0.3)
    counts = counts_of(labels, parts)
    same = members[:, None] == members[None]
    assert np.abs(counts[:, None] - counts[None]).max(axis=-1)[same].max() <= 1
    mixes = mixes_of(labels, parts)
    distance = np.abs(mixes[:, None] - mixes[None]).sum(axis=-1) / 2
    assert distance[same].max() < distance[~same].min()
    assert (np.minimum(mixes[:, None], mixes[None]).sum(axis=-1)[~same] > 0).mean() > 0.5


@pytest.mark.parametrize("frequencies", [(1, 1, 1, 1), (8, 4, 3, 1)])
def test_mixes_have_the_moments_of_a_dirichlet_draw_over_the_labels(frequencies: tuple[int, ...]) -> None:
    """Mean p, variance p (1 - p) / (alpha C + 1), negative covariances -p_i p_j / (alpha C + 1)."""
    labels = np.repeat(np.arange(4), np.array(frequencies) * 500)
    p = np.array(frequencies) / sum(frequencies)
    alpha, drawn = 0.5, []
    for seed in range(400):
        parts, members = groups(labels, 2, rng(seed), 2, alpha)
        drawn.append(mixes_of(labels, parts)[members == 0][0])
    expected = (np.diag(p) - np.outer(p, p)) / (alpha * 4 + 1)
    np.testing.assert_allclose(np.mean(drawn, axis=0), p, atol=4 * np.sqrt(expected.max() / 400))
    np.testing.assert_allclose(np.cov(np.array(drawn).T, bias=True), expected, atol=0.02)


def test_large_alpha_gives_everybody_the_same_mix_and_uses_nearly_everything() -> None:
    labels = labels_of(4000, 5)
    parts, _ = groups(labels, 10, rng(), 5, 1e6)
    assert np.ptp(mixes_of(labels, parts), axis=0).max() < 0.01
    assert sum(map(len, parts)) > 3950


@pytest.mark.parametrize(
    ("num_examples", "num_labels", "num_clients", "num_groups"),
    [(1, 1, 1, 1), (12, 3, 4, 2), (300, 6, 8, 3), (600, 30, 7, 4), (400, 200, 10, 4)],
)
def test_sources_use_every_example_once_and_all_clients_have_the_same_mix(
    num_examples: int, num_labels: int, num_clients: int, num_groups: int
) -> None:
    labels = labels_of(num_examples, num_labels)
    texts, _ = spoken(labels, len(DIALECTS))
    parts, members = sources(labels, texts, num_clients, rng(), num_groups)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))
    assert np.ptp([len(part) for part in parts]) <= 2
    group_size = np.bincount(members)
    totals = np.bincount(labels, minlength=labels.max() + 1)
    for group, size in enumerate(group_size):
        mine = counts_of(labels, [np.concatenate([parts[n] for n in np.flatnonzero(members == group)])])[0]
        assert np.abs(mine - totals * size / num_clients).max() < 1 + 1e-9


def test_each_source_has_a_wording_of_its_own_within_each_label() -> None:
    labels = labels_of(480, 4)
    texts, dialects = spoken(labels, 4)
    parts, members = sources(labels, texts, 8, rng(2), 4)
    group_of = np.empty(480, dtype=np.int64)
    for part, group in zip(parts, members, strict=True):
        group_of[part] = group
    for label in range(4):
        table = np.zeros((4, 4), dtype=np.int64)
        np.add.at(table, (group_of[labels == label], dialects[labels == label]), 1)
        assert sorted(table.argmax(axis=1)) == [0, 1, 2, 3]
        # the number of texts with a label need not be a multiple of four: one more here, one less there
        assert (table.max(axis=1) >= table.sum(axis=1) - 1).all()


PLANTED: dict[str, Callable[[Indices, int, np.random.Generator], tuple[list[Indices], Indices]]] = {
    "groups": lambda labels, n, g: groups(labels, n, g, 3, 1.0),
    "sources": lambda labels, n, g: sources(labels, spoken(labels, 4)[0], n, g, 3),
}


@pytest.mark.parametrize("name", PLANTED)
def test_same_generator_state_same_groups(name: str) -> None:
    labels = labels_of(300, 5)
    once, again, other = (PLANTED[name](labels, 6, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(once[1], again[1])
    assert all(np.array_equal(a, b) for a, b in zip(once[0], again[0], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once[0], other[0], strict=True))


def test_the_error_names_settings_that_work_with_the_same_seed() -> None:
    # six groups of one label each share four labels, so that clients with a rare label are short of examples
    labels = labels_of(300, 4)

    def make(num_clients: int, alpha: float) -> list[Indices]:
        return groups(labels, num_clients, rng(3), 6, alpha, min_examples=6)[0]

    with pytest.raises(ValueError, match=r"got client-\d+ \(\d\)") as caught:
        make(40, 0.02)
    advice = re.search(r"alpha=([\d.]+) or num_clients=(\d+) works", str(caught.value))
    assert advice is not None
    assert min(map(len, make(40, float(advice[1])))) >= 6
    assert min(map(len, make(int(advice[2]), 0.02))) >= 6
    with pytest.raises(ValueError, match="got client-"):
        make(int(advice[2]) + 1, 0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: groups([0] * 10, 2, rng(), 3, 1.0), "lower num_groups or raise num_clients"),
        (lambda: groups([0] * 10, 2, rng(), 0, 1.0), "1 <= num_groups"),
        (lambda: groups([0] * 10, 2, rng(), 2, 0.0), "expected alpha > 0"),
        (lambda: groups([0] * 5, 6, rng(), 2, 1.0), "use num_clients <= 5"),
        (lambda: sources([0] * 10, ["a"] * 10, 2, rng(), 3), "lower num_groups or raise num_clients"),
        (lambda: sources([0] * 5, ["a"] * 5, 6, rng(), 2), "partition sources: use num_clients <= 5"),
        (lambda: sources([0] * 10, ["a"] * 10, 4, rng(), 2, 3), "use num_clients <= 3"),
    ],
)
def test_bad_values_are_refused_with_advice(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_does_not_divide_evenly_goes_round() -> None:
    totals, num_members = np.full(100, 3), np.array([2, 2, 1])
    counts = planted._even_counts(totals, num_members)
    assert (counts.sum(axis=1) == 3).all()
    assert counts.sum(axis=0).tolist() == [120, 120, 60]
    assert np.abs(counts - np.outer(totals, num_members / 5)).max() < 1
