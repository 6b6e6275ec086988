"""Divergence between all pairs of fingerprints, as matrix products.

A loop over pairs of clients does N^2 small inversions and traces: a thousand clients take minutes. Written as one
product of flattened precisions with flattened covariances, they take under a second.

Shapes: N clients, M projected width.
"""

import torch
from torch import Tensor

_CLIENTS_AT_ONCE = 512
"""Precisions are computed for so many clients at a time, in double precision."""


def symmetric_kl(means: Tensor, covariances: Tensor, *, block_size: int = 2048) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence between all pairs of Gaussians.

    .. math::
        R_{nk} = \tfrac12\bigl(\mathrm{KL}(n\|k) + \mathrm{KL}(k\|n)\bigr) = \tfrac14 \bigl[
            \operatorname{tr}(\Sigma_k^{-1}\Sigma_n) + \operatorname{tr}(\Sigma_n^{-1}\Sigma_k) - 2M
            + (\mu_n - \mu_k)^T (\Sigma_n^{-1} + \Sigma_k^{-1}) (\mu_n - \mu_k) \bigr]

    The log-determinants of the two directions cancel. R does not change when all Gaussians go through one affine
    map, so the mean of all is first mapped to zero mean and identity covariance. Then covariances and precisions are
    :math:`I + A_n` and :math:`I + B_n` with small A and B, only :math:`\operatorname{tr}(A B)` needs a product, and
    single precision is enough where the untransformed traces would cancel to noise.

    Args:
        means: one row per client, single or double precision. [N, M]
        covariances: symmetric and positive definite. [N, M, M]
        block_size: rows and columns of the result computed at a time, which bounds the memory beyond the result and
            the flattened matrices.

    Returns:
        Divergences in nats: symmetric, at least 0, zero diagonal, in the dtype of `means`. [N, N]

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, or a covariance that is not positive definite.

    Source:
        Closed form of the divergence of Gaussians: Kullback 1959, chapter 9. ELSA, arXiv 2601.13824, uses it on
        fingerprints.

    Example:
        >>> means = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> symmetric_kl(means, torch.eye(2).expand(2, 2, 2))
        tensor([[0., 2.],
                [2., 0.]])
    """
    _require_gaussians(means, covariances)
    if block_size < 1:
        raise ValueError(f"expected block_size >= 1; got {block_size}")
    left, right, row_terms, column_terms = _flatten(means, covariances)
    count = len(means)
    divergences = means.new_empty(count, count)
    starts = range(0, count, block_size)

    def one_sided(rows: slice, columns: slice) -> Tensor:
        """tr(P_n S_k) + (m_n - m_k)^T P_n (m_n - m_k) - M, with n a row and k a column."""
        return (left[rows] @ right[columns].T).add_(row_terms[rows, None]).add_(column_terms[columns])

    for start in starts:
        rows = slice(start, start + block_size)
        for other in starts[start // block_size :]:
            columns = slice(other, other + block_size)
            block = one_sided(rows, columns)
            block.add_(one_sided(columns, rows).T if other != start else block.T.clone())
            block.mul_(0.25).clamp_(min=0)
            divergences[rows, columns] = block
            divergences[columns, rows] = block.T
    return divergences.fill_diagonal_(0)


def _flatten(means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Features whose inner products are the one-sided terms of `symmetric_kl`.

    With precision P_n = I + B_n, covariance S_k = I + A_k, and <X, Y> = tr(XY):
    ``tr(P_n S_k) + (m_n - m_k)^T P_n (m_n - m_k) - M``
    ``= <B_n, A_k + m_k m_k^T> - 2 (P_n m_n)^T m_k  +  tr(B_n) + m_n^T P_n m_n  +  tr(A_k) + m_k^T m_k``.
    Symmetric matrices are flattened to their upper triangle, entries off the diagonal times sqrt(2).
    """
    count, width = means.shape
    upper, lower = torch.triu_indices(width, width, device=means.device)
    scale = (1 + (upper != lower).double()).sqrt()
    identity = torch.eye(width, dtype=torch.float64, device=means.device)
    blocks = [slice(start, start + _CLIENTS_AT_ONCE) for start in range(0, count, _CLIENTS_AT_ONCE)]
    centre = means.double().mean(0)
    pooled = sum((covariances[block].double().sum(0) for block in blocks), torch.zeros_like(identity)) / count
    root = _cholesky(pooled[None], 0)[0]
    left, right = (means.new_empty(count, len(upper) + width) for _ in range(2))
    row_terms, column_terms = means.new_empty(count), means.new_empty(count)
    for block in blocks:
        mean = torch.linalg.solve_triangular(root, (means[block].double() - centre).T, upper=False).T
        half = torch.linalg.solve_triangular(root, covariances[block].double(), upper=False)
        excess = torch.linalg.solve_triangular(root, half.mT, upper=False) - identity
        precision = torch.cholesky_inverse(_cholesky(identity + excess, block.start))
        shortfall = precision - identity
        mapped = torch.einsum("nij,nj->ni", precision, mean)
        second = excess + mean[:, :, None] * mean[:, None, :]
        left[block] = torch.cat([shortfall[:, upper, lower] * scale, -2 * mapped], 1).to(left.dtype)
        right[block] = torch.cat([second[:, upper, lower] * scale, mean], 1).to(right.dtype)
        row_terms[block] = (shortfall.diagonal(dim1=1, dim2=2).sum(1) + (mapped * mean).sum(1)).to(left.dtype)
        column_terms[block] = second.diagonal(dim1=1, dim2=2).sum(1).to(left.dtype)
    return left, right, row_terms, column_terms


def _cholesky(matrices: Tensor, first: int) -> Tensor:
    factors: Tensor
    factors, info = torch.linalg.cholesky_ex(matrices)
    if info.any():
        bad = [first + index for index in torch.nonzero(info).flatten().tolist()]
        raise ValueError(
            f"expected positive definite covariances; that of client {bad[0]} is not ({len(bad)} in its block): "
            "shrink them, as `fingerprint` does, or give more probes"
        )
    return factors


def _require_gaussians(means: Tensor, covariances: Tensor) -> None:
    if means.ndim != 2 or not len(means) or covariances.shape != (*means.shape, means.shape[-1]):
        raise ValueError(
            "expected means [N, M] and covariances [N, M, M] of at least one client; got "
            f"{list(means.shape)} and {list(covariances.shape)}"
        )
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"expected means in single or double precision; got {means.dtype}: convert them")
    finite = means.isfinite().all(1) & covariances.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"expected finite fingerprints; those of clients {bad[:8]} are not: leave these clients out")
