"""Means of adapters, by global layer name, and robust stand-ins for the mean.

Because a name says where a tensor stands in the *uncut* model, clients that were cut differently still average layer
by layer: what is a front layer for one may be a middle layer for another.

Most merge the factors A and B of LoRA element by element, each for itself: the mean of products B A is not the
product of the means (arXiv 2410.09432), and the same holds for medians and trimmed means. `exact` averages the
products, and `krum` returns one sender's factors, which do belong together.

The robust functions guard against senders that lie. A weight is partly the sender's own claim (its number of
examples), so it decides only *whether* a sender counts: those with weight 0 are left out, all others count alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from elsa_pl.functional.factors import factor_pairs, refactored, with_fresh_directions
from elsa_pl.functional.seeding import derive_seed

Adapters = Mapping[str, Tensor]
Aggregator = Callable[[Sequence[Adapters], Sequence[float]], dict[str, Tensor]]


def weighted_mean(adapters: Sequence[Adapters], weights: Sequence[float]) -> dict[str, Tensor]:
    r"""Average adapters name by name: :math:`\sum_n w_n a_n / \sum_n w_n`.

    The sums run in double precision, so that a mean of means differs from the flat mean by rounding to the tensors'
    own precision only.

    Args:
        adapters: one mapping per sender, all with the same names and shapes.
        weights: one non-negative weight per sender, not all zero.

    Returns:
        The mean, in the tensors' own dtype.

    Raises:
        ValueError: no adapters, different names, or weights that are negative, not finite or all zero.

    Source:
        McMahan et al. 2017, arXiv 1602.05629, Algorithm 1 (with adapters in place of the model); ELSA, arXiv
        2601.13824, applies it at the edges and then at the cloud.

    Example:
        >>> mean = weighted_mean([{"a": torch.zeros(2)}, {"a": torch.ones(2)}], [1, 3])
        >>> mean["a"]
        tensor([0.7500, 0.7500])
    """
    _require_alike(adapters, weights)
    total = float(sum(weights))
    mean = {}
    for name, first in adapters[0].items():
        summed = torch.zeros_like(first, dtype=torch.float64)
        for sent, weight in zip(adapters, weights, strict=True):
            summed += sent[name].double() * weight
        mean[name] = (summed / total).to(first.dtype)
    return mean


def exact(adapters: Sequence[Adapters], weights: Sequence[float], rank: int | None = None) -> dict[str, Tensor]:
    r"""Average what the adapters do: the product of each LoRA layer's factors, and all else as `weighted_mean`.

    .. math::
        B A \approx \sum_n w_n B_n A_n / \sum_n w_n

    Means of the factors, each for itself, have the products :math:`B_n A_k` of all pairs of senders in them instead.
    The mean is of rank K, the sum of the senders' ranks: with their factors side by side, :math:`B = [w_n B_n]` and
    :math:`A = [A_n]`, it is exact. With a ``rank`` it is the best approximation of that rank, see
    `elsa_pl.functional.factors.refactored`; nothing is lost where K <= ``rank``, or where the senders' factors span the
    same ``rank`` directions. Whoever merges a mean again gives no rank, so that this is lost once only.

    Senders may have unlike ranks, as long as their products are scaled alike.

    Args:
        adapters: one mapping per sender, all with the same names.
        weights: one non-negative weight per sender, not all zero.
        rank: of the mean; None: what it takes to lose nothing, K or the smaller side of the layer.

    Returns:
        The mean, in the tensors' own dtype, of ``rank`` exactly if that is given: directions that the mean does not
        have add nothing, but can be trained.

    Raises:
        ValueError: as `weighted_mean`; numbers that are not finite; factors without each other or that do not fit.

    Source:
        Singhal et al. 2024, arXiv 2410.09432, keeps what the mean of factors misses in the frozen weights; FlexLoRA,
        Bai et al. 2024, arXiv 2402.11505, decomposes the mean product, as here.

    Example:
        >>> one = {"a.lora_A.weight": torch.tensor([[1.0, 0.0]]), "a.lora_B.weight": torch.tensor([[2.0]])}
        >>> two = {"a.lora_A.weight": torch.tensor([[0.0, 1.0]]), "a.lora_B.weight": torch.tensor([[6.0]])}
        >>> mean = exact([one, two], [1, 1])
        >>> mean["a.lora_B.weight"] @ mean["a.lora_A.weight"]
        tensor([[1., 3.]])
        >>> mean = exact([one, two], [1, 1], rank=1)
        >>> (mean["a.lora_B.weight"] @ mean["a.lora_A.weight"]).round(decimals=4)
        tensor([[1., 3.]])
    """
    counted = _counted(adapters, weights)
    shares = [weight / sum(weights) for weight in weights if weight > 0]
    pairs = factor_pairs(counted[0])
    factors = {name for pair in pairs for name in pair}
    others = [{name: value for name, value in sent.items() if name not in factors} for sent in counted]
    merged = weighted_mean(others, shares)
    for name_a, name_b in pairs:
        rows, columns = _side_by_side([(sent[name_a], sent[name_b]) for sent in counted], shares, name_a)
        if rank is not None:
            rows, columns = with_fresh_directions(*refactored(rows, columns, rank), rank, name_a)
        elif len(rows) > (narrowest := min(rows.shape[1], len(columns))):
            rows, columns = refactored(rows, columns, narrowest)
        merged[name_a] = rows.to(counted[0][name_a].dtype)
        merged[name_b] = columns.to(counted[0][name_b].dtype)
    return {name: merged[name] for name in counted[0]}


def _side_by_side(
    factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], name: str
) -> tuple[Tensor, Tensor]:
    """A [K, I] and B [O, K] of the weighted sum of products, in double precision."""
    first = [tuple(factor.shape) for factor in factors[0]]
    for factor_a, factor_b in factors:
        shapes = [tuple(factor_a.shape), tuple(factor_b.shape)]
        if shapes != [(len(factor_a), *first[0][1:]), (first[1][0], len(factor_a))]:
            raise ValueError(
                f"{name}: expected factors [R, I] and [O, R] of one layer from all senders; got {shapes}, where the"
                f" first sender has {first}: use another aggregator if this layer is neither linear nor an embedding"
            )
    rows = torch.cat([factor_a.double() for factor_a, _ in factors])
    columns = [factor_b.double() * share for (_, factor_b), share in zip(factors, shares, strict=True)]
    return rows, torch.cat(columns, dim=1)


def median(adapters: Sequence[Adapters], weights: Sequence[float]) -> dict[str, Tensor]:
    r"""Median of each element over the senders; of an even number, the mean of the middle two.

    Holds as long as fewer than half of the senders are faulty. Honest senders with unlike data pull it away from
    their mean: an element that only a few clients move stays where it was.

    Args:
        adapters: one mapping per sender, all with the same names and shapes.
        weights: one non-negative weight per sender, not all zero; senders with weight 0 are left out.

    Returns:
        The median, in the tensors' own dtype. Of one sender that sender's adapters, of two their mean.

    Raises:
        ValueError: as `weighted_mean`, or a sender with numbers that are not finite.

    Source:
        Yin et al. 2018, arXiv 1803.01498, Definition 1.

    Example:
        >>> sent = [{"a": torch.tensor([value])} for value in (1.0, 2.0, -90.0)]
        >>> median(sent, [1, 1, 1])["a"]
        tensor([1.])
    """
    counted = _counted(adapters, weights)
    return _mean_of_middle(counted, (len(counted) - 1) // 2)


def trimmed_mean(adapters: Sequence[Adapters], weights: Sequence[float], trim: float = 0.25) -> dict[str, Tensor]:
    r"""Mean of each element over the senders, without the largest and the smallest ``floor(trim * N)`` values.

    Holds as long as at most ``floor(trim * N)`` of the N senders are faulty. With the default that is none of one, two
    or three senders, for whom this is the plain mean with equal weights.

    Args:
        adapters: one mapping per sender, all with the same names and shapes.
        weights: one non-negative weight per sender, not all zero; senders with weight 0 are left out.
        trim: share of the senders that is left out at each end, 0 <= trim < 0.5.

    Returns:
        The mean of what is left, in the tensors' own dtype.

    Raises:
        ValueError: as `weighted_mean`, a share outside its range, or a sender with numbers that are not finite.

    Source:
        Yin et al. 2018, arXiv 1803.01498, Definition 2.

    Example:
        >>> sent = [{"a": torch.tensor([value])} for value in (1.0, 2.0, 3.0, -90.0)]
        >>> trimmed_mean(sent, [1, 1, 1, 1])["a"]
        tensor([1.5000])
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"expected 0 <= trim < 0.5; got {trim}: use `median` to trim as much as possible")
    counted = _counted(adapters, weights)
    return _mean_of_middle(counted, math.floor(trim * len(counted)))


def krum(adapters: Sequence[Adapters], weights: Sequence[float], faulty: float = 0.25) -> dict[str, Tensor]:
    r"""The adapters of the one sender that lies closest to its neighbours.

    .. math::
        s_n = \sum_{k \in \mathcal N(n)} \lVert a_n - a_k \rVert^2, \qquad n^* = \arg\min_n s_n

    with :math:`\mathcal N(n)` the N - f - 2 senders nearest to n and f = ``floor(faulty * N)`` the number of faulty
    senders to withstand. The guarantee needs N >= 2 f + 3, so f is lowered to ``(N - 3) // 2`` where it is larger. The
    rest of the honest work is thrown away, which costs accuracy when clients are unlike.

    Args:
        adapters: one mapping per sender, all with the same names and shapes.
        weights: one non-negative weight per sender, not all zero; senders with weight 0 are left out.
        faulty: share of the senders that may be faulty, 0 <= faulty < 0.5.

    Returns:
        A copy of the chosen sender's adapters; of equal scores the first. Two senders are each other's only
        neighbour, so neither is better: their mean.

    Raises:
        ValueError: as `weighted_mean`, a share outside its range, or a sender with numbers that are not finite.

    Source:
        Blanchard et al. 2017, arXiv 1703.02757, section 4.

    Example:
        >>> sent = [{"a": torch.tensor([value])} for value in (1.0, 2.0, 2.1, -90.0)]
        >>> krum(sent, [1, 1, 1, 1])["a"]
        tensor([2.])
    """
    if not 0 <= faulty < 0.5:
        raise ValueError(f"expected 0 <= faulty < 0.5; got {faulty}: Krum needs a majority of honest senders")
    counted = _counted(adapters, weights)
    count = len(counted)
    if count <= 2:
        return _mean_of_middle(counted, 0)
    squared = torch.zeros(count, count, dtype=torch.float64)
    for name in counted[0]:
        sent = torch.stack([other[name].double().flatten() for other in counted])
        squared += torch.cdist(sent, sent, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    neighbours = count - min(math.floor(faulty * count), (count - 3) // 2) - 2
    nearest = squared.fill_diagonal_(math.inf).sort(dim=1).values[:, :neighbours]
    best = counted[int(nearest.sum(1).argmin())]
    return {name: value.clone() for name, value in best.items()}


AGGREGATORS: dict[str, Aggregator] = {
    "mean": weighted_mean,
    "exact": exact,
    "stacked": exact,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
}


ALONE = "none"
"""In place of a name of `AGGREGATORS`: nothing is merged, and each client trains alone."""

MERGE_PRODUCTS = ("exact", "stacked")
"""Those that merge products of factors, so that the factors may be of unlike ranks; they differ in what becomes of the
mean: an adapter of the run's rank, or part of the frozen weights."""


def sample_clients(clients: Sequence[str], participation: float, seed: int, round_number: int) -> frozenset[str]:
    """Draw the clients of a global round: a function of seed and round, the same in every process.

    Args:
        clients: all clients, in an order that all processes share.
        participation: fraction in (0, 1]; at least one client is drawn.
        seed: the run's seed.
        round_number: the global round.
    """
    count = max(1, round(participation * len(clients)))
    draws = np.random.default_rng(derive_seed(seed, "participants", round_number))
    return frozenset(draws.choice(list(clients), size=count, replace=False).tolist())


def _require_alike(adapters: Sequence[Adapters], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected one weight for each of at least one sender; got {len(adapters)} and {len(weights)}")
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:  # also refuses nan
        raise ValueError(f"weights must be finite, at least 0 and not all 0; got {list(weights)}")
    names = set(adapters[0])
    for other in adapters[1:]:
        if set(other) != names:
            raise ValueError(f"senders differ in the layers {sorted(set(other) ^ names)[:4]}")


def _counted(adapters: Sequence[Adapters], weights: Sequence[float]) -> list[Adapters]:
    """Senders whose weight is not 0, after the checks."""
    _require_alike(adapters, weights)
    counted = [(index, sent) for index, (sent, weight) in enumerate(zip(adapters, weights, strict=True)) if weight > 0]
    bad = [index for index, sent in counted if not all(value.isfinite().all() for value in sent.values())]
    if bad:
        raise ValueError(f"expected finite adapters; those of senders {bad[:8]} are not: give these senders weight 0")
    return [sent for _, sent in counted]


def _mean_of_middle(adapters: Sequence[Adapters], drop: int) -> dict[str, Tensor]:
    """Mean of each element over the senders, without the `drop` smallest and the `drop` largest."""
    merged = {}
    for name, first in adapters[0].items():
        ordered = torch.stack([sent[name] for sent in adapters]).sort(dim=0).values
        middle = ordered[drop : len(adapters) - drop].double()
        merged[name] = middle.mean(0).to(first.dtype)
    return merged
