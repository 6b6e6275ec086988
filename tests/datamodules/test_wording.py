"""Texts are divided by wording, in pieces of given sizes."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from elsa_pl.datamodules.batches import Indices
from elsa_pl.datamodules.wording import _fill, divide_by_wording


def texts_of(num_texts: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in draw.zipf(1.6, draw.integers(3, 12)) % 200) for _ in range(num_texts)]


def divide(texts: list[str], sizes: list[int], seed: int = 0) -> Indices:
    codes = np.zeros(len(texts), dtype=np.int64)
    return divide_by_wording(texts, codes, np.array([sizes]), np.random.default_rng(seed))


@pytest.mark.parametrize("sizes", [[50], [25, 25], [10, 10, 30], [49, 1], [0, 20, 0, 30], [1] * 50])
def test_sources_have_the_sizes_asked_for(sizes: list[int]) -> None:
    assert np.bincount(divide(texts_of(50), sizes), minlength=len(sizes)).tolist() == sizes


@pytest.mark.parametrize("seed", range(5))
def test_wordings_are_told_apart(seed: int) -> None:
    texts = [f"{words} {i}" for i in range(20) for words in ("open a ticket", "why does it not", "error code failure")]
    order = np.random.default_rng(seed).permutation(60)
    found = divide([texts[row] for row in order], [20, 20, 20], seed)
    assert sorted(set(zip(order % 3, found, strict=True))) in [
        [(0, a), (1, b), (2, c)] for a, b, c in itertools.permutations(range(3))
    ]


def test_texts_that_are_alike_or_have_no_words_are_dealt_out() -> None:
    assert np.bincount(divide(["same text"] * 9, [3, 3, 3])).tolist() == [3, 3, 3]
    assert np.bincount(divide(["!", "?", "...", "x"], [2, 2])).tolist() == [2, 2]


def test_each_label_is_divided_by_itself() -> None:
    codes = np.arange(60) % 3
    sizes = np.array([[5, 15], [10, 10], [20, 0]])
    found = divide_by_wording(texts_of(60), codes, sizes, np.random.default_rng(0))
    assert [np.bincount(found[codes == label], minlength=2).tolist() for label in range(3)] == sizes.tolist()


def test_sources_are_tighter_than_pieces_dealt_at_random() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = texts_of(200)
    vectors = TfidfVectorizer().fit_transform(texts).toarray()

    def spread(sources: Indices) -> float:
        return float(sum(((vectors[sources == g] - vectors[sources == g].mean(axis=0)) ** 2).sum() for g in range(4)))

    at_random = min(spread(np.random.default_rng(seed).permutation(np.arange(200) % 4)) for seed in range(20))
    assert spread(divide(texts, [50] * 4)) < 0.95 * at_random


@pytest.mark.parametrize(("num_examples", "num_sources"), [(2, 2), (7, 3), (60, 4), (40, 40)])
def test_filling_is_the_slow_loop_and_near_the_optimum(num_examples: int, num_sources: int) -> None:
    from scipy.optimize import linear_sum_assignment

    distances = np.random.default_rng(num_examples).random((num_examples, num_sources))
    sizes = np.bincount(np.arange(num_examples) % num_sources)
    found = _fill(distances, sizes)
    np.testing.assert_array_equal(np.bincount(found, minlength=num_sources), sizes)
    np.testing.assert_array_equal(found, slow_fill(distances, sizes))
    slots = np.repeat(np.arange(num_sources), sizes)
    rows, columns = linear_sum_assignment(distances[:, slots])
    best = distances[:, slots][rows, columns].sum()
    assert best - 1e-9 <= distances[np.arange(num_examples), found].sum() <= best + 0.15 * num_examples


def slow_fill(distances: npt.NDArray[np.float64], sizes: Indices) -> Indices:
    """In turns, each open source takes those that want it most, of those to whom it is the nearest open one."""
    sources, room = np.full(len(distances), -1), sizes.copy()
    while (sources < 0).any():
        open_now = np.flatnonzero(room)
        wishes: dict[int, list[tuple[float, int]]] = {}
        for row in np.flatnonzero(sources < 0).tolist():
            by_distance = sorted(open_now, key=lambda source: (distances[row, source], source))
            loss = distances[row, by_distance[1]] - distances[row, by_distance[0]] if len(by_distance) > 1 else np.inf
            wishes.setdefault(int(by_distance[0]), []).append((-loss, row))
        for source, rows in wishes.items():
            sources[[row for _, row in sorted(rows)[: room[source]]]] = source
            room[source] = max(0, room[source] - len(rows))
    return sources
