"""Trust views against the slow loops, and what becomes of liars, loners and ties."""

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from elsa_pl.functional.trust import (
    coherence,
    consistency,
    divergence_consistency,
    jensen_shannon,
    smooth,
    trust_scores,
)

LEAST_WEIGHT = 0.05
"""What a client without trust still weighs in a consensus."""


def draw(num_clients: int, num_probes: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, clusters and trust without any pattern."""
    generator = torch.Generator().manual_seed(seed)
    predictions = (2 * torch.randn(num_clients, num_probes, num_classes, generator=generator)).softmax(-1)
    clusters = torch.randint(0, 3, (num_clients,), generator=generator)
    return predictions, clusters, torch.rand(num_clients, generator=generator)


def federation(num_faulty: int, num_clients: int = 12, seed: int = 0) -> Tensor:
    """Predictions of clients that each prefer a class of their own; the last ones have flipped labels."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (60,), generator=generator)
    evidence = 2 * torch.nn.functional.one_hot(truth, 4).float()
    evidence = evidence + torch.randn(num_clients, 60, 4, generator=generator)
    evidence[num_clients - num_faulty :] = evidence[num_clients - num_faulty :].flip(2)
    preferred = 3 * torch.nn.functional.one_hot(torch.arange(num_clients) % 4, 4).float()
    return (evidence + preferred[:, None]).softmax(-1)


def slow_consensus(values: Tensor, clusters: Tensor, trust: Tensor, client: int) -> Tensor:
    """Mean over the others by trust; those of the same cluster count twice."""
    total, mean = 0.0, torch.zeros_like(values[0], dtype=torch.float64)
    for k in range(len(values)):
        if k != client:
            weight = max(LEAST_WEIGHT, float(trust[k])) * (2 if clusters[k] == clusters[client] else 1)
            total += weight
            mean += weight * values[k].double()
    return mean / total


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 3), (6,)])
def test_jensen_shannon_against_scipy(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = ((3 * torch.randn(shape, generator=generator)).softmax(-1) for _ in range(2))
    expected = torch.tensor(jensenshannon(p.double().numpy(), q.double().numpy(), axis=-1) ** 2)
    torch.testing.assert_close(jensen_shannon(p, q).double(), expected.double(), atol=1e-6, rtol=1e-5)


def test_jensen_shannon_at_its_limits() -> None:
    p = torch.tensor([1.0, 0.0, 0.0])
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(p, torch.tensor([0.0, 0.5, 0.5])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("shape", [(2, 3, 2), (5, 7, 4), (9, 20, 6)])
def test_consistency_against_the_slow_loop(shape: tuple[int, int, int]) -> None:
    predictions, clusters, trust = draw(*shape)
    logs = predictions.double().log()
    votes = torch.zeros_like(logs)
    for client in range(shape[0]):
        centred = logs[client] - logs[client].mean(1, keepdim=True)
        for c in range(shape[2]):
            column = centred[:, c] - centred[:, c].mean()
            votes[client, :, c] = column / column.square().mean().sqrt()
    expected = []
    for client in range(shape[0]):
        vote = slow_consensus(votes, clusters, trust, client)
        answers = (vote / (vote - vote.mean()).square().mean().sqrt()).softmax(1)
        a, b = ((x - x.mean(0)).flatten() for x in (predictions[client].double(), answers))
        expected.append((a @ b / (a.norm() * b.norm())).item())
    found = consistency(predictions, clusters, trust)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 2), (5, 7, 4), (9, 20, 6)])
def test_divergence_consistency_against_the_slow_loop(shape: tuple[int, int, int]) -> None:
    predictions, clusters, trust = draw(*shape)
    expected = []
    for client in range(shape[0]):
        consensus = slow_consensus(predictions, clusters, trust, client)
        divergences = [
            jensen_shannon(p.double(), m).item() for p, m in zip(predictions[client], consensus, strict=True)
        ]
        expected.append(1 - sum(divergences) / len(divergences) / math.log(2))
    found = divergence_consistency(predictions, clusters, trust)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3), (6, 40), (11, 5)])
def test_coherence_against_the_slow_loop(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    updates, trust = torch.randn(shape, generator=generator), torch.rand(shape[0], generator=generator)
    expected = []
    for client in range(shape[0]):
        mean = torch.zeros(shape[1])
        for other in set(range(shape[0])) - {client}:
            mean += max(LEAST_WEIGHT, float(trust[other])) * updates[other] / updates[other].norm()
        expected.append(torch.nn.functional.cosine_similarity(updates[client], mean, dim=0).item())
    torch.testing.assert_close(coherence(updates, trust), torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_labels_stand_out_among_unlike_clients(seed: int) -> None:
    predictions = federation(3, seed=seed)
    scores = trust_scores(consistency(predictions, torch.zeros(12), torch.ones(12)))
    assert scores[:9].min() > 0.7
    assert scores[9:].max() < 0.1


def test_liars_in_a_cluster_of_their_own_do_not_vouch_for_each_other() -> None:
    predictions = federation(3)
    clusters = torch.tensor([0] * 9 + [1] * 3)
    trust = torch.ones(12)
    for _ in range(3):
        trust = trust_scores(consistency(predictions, clusters, trust))
    assert trust[:9].min() > 0.7
    assert trust[9:].max() < 0.3


def test_random_and_reversed_updates_stand_out() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(20_000, generator=generator)
    updates = common + 2 * torch.randn(12, 20_000, generator=generator)
    updates[9] = torch.randn(20_000, generator=generator) * updates[0].norm() / 20_000**0.5
    updates[10] *= -3
    updates[11] *= -300
    scores = trust_scores(coherence(updates, torch.ones(12)))
    assert scores[:9].min() == 1
    assert scores[9] < 0.2
    assert scores[10:].max() == 0


def test_one_client_is_trusted() -> None:
    predictions, clusters, trust = draw(1, 5, 3)
    for view in (
        consistency(predictions, clusters, trust),
        divergence_consistency(predictions, clusters, trust),
        coherence(torch.randn(1, 4), trust),
    ):
        assert trust_scores(view).tolist() == [1.0]


def test_identical_clients_are_trusted_alike() -> None:
    predictions = federation(0)[:1].expand(6, -1, -1)
    clusters, trust = torch.zeros(6), torch.ones(6)
    updates = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(6, -1)
    for view in (
        consistency(predictions, clusters, trust),
        divergence_consistency(predictions, clusters, trust),
        coherence(updates, trust),
    ):
        assert trust_scores(view).tolist() == [1.0] * 6


def test_two_opposite_clients_are_trusted_alike() -> None:
    """Neither agrees with the other, and nobody can tell which is wrong."""
    updates = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    view = coherence(updates, torch.ones(2))
    torch.testing.assert_close(view, torch.tensor([-1.0, -1.0]))
    assert trust_scores(view).tolist() == [1.0, 1.0]
    predictions = federation(1, num_clients=2)
    assert trust_scores(consistency(predictions, torch.zeros(2), torch.ones(2))).tolist() == [1.0, 1.0]


def test_a_client_that_says_nothing() -> None:
    predictions = federation(0)
    predictions[4] = predictions[4, :1]
    assert consistency(predictions, torch.zeros(12), torch.ones(12))[4].abs() < 1e-6
    updates = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) + 2
    updates[2] = 0
    view = coherence(updates, torch.ones(5))
    assert view[2] == 0
    assert trust_scores(view)[2] == 0


def test_no_clusters_count_all_alike() -> None:
    predictions, _, trust = draw(6, 8, 3)
    for view in (consistency, divergence_consistency):
        torch.testing.assert_close(view(predictions, None, trust), view(predictions, torch.zeros(6), trust))


def test_nobody_trusted_before() -> None:
    predictions, clusters, _ = draw(6, 8, 3)
    for view in (consistency, divergence_consistency):
        torch.testing.assert_close(
            view(predictions, clusters, torch.zeros(6)), view(predictions, clusters, torch.full((6,), 0.01))
        )


def test_certain_predictions_stay_finite() -> None:
    predictions = federation(2).gt(0.5).float()
    predictions = predictions / predictions.sum(-1, keepdim=True).clamp_min(1)
    assert consistency(predictions, torch.zeros(12), torch.ones(12)).isfinite().all()
    assert divergence_consistency(predictions, torch.zeros(12), torch.ones(12)).isfinite().all()


def test_the_less_favourable_view_counts() -> None:
    first, second = torch.tensor([0.4, 0.4, 0.1, 0.4]), torch.tensor([0.8, -0.5, 0.8, 0.8])
    assert trust_scores(first, second).tolist() == pytest.approx([1, 0, 0.1 / (0.5 * 0.4), 1])
    assert torch.equal(trust_scores(first, second), torch.minimum(trust_scores(first), trust_scores(second)))


def test_a_view_without_agreement_says_nothing() -> None:
    assert trust_scores(torch.tensor([-0.2, 0.0, 0.0, 0.9])).tolist() == [1.0] * 4


def test_smoothing() -> None:
    trust = None
    for score, expected in [(1.0, 1.0), (0.0, 0.75), (0.0, 0.5625), (1.0, 0.671875)]:
        trust = smooth(trust, score, 0.75)
        assert trust == expected
    assert smooth(0.3, 0.9, 0.0) == 0.9


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"0 <= smoothing < 1; got"):
        smooth(0.5, 0.5, smoothing)


@pytest.mark.parametrize("view", [consistency, divergence_consistency])
def test_bad_predictions(view: object) -> None:
    assert callable(view)
    predictions, clusters, trust = draw(4, 5, 3)
    for wrong in (
        (predictions[0], clusters, trust),
        (predictions, clusters[:3], trust),
        (predictions, clusters, trust[:3]),
        (predictions[:0], clusters[:0], trust[:0]),
        (predictions[:, :0], clusters, trust),
    ):
        with pytest.raises(ValueError, match=r"predictions \[N, Q, C\], clusters \[N\] and trust \[N\]"):
            view(*wrong)
    broken = predictions.clone()
    broken[[1, 3], 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"predictions; those of clients \[1, 3\] are not: give these clients trust 0"):
        view(broken, clusters, trust)
    with pytest.raises(ValueError, match="take the softmax first"):
        view(predictions.log(), clusters, trust)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"trust in \[0, 1\]"):
            view(predictions, clusters, torch.full((4,), bad))


def test_bad_updates() -> None:
    for updates, trust in [(torch.ones(3), torch.ones(3)), (torch.ones(3, 2), torch.ones(2)), (torch.ones(0, 2),) * 2]:
        with pytest.raises(ValueError, match=r"updates \[N, P\] and trust \[N\]"):
            coherence(updates, trust)
    with pytest.raises(ValueError, match=r"updates; those of clients \[1\]"):
        coherence(torch.tensor([[1.0], [float("inf")]]), torch.ones(2))
    with pytest.raises(ValueError, match=r"trust in \[0, 1\]"):
        coherence(torch.ones(2, 2), torch.tensor([0.5, 2.0]))


def test_bad_views() -> None:
    for views in [(), (torch.ones(2, 2),), (torch.ones(3), torch.ones(2)), (torch.ones(0),)]:
        with pytest.raises(ValueError, match=r"one or more views of shape \[N\]"):
            trust_scores(*views)
    with pytest.raises(ValueError, match=r"scores; those of clients \[0\]"):
        trust_scores(torch.tensor([float("nan"), 1.0]))
