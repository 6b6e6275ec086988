"""Trust views against the slow loops, and what becomes of liars, loners and ties."""

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.trust import UNKNOWN, average, believe, coherence, consistency

LEAST_WEIGHT = 0.05
"""What a client without trust still weighs in a consensus."""


def trust_in(predictions: Tensor) -> Tensor:
    """Trust from one round's predictions alone."""
    return believe(average(None, *consistency(predictions)), UNKNOWN)


def draw(num_clients: int, num_probes: int, num_classes: int, seed: int = 0) -> Tensor:
    """Predictions without any pattern between clients, some of them with little to say."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_clients, num_probes, num_classes, generator=generator)
    return (logits * torch.linspace(0.1, 3, num_clients)[:, None, None]).softmax(-1)


def federation(num_faulty: int, num_clients: int = 12, seed: int = 0) -> Tensor:
    """Predictions of clients that each prefer a class of their own; the last ones have flipped labels."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (60,), generator=generator)
    evidence = 2 * torch.nn.functional.one_hot(truth, 4).float()
    evidence = evidence + torch.randn(num_clients, 60, 4, generator=generator)
    evidence[num_clients - num_faulty :] = evidence[num_clients - num_faulty :].flip(2)
    preferred = 3 * torch.nn.functional.one_hot(torch.arange(num_clients) % 4, 4).float()
    return (evidence + preferred[:, None]).softmax(-1)


def slow_consistency(predictions: Tensor) -> list[float]:
    """One client, one probe and one class at a time."""
    clients, probes, classes = predictions.shape
    logs = predictions.double().log()
    votes = torch.zeros_like(logs)
    spreads = []
    for client in range(clients):
        centred = logs[client] - logs[client].mean(1, keepdim=True)
        for c in range(classes):
            column = centred[:, c] - centred[:, c].mean()
            votes[client, :, c] = column / column.square().mean().sqrt()
        around = predictions[client].double() - predictions[client].double().mean(0)
        spreads.append((sum(float(row @ row) for row in around) / probes) ** 0.5)
    weights = [spread / (spread + 0.03) for spread in spreads]
    trust = [1.0] * clients
    for _ in range(10):
        agreement = []
        for client in range(clients):
            others = [k for k in range(clients) if k != client]
            vote = sum(max(LEAST_WEIGHT, trust[k]) * votes[k] for k in others)
            assert isinstance(vote, Tensor)
            answers = (vote / (vote - vote.mean()).square().mean().sqrt()).softmax(1)
            a, b = ((x - x.mean(0)).flatten() for x in (predictions[client].double(), answers))
            agreement.append(float(a @ b / (a.norm() * b.norm())))
        reached = 0.0
        for client in sorted(range(clients), key=agreement.__getitem__):
            reached += weights[client]
            if reached >= sum(weights) / 2:
                middle = agreement[client]
                break
        if middle <= 0:
            return [weight + (1 - weight) * UNKNOWN for weight in weights]
        trust = [
            weight * min(1.0, max(0.0, value / (UNKNOWN * middle))) + (1 - weight) * UNKNOWN
            for weight, value in zip(weights, agreement, strict=True)
        ]
    return trust


@pytest.mark.parametrize("shape", [(2, 3, 2), (5, 7, 4), (9, 20, 6)])
@pytest.mark.parametrize("seed", range(4))
def test_consistency_against_the_slow_loop(shape: tuple[int, int, int], seed: int) -> None:
    predictions = draw(*shape, seed=seed)
    found = trust_in(predictions)
    torch.testing.assert_close(found, torch.tensor(slow_consistency(predictions)), atol=1e-3, rtol=1e-3)


def test_consistency_against_the_slow_loop_where_clients_agree() -> None:
    predictions = federation(3)
    torch.testing.assert_close(trust_in(predictions), torch.tensor(slow_consistency(predictions)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 500), (7, 40), (12, 4096)])
def test_coherence_against_the_slow_loop(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(shape, generator=generator) + 0.5 * torch.rand(shape[0], 1, generator=generator)
    noise = 1.5 / shape[1] ** 0.5
    resemblance = []
    for client in range(shape[0]):
        cosines = [
            torch.nn.functional.cosine_similarity(updates[client], updates[other], dim=0)
            for other in range(shape[0])
            if other != client
        ]
        resemblance.append(torch.stack(cosines).quantile(0.7).item())
    expected = [min(1.0, max(0.0, (value - noise) / noise)) for value in resemblance]
    scores, evidence = coherence(updates)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    middle = torch.tensor(resemblance).quantile(0.5).item()
    assert evidence.tolist() == pytest.approx([max(0.0, middle - 2 * noise)] * shape[0], abs=1e-5)


@pytest.mark.parametrize("num_faulty", [1, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_flipped_labels_stand_out_among_unlike_clients(num_faulty: int, seed: int) -> None:
    trust = trust_in(federation(num_faulty, seed=seed))
    assert trust[: 12 - num_faulty].min() > 0.7
    assert trust[12 - num_faulty :].max() < 0.3


def test_who_says_nothing_is_neither_believed_nor_accused() -> None:
    predictions = federation(3)
    predictions[4] = predictions[4, :1]
    trust = trust_in(predictions)
    assert trust[4] == pytest.approx(UNKNOWN, abs=1e-3)
    assert trust[9:].max() < 0.3
    assert trust[:9].min() > 0.7


def test_rounds_in_which_a_client_says_little_move_its_trust_little() -> None:
    """One round of clear lies, and one in which the client predicts the same for all probes."""
    clear, vague = federation(1), federation(1)
    vague[-1] = vague[-1].mean(0)
    averages = average(None, *consistency(clear), 0.5)
    for _ in range(3):
        averages = average(averages, *consistency(vague), 0.5)
    assert believe(averages, UNKNOWN)[-1] < 0.1
    assert trust_in(vague)[-1] > 0.7
    averages = average(averages, *consistency(federation(0)), 0.5)
    assert believe(averages, UNKNOWN)[-1] > 0.4, "what it says clearly counts at once"


def test_saying_little_counts_little() -> None:
    """A liar that is hardly sure of anything is accused less than one that is."""
    predictions = federation(1)
    trust = []
    for sureness in (0.01, 0.1, 1.0):
        softened = predictions.clone()
        softened[-1] = predictions[-1] * sureness + predictions[-1].mean(0) * (1 - sureness)
        trust.append(trust_in(softened)[-1].item())
    assert trust == sorted(trust, reverse=True)
    assert trust[0] > 0.6
    assert trust[2] < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_random_and_reversed_updates_stand_out(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(20_000, generator=generator)
    updates = common + 2 * torch.randn(12, 20_000, generator=generator)
    updates[9] = torch.randn(20_000, generator=generator) * updates[0].norm() / 20_000**0.5
    updates[10] *= -3
    updates[11] *= -300
    scores, evidence = coherence(updates)
    assert scores[:9].min() == 1
    assert scores[9:].max() == 0
    trust = believe(average(None, scores, evidence), 1.0)
    assert trust[:9].min() == 1
    assert trust[9:].max() < 0.5


def test_an_honest_minority_that_points_away_from_the_rest_is_trusted() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4096, generator=generator)
    updates = torch.cat([common.expand(7, -1), -common.expand(5, -1)]) + torch.randn(12, 4096, generator=generator)
    scores, evidence = coherence(updates)
    assert scores.tolist() == [1.0] * 12
    assert evidence.min() > 0.1


def test_where_nobody_agrees_there_is_no_evidence() -> None:
    updates = torch.randn(12, 4096, generator=torch.Generator().manual_seed(0))
    scores, evidence = coherence(updates)
    assert evidence.tolist() == [0.0] * 12
    assert believe(average(None, scores, evidence), 1.0).tolist() == [1.0] * 12


def test_random_updates_of_a_small_model_stand_out_after_hashing() -> None:
    """Only 60 of 4096 places are hit, so unrelated updates have cosines far above those of 4096 numbers."""
    generator = torch.Generator().manual_seed(0)
    updates = torch.zeros(10, 4096)
    updates[:, ::70] = torch.randn(59, generator=generator) + 0.3 * torch.randn(10, 59, generator=generator)
    updates[9, ::70] = torch.randn(59, generator=generator)
    scores, _ = coherence(updates)
    assert scores[:9].min() == 1
    assert scores[9] < 0.5


def test_one_client_is_trusted() -> None:
    assert consistency(draw(1, 5, 3))[0].tolist() == [1.0]
    assert coherence(torch.randn(1, 4))[0].tolist() == [1.0]


def test_identical_clients_are_trusted_alike() -> None:
    trust = trust_in(federation(0)[:1].expand(6, -1, -1))
    assert trust.unique().numel() == 1
    assert trust[0] > 0.9
    updates = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(6, -1)
    assert coherence(updates)[0].tolist() == [1.0] * 6


def test_two_opposite_clients_are_trusted() -> None:
    """Neither agrees with the other, and nobody can tell which is wrong."""
    averages = average(None, *coherence(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])))
    assert believe(averages, 1.0).tolist() == [1.0, 1.0]
    assert consistency(federation(1, num_clients=2))[0].tolist() == [1.0, 1.0]


def test_clients_that_changed_nothing() -> None:
    assert coherence(torch.zeros(4, 30))[0].tolist() == [1.0] * 4
    updates = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)) + 2
    updates[2] = 0
    assert coherence(updates)[0].tolist() == [1, 1, 0, 1, 1]
    scores, evidence = consistency(torch.full((4, 5, 3), 1 / 3))
    assert scores.tolist() == [1.0] * 4
    assert evidence.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_certain_predictions_stay_finite() -> None:
    predictions = federation(2).gt(0.5).float()
    predictions = predictions / predictions.sum(-1, keepdim=True).clamp_min(1)
    assert trust_in(predictions).isfinite().all()


def test_averages_of_rounds() -> None:
    before = torch.tensor([[0.2, 0.4]])
    score, evidence = 0.5, 0.1
    rate = 0.75 * evidence / (evidence + 0.03)
    expected = [[0.2 + rate * (score * evidence - 0.2), 0.4 + rate * (evidence - 0.4)]]
    found = average(before, torch.tensor([score]), torch.tensor([evidence]), 0.25)
    torch.testing.assert_close(found, torch.tensor(expected))
    torch.testing.assert_close(average(before, torch.ones(1), torch.zeros(1), 0.0), before)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"0 <= smoothing < 1; got"):
        average(None, torch.ones(2), torch.ones(2), smoothing)


def test_bad_predictions() -> None:
    predictions = draw(4, 5, 3)
    for wrong in (predictions[0], predictions[:0], predictions[:, :0]):
        with pytest.raises(ValueError, match=r"predictions \[N, Q, C\]"):
            consistency(wrong)
    broken = predictions.clone()
    broken[[1, 3], 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"predictions; those of clients \[1, 3\] are not: give these clients trust 0"):
        consistency(broken)
    with pytest.raises(ValueError, match="take the softmax first"):
        consistency(predictions.log())


def test_bad_updates() -> None:
    for updates in (torch.ones(3), torch.ones(0, 2)):
        with pytest.raises(ValueError, match=r"updates \[N, P\]"):
            coherence(updates)
    with pytest.raises(ValueError, match=r"updates; those of clients \[1\]"):
        coherence(torch.tensor([[1.0], [float("inf")]]))
