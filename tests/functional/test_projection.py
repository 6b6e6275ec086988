"""Projections against loops and eigenvalues, and the two modules that train."""

import math

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.projection import decode, encode, principal_projection
from elsa_pl.functional.states import expected_error, moments

WIDTHS = [1, 2, 5, 9]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(count: int = 60, width: int = 9, seed: int = 0) -> Tensor:
    strengths = 1 / torch.arange(1, width + 1, dtype=torch.float64)
    return draw(count, width, seed=seed) * strengths @ draw(width, width, seed=100) + draw(width, seed=101)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9)])
def test_against_the_slow_loop(width: int, shape: tuple[int, ...]) -> None:
    mean, components = principal_projection(correlated(), width)
    states = draw(*shape)
    codes = encode(states, mean, components)
    decoded = decode(codes, mean, components)
    assert codes.shape == (*shape[:-1], width)
    assert decoded.shape == shape
    for state, sent, received in zip(states.view(-1, 9), codes.view(-1, width), decoded.view(-1, 9), strict=True):
        coordinates = [sum(float((state[i] - mean[i]) * components[i, k]) for i in range(9)) for k in range(width)]
        assert sent.tolist() == pytest.approx(coordinates, abs=1e-9)
        expected = [
            float(mean[i]) + sum(coordinates[k] * float(components[i, k]) for k in range(width)) for i in range(9)
        ]
        assert received.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_lost_are_the_smallest_eigenvalues(width: int) -> None:
    states = correlated()
    mean, components = principal_projection(states, width)
    lost = (decode(encode(states, mean, components), mean, components) - states).square().sum(1).mean()
    _, covariance = moments(states)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    torch.testing.assert_close(lost, eigenvalues[: 9 - width].sum())
    bias = mean - mean @ components @ components.T
    error = expected_error(components, components.T, bias, mean, covariance)
    assert error == pytest.approx(math.sqrt(lost / states.square().sum(1).mean()), abs=1e-6)


def test_no_other_directions_lose_less() -> None:
    states = correlated()
    mean, components = principal_projection(states, 3)
    least = (decode(encode(states, mean, components), mean, components) - states).norm()
    for seed in range(20):
        other = torch.linalg.qr(components + 0.1 * draw(9, 3, seed=seed))[0]
        assert (decode(encode(states, mean, other), mean, other) - states).norm() > least


def test_components_are_orthonormal_and_the_same_every_time() -> None:
    states = correlated()
    mean, components = principal_projection(states, 5)
    torch.testing.assert_close(components.T @ components, torch.eye(5).double())
    again = principal_projection(states.flip(0), 5)
    torch.testing.assert_close(again[1], components)
    torch.testing.assert_close(again[0], mean)


def test_all_directions_lose_nothing() -> None:
    states = correlated()
    mean, components = principal_projection(states, 9)
    other = draw(5, 9, seed=7)
    torch.testing.assert_close(decode(encode(other, mean, components), mean, components), other)


def test_gradients_are_exact() -> None:
    mean, components = (given.clone().requires_grad_() for given in principal_projection(correlated(), 4))
    states, codes = draw(3, 9).requires_grad_(), draw(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(encode, (states, mean, components))
    assert torch.autograd.gradcheck(decode, (codes, mean, components))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    states = correlated()
    mean, components = principal_projection(states.float(), 4)
    codes = encode(states.to(dtype), mean, components)
    decoded = decode(codes, mean, components)
    assert (codes.dtype, decoded.dtype) == (dtype, dtype)
    exact = decode(encode(states, mean.double(), components.double()), mean.double(), components.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (decoded.double() - exact).norm() / exact.norm() < tolerance


def test_bad_calibration() -> None:
    for width in (0, 10):
        with pytest.raises(ValueError, match=rf"1 <= width <= 9, the states' width; got {width}"):
            principal_projection(correlated(), width)
    with pytest.raises(ValueError, match="more probes than directions"):
        principal_projection(correlated(5), 5)
    with pytest.raises(ValueError, match="vary in at least width=4 directions; got 2"):
        principal_projection(correlated()[:, :2] @ draw(2, 9), 4)
    with pytest.raises(ValueError, match=r"calibration states \[Q, D\], a row for each token"):
        principal_projection(draw(2, 3, 9), 4)
    states = correlated()
    states[3, 3] = math.inf
    with pytest.raises(ValueError, match="finite calibration states; got nan or inf in 1 of 60"):
        principal_projection(states, 4)


def test_bad_states() -> None:
    mean, components = principal_projection(correlated(), 4)
    with pytest.raises(ValueError, match=r"states of width 9 .*; got shape \[2, 8\]"):
        encode(torch.ones(2, 8), mean, components)
    with pytest.raises(ValueError, match=r"width 4 .*; got shape \[2, 9\]"):
        decode(torch.ones(2, 9), mean, components)
    with pytest.raises(ValueError, match=r"got torch.int64: convert them first"):
        encode(torch.ones(2, 9, dtype=torch.long), mean, components)
