"""Groups of clients that behave alike, from the divergences between them.

Shapes: N clients, P parameters.
"""

from typing import Any, Final

import torch
from torch import Tensor

_NO_DIFFERENCE: Final = 1e-5
"""Divergences below it, in nats, are rounding of single precision and count as 0."""


def cluster(divergences: Tensor, num_clusters: int | None = None, *, max_clusters: int = 10) -> Tensor:
    r"""Agglomerative clusters of clients, as many as asked for or as their silhouette suggests.

    Distances are :math:`\operatorname{arsinh} \sqrt{R_{nk}}`. For close clients that is the root, a distance where R
    is a squared one, and for far ones a logarithm: the divergence of Gaussians that differ by a factor :math:`e^t`
    in covariance is :math:`M \sinh^2(t / 2)`. By raw divergences, which span orders of magnitude, the client that
    lies farthest out takes a cluster and two real groups are merged to make room. Groups are merged by Ward's
    criterion (Ward 1963), in its Lance-Williams form on these distances. Without a given number, each number from 2 to
    `max_clusters` is tried and that of the largest mean silhouette is taken (Rousseeuw 1987), provided that it is
    above 0. Silhouettes need two clusters, so they do not tell one group from several: ask for 1 to have one.

    Args:
        divergences: symmetric, at least 0, zero diagonal; from `elsa_pl.functional.divergence.symmetric_kl` or
            `cosine_distances`. [N, N]
        num_clusters: how many, at least 1; None chooses. Clients that differ in nothing are never divided, and there
            are no more clusters than clients, so fewer may come back.
        max_clusters: the most that are tried when the number is chosen, at least 1.

    Returns:
        The cluster of each client, numbered from 0 in order of first appearance. One client is one cluster; so are
        clients that are identical up to rounding; two clients are one unless two clusters are asked for, because
        silhouettes need three. [N]

    Raises:
        ValueError: no square matrix, numbers that are not finite, negative, or not symmetric, or a number below 1.

    Source:
        ELSA, arXiv 2601.13824, groups clients by these divergences. Tried on 20 clients in 4 planted groups, 2 of
        them faulty: average linkage finds the groups less often than Ward's, and so do raw divergences.

    Example:
        >>> divergences = torch.tensor([[0.0, 9.0, 1.0], [9.0, 0.0, 9.0], [1.0, 9.0, 0.0]])
        >>> cluster(divergences, 2)
        tensor([0, 1, 0])
        >>> cluster(divergences)
        tensor([0, 1, 0])
    """
    _require_distances(divergences)
    if max_clusters < 1 or (num_clusters is not None and num_clusters < 1):
        raise ValueError(f"expected at least 1 cluster; got num_clusters={num_clusters}, max_clusters={max_clusters}")
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    count = len(divergences)
    differing = torch.where(divergences < _NO_DIFFERENCE, 0, divergences.detach())
    distances = differing.cpu().double().sqrt().asinh().numpy()
    if count == 1 or not distances.any():
        return torch.zeros(count, dtype=torch.long)
    tree = linkage(squareform(distances, checks=False), "ward")

    def cut(number: int) -> Tensor:
        return _by_first_appearance(torch.from_numpy(fcluster(tree, number, "maxclust")))

    if num_clusters is not None:
        return cut(num_clusters)
    candidates = [cut(number) for number in range(2, min(max_clusters, count - 1) + 1)]
    scored = [(_silhouette(distances, labels), labels) for labels in candidates]
    best, labels = max(scored, key=lambda pair: pair[0], default=(0.0, torch.zeros(count, dtype=torch.long)))
    return labels if best > 0 else torch.zeros(count, dtype=torch.long)


def cosine_distances(updates: Tensor, *, centred: bool = False) -> Tensor:
    r"""Distance 1 - cos between the clients' adapter updates: the usual alternative, for comparison.

    .. math:: d_{nk} = 1 - \frac{u_n \cdot u_k}{\lVert u_n \rVert \lVert u_k \rVert}

    Args:
        updates: change of each client's adapters in a round, flattened. A client that changed nothing has no direction:
            its distance to every other one is 1. [N, P]
        centred: take the clients' mean update out first, which leaves what tells them apart. It is what all learn,
            and hides groups that differ in wording but not in labels.

    Returns:
        Symmetric, in [0, 2], zero diagonal. [N, N]

    Raises:
        ValueError: no matrix, or numbers that are not finite.

    Source:
        Sattler et al. 2019, arXiv 1910.01991, who cluster clients by the cosine similarity of their updates.

    Example:
        >>> cosine_distances(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        tensor([[0., 0., 1.],
                [0., 0., 1.],
                [1., 1., 0.]])
    """
    if updates.ndim != 2 or not len(updates):
        raise ValueError(f"expected updates of shape [N, P], a row for each client; got {list(updates.shape)}")
    _require_finite(updates, "updates")
    moved = updates.double()
    directions = torch.nn.functional.normalize(moved - moved.mean(0) if centred else moved, dim=1)
    distances = (1 - directions @ directions.T).clamp_(0, 2)
    return ((distances + distances.T) / 2).fill_diagonal_(0).to(updates.dtype)


def _silhouette(distances: Any, labels: Tensor) -> float:
    from sklearn.metrics import silhouette_score

    if not 2 <= int(labels.max()) + 1 < len(labels):  # identical clients can make fewer clusters than asked for
        return 0.0
    return float(silhouette_score(distances, labels.numpy(), metric="precomputed"))


def _by_first_appearance(labels: Tensor) -> Tensor:
    """Number clusters by the first client in each, so that equal partitions have equal labels."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels.tolist()])


def _require_distances(divergences: Tensor) -> None:
    if divergences.ndim != 2 or divergences.shape[0] != divergences.shape[1] or not len(divergences):
        raise ValueError(f"expected divergences of shape [N, N] for at least one client; got {list(divergences.shape)}")
    _require_finite(divergences, "divergences")
    if (divergences < 0).any() or divergences.diagonal().any():
        raise ValueError("expected divergences of at least 0, and 0 from each client to itself: see `symmetric_kl`")
    if not torch.allclose(divergences, divergences.T):
        raise ValueError("expected the same divergence from n to k as from k to n: average the two directions")


def _require_finite(rows: Tensor, what: str) -> None:
    finite = rows.isfinite().all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"expected finite {what}; those of clients {bad[:8]} are not: leave these clients out")
