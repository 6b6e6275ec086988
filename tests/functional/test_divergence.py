"""All-pairs divergence against the loop over pairs, and where it is exact."""

import time

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from elsa_pl.functional.divergence import symmetric_kl


def draw(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means and well-conditioned covariances of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(count, width, generator=generator, dtype=torch.float64)
    factors = torch.randn(count, width, 2 * width, generator=generator, dtype=torch.float64)
    scales = torch.rand(count, 1, 1, generator=generator, dtype=torch.float64) * 5 + 0.1
    return means, scales * factors @ factors.mT / (2 * width)


def slow_divergences(means: Tensor, covariances: Tensor) -> Tensor:
    """The definition, a pair at a time."""
    gaussians = [MultivariateNormal(mean, covariance) for mean, covariance in zip(means, covariances, strict=True)]
    rows = [[(kl_divergence(p, q) + kl_divergence(q, p)) / 2 for q in gaussians] for p in gaussians]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("count", "width"), [(1, 1), (2, 3), (7, 1), (9, 4), (20, 16)])
@pytest.mark.parametrize("block_size", [1, 4, 2048])
def test_against_the_slow_loop(count: int, width: int, block_size: int) -> None:
    means, covariances = draw(count, width)
    divergences = symmetric_kl(means, covariances, block_size=block_size)
    assert divergences.dtype == torch.float64
    torch.testing.assert_close(divergences, slow_divergences(means, covariances), rtol=1e-9, atol=1e-9)


def test_symmetric_and_at_least_0() -> None:
    for dtype in (torch.float32, torch.float64):
        means, covariances = (part.to(dtype) for part in draw(30, 8))
        divergences = symmetric_kl(means, covariances, block_size=7)
        assert torch.equal(divergences, divergences.T)
        assert torch.equal(divergences.diagonal(), torch.zeros(30, dtype=dtype))
        assert (divergences >= 0).all()


def test_single_precision_is_enough() -> None:
    """Close clients with an ill-conditioned covariance: the untransformed traces would cancel to noise."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -5, 32, dtype=torch.float64)
    noise = torch.randn(40, 32, 32, generator=generator, dtype=torch.float64)
    factors = (torch.eye(32, dtype=torch.float64) + 0.01 * noise) * spectrum.sqrt()[:, None]
    means = 100 + 0.1 * torch.randn(40, 32, generator=generator, dtype=torch.float64) * spectrum.sqrt()
    means, covariances = means.float(), (factors @ factors.mT).float()
    exact = symmetric_kl(means.double(), covariances.double())
    apart = ~torch.eye(40, dtype=torch.bool)
    error = (symmetric_kl(means, covariances).double() - exact).abs()[apart] / exact[apart]
    assert error.max() < 1e-4


def test_one_affine_map_of_all_changes_nothing() -> None:
    means, covariances = draw(8, 5)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    mapped = symmetric_kl(means @ matrix.T + 3, matrix @ covariances @ matrix.T)
    torch.testing.assert_close(mapped, symmetric_kl(means, covariances))


def test_one_client_and_identical_clients() -> None:
    means, covariances = draw(1, 4)
    assert symmetric_kl(means, covariances).tolist() == [[0.0]]
    identical = symmetric_kl(means.expand(5, 4), covariances.expand(5, 4, 4))
    assert identical.max() < 1e-12


def test_inputs_stay() -> None:
    means, covariances = draw(6, 3)
    before = means.clone(), covariances.clone()
    symmetric_kl(means, covariances)
    assert torch.equal(means, before[0])
    assert torch.equal(covariances, before[1])


def test_a_thousand_clients_are_fast() -> None:
    """A loop over the half million pairs takes minutes; the bound leaves room for a busy machine."""
    means, covariances = (part.float() for part in draw(1000, 16))
    start = time.process_time()
    symmetric_kl(means, covariances)
    assert time.process_time() - start < 3


def test_shapes_that_do_not_fit() -> None:
    means, covariances = draw(4, 3)
    for wrong in [(means[0], covariances), (means, covariances[:3]), (means[:, :2], covariances), (means[:0],) * 2]:
        with pytest.raises(ValueError, match=r"means \[N, M\] and covariances \[N, M, M\] of at least one client; got"):
            symmetric_kl(*wrong)
    with pytest.raises(ValueError, match="block_size >= 1; got 0"):
        symmetric_kl(means, covariances, block_size=0)
    with pytest.raises(ValueError, match=r"single or double precision; got torch\.float16"):
        symmetric_kl(means.half(), covariances.half())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad: float) -> None:
    means, covariances = draw(4, 3)
    means[1, 2] = bad
    covariances[3, 0, 0] = bad
    with pytest.raises(ValueError, match=r"clients \[1, 3\] are not: leave these clients out"):
        symmetric_kl(means, covariances)


def test_covariances_without_inverse() -> None:
    means, covariances = draw(4, 3)
    covariances[2] = torch.ones(3, 3)
    covariances[2, 0, 0] = -1
    with pytest.raises(ValueError, match=r"positive definite covariances; that of client 2 .* more probes"):
        symmetric_kl(means, covariances)
