"""Clusters where the groups are known, and what happens where there are none."""

import itertools

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from elsa_pl.functional.clustering import cluster, cosine_distances
from elsa_pl.functional.divergence import symmetric_kl


def planted(sizes: list[int], seed: int = 0, spread: float = 0.3) -> tuple[Tensor, list[int]]:
    """Divergences of clients around one centre per group, in shuffled order; and their groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    centres = 4 * torch.randn(len(sizes), 6, generator=generator, dtype=torch.float64)
    means = centres[groups] + spread * torch.randn(len(groups), 6, generator=generator, dtype=torch.float64)
    return symmetric_kl(means, torch.eye(6, dtype=torch.float64).expand(len(groups), 6, 6)), groups.tolist()


@pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [2, 9], [8, 3, 5], [4] * 7])
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(sizes: list[int], seed: int) -> None:
    divergences, groups = planted(sizes, seed)
    for number in (len(sizes), None):
        labels = cluster(divergences, number)
        assert labels.dtype == torch.long
        assert adjusted_rand_score(groups, labels.tolist()) == 1.0


def test_one_client_far_out_does_not_cost_a_group() -> None:
    """On raw divergences the first cut isolates it, and two groups are merged."""
    divergences, groups = planted([5, 5, 5, 5])
    far = torch.full((21, 21), 1e4, dtype=torch.float64).fill_diagonal_(0)
    far[:20, :20] = divergences
    labels = cluster(far)
    assert adjusted_rand_score(groups, labels[:20].tolist()) == 1.0


def test_numbers_follow_first_appearance_whatever_the_order_of_clients() -> None:
    divergences, _ = planted([3, 4, 5])
    labels = cluster(divergences, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = cluster(divergences[order][:, order], 3)
    for found in (labels, shuffled):
        firsts = [found.tolist().index(number) for number in range(3)]
        assert firsts == sorted(firsts)
    assert adjusted_rand_score(labels[order].tolist(), shuffled.tolist()) == 1.0


@pytest.mark.parametrize("number", [None, 1, 2, 5])
def test_one_client(number: int | None) -> None:
    assert cluster(torch.zeros(1, 1), number).tolist() == [0]


def test_two_clients() -> None:
    divergences = torch.tensor([[0.0, 7.0], [7.0, 0.0]])
    assert cluster(divergences).tolist() == [0, 0]
    assert cluster(divergences, 1).tolist() == [0, 0]
    assert cluster(divergences, 2).tolist() == [0, 1]
    assert cluster(divergences, 5).tolist() == [0, 1]


@pytest.mark.parametrize("number", [None, 1, 3])
def test_identical_clients_are_one_cluster(number: int | None) -> None:
    assert cluster(torch.zeros(6, 6), number).tolist() == [0] * 6


def test_identical_within_groups() -> None:
    divergences = torch.full((6, 6), 2.0)
    divergences[:2, :2] = divergences[2:, 2:] = 0
    assert cluster(divergences).tolist() == [0, 0, 1, 1, 1, 1]
    assert cluster(divergences, 4).tolist() == [0, 0, 1, 1, 1, 1]


def test_clients_that_differ_by_rounding_are_one_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(16, 32, generator=generator)
    means = torch.randn(16, generator=generator) + 1e-7 * torch.randn(8, 16, generator=generator)
    divergences = symmetric_kl(means, (factor @ factor.T).expand(8, 16, 16))
    assert divergences.any()
    for number in (None, 1, 3):
        assert cluster(divergences, number).tolist() == [0] * 8


def test_limits_on_the_number() -> None:
    divergences, _ = planted([3] * 6)
    assert cluster(divergences, max_clusters=4).max() < 4
    assert cluster(divergences, max_clusters=1).tolist() == [0] * 18
    assert cluster(divergences, 9).max() == 8


def test_cosine_against_the_slow_loop() -> None:
    updates = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    distances = cosine_distances(updates)
    assert distances.dtype == torch.float32
    assert torch.equal(distances, distances.T)
    for i, j in itertools.product(range(7), range(7)):
        expected = 1 - torch.nn.functional.cosine_similarity(updates[i], updates[j], dim=0)
        torch.testing.assert_close(distances[i, j], torch.tensor(0.0) if i == j else expected, atol=1e-6, rtol=0)


def test_centred_cosine_sees_past_what_all_share() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [0, 1, 2] * 4
    own = torch.randn(3, 500, generator=generator)[groups] + torch.randn(12, 500, generator=generator)
    updates = 50 * torch.randn(500, generator=generator) + own
    assert cosine_distances(updates).max() < 0.01
    distances = cosine_distances(updates, centred=True)
    torch.testing.assert_close(distances, cosine_distances(updates - updates.mean(0)), atol=1e-4, rtol=0)
    assert adjusted_rand_score(groups, cluster(distances).tolist()) == 1.0


def test_cosine_of_a_client_that_changed_nothing() -> None:
    distances = cosine_distances(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    assert distances.tolist() == [[0, 1, 1], [1, 0, 2], [1, 2, 0]]


def test_bad_divergences() -> None:
    divergences, _ = planted([3, 3])
    for wrong in (divergences[0], divergences[:5], divergences[:0, :0]):
        with pytest.raises(ValueError, match=r"shape \[N, N\] for at least one client; got"):
            cluster(wrong)
    for change, message in [
        ((2, 4, float("nan")), r"clients \[2\] are not"),
        ((0, 5, float("inf")), r"clients \[0\] are not"),
        ((1, 2, -0.1), "at least 0"),
        ((3, 3, 1.0), "0 from each client to itself"),
        ((0, 1, 1e3), "from n to k as from k to n"),
    ]:
        wrong = divergences.clone()
        row, column, value = change
        wrong[row, column] = value
        with pytest.raises(ValueError, match=message):
            cluster(wrong)


@pytest.mark.parametrize(("number", "most"), [(0, 10), (-1, 10), (None, 0)])
def test_bad_numbers(number: int | None, most: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 cluster; got num_clusters={number}, max_clusters={most}"):
        cluster(torch.zeros(3, 3), number, max_clusters=most)


def test_bad_updates() -> None:
    with pytest.raises(ValueError, match=r"shape \[N, P\].*got \[3\]"):
        cosine_distances(torch.ones(3))
    with pytest.raises(ValueError, match=r"updates; those of clients \[1\]"):
        cosine_distances(torch.tensor([[1.0], [float("nan")]]))
