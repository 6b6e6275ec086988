"""Moments of calibration states against loops, and errors to expect against errors that come."""

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.states import expected_error, linear, moments


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (40, 7)])
def test_moments_against_the_slow_loop(shape: tuple[int, int]) -> None:
    states = draw(*shape, dtype=torch.float32) + 3
    mean, covariance = moments(states)
    count, width = shape
    for i in range(width):
        assert mean[i].item() == pytest.approx(sum(float(row[i]) for row in states) / count)
        for j in range(width):
            products = [(float(row[i]) - mean[i].item()) * (float(row[j]) - mean[j].item()) for row in states]
            assert covariance[i, j].item() == pytest.approx(sum(products) / count, abs=1e-9)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_expected_error_is_that_of_states_with_these_moments(width: int) -> None:
    states, encoder, decoder, bias = draw(50, 5) + 1, draw(5, width, seed=1), draw(width, 5, seed=2), draw(5, seed=3)
    error = states @ encoder @ decoder + bias - states
    found = expected_error(encoder, decoder, bias, *moments(states))
    assert found == pytest.approx((error.square().sum() / states.square().sum()).sqrt().item())


def test_expected_error_of_sending_everything_and_nothing() -> None:
    mean, covariance = moments(draw(50, 4))
    everything = expected_error(torch.eye(4), torch.eye(4), torch.zeros(4), mean, covariance)
    nothing = expected_error(torch.zeros(4, 1), torch.zeros(1, 4), torch.zeros(4), mean, covariance)
    assert everything == 0
    assert nothing == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_linear_computes_in_the_wider_dtype(dtype: torch.dtype) -> None:
    states, matrix = draw(3, 64).to(dtype), draw(64, 5).float()
    found = linear(states, matrix, matrix[0])
    assert found.dtype == dtype
    assert torch.equal(
        found,
        (
            states.to(torch.promote_types(dtype, torch.float32)) @ matrix.to(torch.promote_types(dtype, torch.float32))
            + matrix[0]
        ).to(dtype),
    )


def test_bad_calibration_states() -> None:
    for wrong in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"expected floating-point calibration states \[Q, D\].*flatten batch"):
            moments(wrong)
    with pytest.raises(ValueError, match=r"two or more calibration states; got 1: give more probes"):
        moments(torch.ones(1, 3))
    states = torch.ones(4, 3)
    states[2, 1] = float("nan")
    with pytest.raises(ValueError, match="nan or inf in 1 of 4"):
        moments(states)


def test_bad_states_of_linear() -> None:
    with pytest.raises(ValueError, match=r"expected states of width 3 in the last dimension; got shape \[2, 4\]"):
        linear(torch.ones(2, 4), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"expected states of width 3 .*; got shape \[\]"):
        linear(torch.tensor(1.0), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"floating-point states; got torch.int64: convert them first"):
        linear(torch.ones(2, 3, dtype=torch.long), torch.ones(3, 2))


def test_bad_moments() -> None:
    identity, zeros = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"expected mean \[D\] and covariance \[D, D\]; got \[3\] and \[2, 2\]"):
        expected_error(identity, identity, zeros, zeros, torch.eye(2))
    with pytest.raises(ValueError, match="finite mean and covariance"):
        expected_error(identity, identity, zeros, zeros, identity * float("inf"))
    with pytest.raises(ValueError, match=r"encoder \[3, K\] and decoder \[K, 3\]; got \[3, 2\] and \[3, 3\]"):
        expected_error(identity[:, :2], identity, zeros, zeros, identity)
    with pytest.raises(ValueError, match="not all 0: give other probes"):
        expected_error(identity, identity, zeros, zeros, 0 * identity)
