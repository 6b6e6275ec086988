"""Projection and shrinkage of probe representations."""

import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from elsa_pl.functional.divergence import symmetric_kl
from elsa_pl.functional.fingerprints import behaviour_change, fingerprint, principal_directions


def draw(num_probes: int, num_hidden: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.1, num_hidden)
    return torch.randn(num_probes, num_hidden, generator=generator) * scales + 5


@pytest.mark.parametrize(("num_probes", "num_hidden", "width"), [(5, 3, 1), (40, 12, 4), (40, 12, 12), (20, 64, 19)])
def test_directions_are_the_leading_eigenvectors(num_probes: int, num_hidden: int, width: int) -> None:
    states = draw(num_probes, num_hidden)
    directions = principal_directions(states, width)
    assert directions.shape == (num_hidden, width)
    assert directions.dtype == torch.float32
    torch.testing.assert_close(directions.T @ directions, torch.eye(width), atol=1e-5, rtol=0)
    strengths, vectors = torch.linalg.eigh(torch.cov(states.double().T))
    assert strengths[-1] > 0
    expected = vectors[:, -width:].flip(1).float()
    torch.testing.assert_close((directions * expected).sum(0).abs(), torch.ones(width), atol=1e-4, rtol=0)


def test_signs_are_decided() -> None:
    states = draw(30, 8)
    directions = principal_directions(states, 5)
    assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(principal_directions(-states, 5), directions, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_probes", "num_hidden", "width"), [(4, 3, 2), (40, 12, 4), (20, 64, 16)])
def test_fingerprint_against_scikit_learn(num_probes: int, num_hidden: int, width: int) -> None:
    states = draw(num_probes, num_hidden)
    directions = principal_directions(states, width)
    mean, covariance = fingerprint(states, directions)
    projected = torch.stack([directions.double().T @ state.double() for state in states])
    expected = LedoitWolf().fit(projected.numpy())
    assert mean.dtype == covariance.dtype == torch.float64
    torch.testing.assert_close(mean, torch.from_numpy(expected.location_))
    torch.testing.assert_close(covariance, torch.from_numpy(expected.covariance_))


def test_covariance_near_the_limit_of_probes_has_an_inverse() -> None:
    """The sample covariance of 17 probes in 16 directions is all but singular; the shrunk one is not."""
    states = draw(17, 16)
    _, covariance = fingerprint(states, principal_directions(states, 16))
    strengths = torch.linalg.eigvalsh(covariance)
    sample = torch.linalg.eigvalsh(torch.cov(states.double().T))
    assert strengths[-1] / strengths[0] < 0.1 * sample[-1] / sample[0]


def test_clients_that_behave_differently_lie_apart() -> None:
    base = draw(128, 48)
    directions = principal_directions(base, 16)
    alike = [base + 0.01 * draw(128, 48, seed) for seed in (1, 2)]
    other = base + 2 * draw(128, 48, 3)
    prints = [fingerprint(states, directions) for states in [*alike, other]]
    divergences = symmetric_kl(*(torch.stack(parts) for parts in zip(*prints, strict=True)))
    assert divergences[0, 2] > 100 * divergences[0, 1] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite(bad: float) -> None:
    states = draw(20, 6)
    directions = principal_directions(states, 3)
    states[[2, 7], 1] = bad
    for call in (lambda: principal_directions(states, 3), lambda: fingerprint(states, directions)):
        with pytest.raises(ValueError, match="nan or inf for 2 of 20 probes"):
            call()


def test_too_few_probes() -> None:
    directions = principal_directions(draw(20, 6), 4)
    with pytest.raises(ValueError, match="at least 5; got 4: give more probes or lower the width"):
        fingerprint(draw(4, 6), directions)
    with pytest.raises(ValueError, match="at least 5; got 4: give more probes or lower the width"):
        principal_directions(draw(4, 6), 4)
    assert fingerprint(draw(5, 6), directions)[0].shape == (4,)


@pytest.mark.parametrize("width", [0, 7])
def test_width_out_of_range(width: int) -> None:
    with pytest.raises(ValueError, match=f"1 <= width <= 6, the states' width; got {width}"):
        principal_directions(draw(20, 6), width)


def test_states_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\[Q, D\].*got torch.float32 \[20\]"):
        principal_directions(draw(20, 6)[:, 0], 2)
    with pytest.raises(ValueError, match=r"got torch.int64 \[20, 6\]"):
        fingerprint(draw(20, 6).long(), torch.eye(6))
    with pytest.raises(ValueError, match=r"directions of shape \[6, M\].*got \[5, 2\]"):
        fingerprint(draw(20, 6), torch.ones(5, 2))


def test_probes_that_do_not_vary() -> None:
    same = torch.ones(20, 6)
    with pytest.raises(ValueError, match="the same for every probe: give other probes"):
        fingerprint(same, torch.eye(6))
    with pytest.raises(ValueError, match="at least width=3 directions; got 1: give more varied probes"):
        principal_directions(torch.arange(20.0)[:, None] * torch.ones(6), 3)


def draw_predictions(num_probes: int, num_classes: int, seed: int = 0) -> Tensor:
    return torch.randn(num_probes, num_classes, generator=torch.Generator().manual_seed(seed)).softmax(1)


@pytest.mark.parametrize(("num_classes", "num_contrasts"), [(2, 1), (6, 5), (33, 32), (77, 32)])
def test_change_of_behaviour(num_classes: int, num_contrasts: int) -> None:
    base, states = draw(60, 12), draw(60, 12, seed=1)
    before, after = draw_predictions(60, num_classes), draw_predictions(60, num_classes, seed=1)
    directions = principal_directions(base, 4)
    change = behaviour_change(states, after, base, before, directions)
    assert change.shape == (60, num_contrasts + 4)
    spread = (base @ directions).std(0, correction=0).square().mean().sqrt()
    torch.testing.assert_close(change[:, num_contrasts:], (states - base) @ directions / spread, rtol=1e-4, atol=1e-4)
    if num_contrasts == num_classes - 1:  # all contrasts keep every difference between classes
        ratios = (after / before).log()
        lengths = (ratios - ratios.mean(1, keepdim=True)).norm(dim=1)
        torch.testing.assert_close(change[:, :num_contrasts].norm(dim=1), lengths, rtol=1e-4, atol=1e-4)
    assert torch.equal(change, behaviour_change(states, after, base, before, directions))


def test_no_change_of_behaviour() -> None:
    base, before = draw(60, 12), draw_predictions(60, 5)
    change = behaviour_change(base, before, base, before, principal_directions(base, 4))
    assert not change.any()


def test_change_that_all_classes_share_does_not_count() -> None:
    """Probabilities that do not sum to one, as a head with a missing class would give, differ by a constant factor."""
    base, before = draw(60, 12), draw_predictions(60, 5)
    change = behaviour_change(base, 0.5 * before, base, before, principal_directions(base, 4))
    assert change.abs().max() < 1e-5


def test_certain_predictions_stay_finite() -> None:
    base, before = draw(60, 12), draw_predictions(60, 5)
    certain = torch.nn.functional.one_hot(before.argmax(1), 5).float()
    assert behaviour_change(base, certain, base, before, principal_directions(base, 4)).isfinite().all()


def test_change_between_things_that_do_not_fit() -> None:
    base, before = draw(60, 12), draw_predictions(60, 5)
    directions = principal_directions(base, 4)
    for found, base_found in [((base[:50], before[:50]), (base, before)), ((base, before), (base, before[:, :4]))]:
        with pytest.raises(ValueError, match="evaluate both on one probe set"):
            behaviour_change(*found, *base_found, directions)
    with pytest.raises(ValueError, match="predictions of the same probes"):
        behaviour_change(base, before[:50], base, before[:50], directions)
    with pytest.raises(ValueError, match=r"directions of shape \[12, M\].*got \[5, 2\]"):
        behaviour_change(base, before, base, before, torch.ones(5, 2))
    with pytest.raises(ValueError, match="two or more classes and max_contrasts >= 1; got 1 and 32"):
        behaviour_change(base, before[:, :1], base, before[:, :1], directions)
    with pytest.raises(ValueError, match="got 5 and 0"):
        behaviour_change(base, before, base, before, directions, max_contrasts=0)
    with pytest.raises(ValueError, match="take the softmax first"):
        behaviour_change(base, before.log(), base, before, directions)
    with pytest.raises(ValueError, match="nan or inf for 60 of 60 probes"):
        behaviour_change(base, before, base, before * float("nan"), directions)
    with pytest.raises(ValueError, match="the same for every probe: give other probes"):
        behaviour_change(base, before, torch.ones(60, 12), before, directions)


def test_fingerprint_of_features_as_they_are() -> None:
    features = draw(40, 6)
    taken, projected = fingerprint(features), fingerprint(features, torch.eye(6))
    assert all(torch.equal(a, b) for a, b in zip(taken, projected, strict=True))
    with pytest.raises(ValueError, match="at least 7; got 6"):
        fingerprint(features[:6])


def test_a_floor_gives_unchanged_models_a_fingerprint() -> None:
    mean, covariance = fingerprint(torch.zeros(8, 3), floor=1e-6)
    assert not mean.any()
    torch.testing.assert_close(covariance, 1e-6 * torch.eye(3, dtype=torch.float64))
    states = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with_floor, without = (fingerprint(states, floor=floor)[1] for floor in (0.5, 0.0))
    torch.testing.assert_close(with_floor - without, 0.5 * torch.eye(3, dtype=torch.float64))
