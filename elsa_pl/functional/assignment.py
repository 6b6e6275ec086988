"""Which client goes to which edge: near, among clients that behave alike, and within the capacities.

An edge averages its clients in every edge round, so clients that behave alike should share one; each of their steps
crosses the link to it, so it should be near. The two can disagree. A mean over members makes the problem quadratic,
and NP-hard, so it is solved in the way of k-means, and improved by single moves and swaps:

1. Start from several partitions: by latency alone, from behaviour clusters of two kinds, and some drawn at random.
2. Hold the members of each edge fixed as its prototype and assign all clients anew, exactly and within capacities
   (Hungarian method on capacity slots); then give each group of clients the edge that is nearest to it. Repeat while
   the objective falls.
3. From the best of them, move single clients to free places and swap pairs of clients while that lowers the objective.

The draws have a seed of their own: equal input gives equal output. Shapes: N clients, E edges.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_MAX_ITERATIONS: Final = 20
"""Of step 2; fewer than ten are usual."""
_MAX_PASSES: Final = 50
"""Of moves and swaps over all clients; a few are usual."""
_DRAWN: Final = 16
"""Starts that are drawn, for small federations: there they are cheap, and the others may all end badly."""
_PAIRS: Final = 500_000
"""Pairs of clients, times starts, to spend time on: no starts are drawn beyond it, and only two are improved."""
_LEAST_GAIN: Final = 1e-9
"""Smaller gains, relative to the objective of one client, are rounding."""


class AssignmentCosts(NamedTuple):
    """What an assignment costs."""

    latency_s: float
    """Sum over clients of the latency to their edge, in seconds."""

    divergence: float
    """Sum over clients of the mean divergence to the members of their edge, themselves included."""

    objective: float
    """What `assign` makes small, without a unit."""


def assign(
    latency_s: Tensor,
    divergences: Tensor | None,
    capacities: Tensor | Sequence[int],
    trust: Tensor | None = None,
    *,
    latency_weight: float = 1.0,
    behaviour_weight: float = 1.0,
    spread_weight: float = 1.0,
) -> Tensor:
    r"""Assign each client to an edge.

    Makes small, over the assignments e that keep the capacities, with :math:`W_e` the sum of trust T over the members
    of an edge, :math:`d_n = 1 - T_n` and :math:`D_e` its sum over the members:

    .. math::
        \lambda_l \sum_n \frac{l_{n e(n)}}{s_l}
        + \lambda_b \sum_n \frac{T_n}{s_b} \sum_{k \in e(n)} \frac{T_k}{W_{e(n)}} R_{nk}
        + \lambda_s \sum_n d_n \frac{D_{e(n)}}{\max(1, \sum_k d_k / E)}

    The scales are the medians of all latencies and of the divergences between different clients, so that a few far
    clients do not decide. Where all are trusted, the second term is the mean divergence to the members of the edge.
    A client that is not trusted has no say in which clients belong together, and the last term spreads such clients:
    each pays for those that share its edge, so no edge's mean has many of them. An edge may stay empty.

    Args:
        latency_s: seconds from each client to each edge. [N, E]
        divergences: between clients, symmetric, at least 0, zero diagonal; None leaves behaviour out. [N, N]
        capacities: most clients of each edge. [E]
        trust: in [0, 1]; None trusts all. [N]
        latency_weight: lambda_l.
        behaviour_weight: lambda_b; below 0 clients that behave unlike share an edge, so that each edge has all kinds.
        spread_weight: lambda_s.

    Returns:
        Index of each client's edge, int64. [N]

    Raises:
        ValueError: capacities that cannot hold all clients, numbers that are not finite or out of range, or shapes
            that do not fit.

    Source:
        ELSA (Yang et al. 2026, arXiv 2601.13824) asks for latency-aware clusters; the objective and its solution are
        ours. The exact step: Crouse 2016, "On implementing 2D rectangular assignment algorithms", through SciPy.

    Example:
        >>> latency_s = torch.tensor([[0.01, 0.02], [0.02, 0.01], [0.01, 0.02], [0.03, 0.01]])
        >>> assign(latency_s, None, [2, 2])
        tensor([0, 1, 0, 1])
        >>> alike = torch.tensor([[0.0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 1], [9, 9, 1, 0]])
        >>> assign(latency_s, alike, [2, 2], behaviour_weight=3.0)
        tensor([0, 0, 1, 1])
    """
    problem = _Problem.of(latency_s, divergences, trust, latency_weight, behaviour_weight, spread_weight)
    places = _checked_capacities(capacities, problem.latency.shape)
    settled = [_settle(problem, start, places) for start in _starts(problem, places)]
    settled.sort(key=problem.objective)  # stable, so that equal ones keep their order
    count = max(2, _PAIRS // len(problem.latency) ** 2)
    improved = [_improve(problem, edges, places) for edges in settled[:count]]
    return torch.from_numpy(min(improved, key=problem.objective))


def assignment_costs(
    edges: Tensor,
    latency_s: Tensor,
    divergences: Tensor | None,
    trust: Tensor | None = None,
    *,
    latency_weight: float = 1.0,
    behaviour_weight: float = 1.0,
    spread_weight: float = 1.0,
) -> AssignmentCosts:
    """Latency, divergence and objective of an assignment, whoever made it; arguments as of `assign`.

    Args:
        edges: index of each client's edge. [N]
        latency_s: seconds. [N, E]
        divergences: between clients; None counts none. [N, N]
        trust: in [0, 1]; None trusts all. [N]
        latency_weight: lambda_l.
        behaviour_weight: lambda_b.
        spread_weight: lambda_s.

    Example:
        >>> latency_s, divergences = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[0.0, 4.0], [4.0, 0.0]])
        >>> assignment_costs(torch.tensor([0, 0]), latency_s, divergences)[:2]
        (3.0, 4.0)
    """
    problem = _Problem.of(latency_s, divergences, trust, latency_weight, behaviour_weight, spread_weight)
    chosen = np.asarray(edges, dtype=np.int64)
    clients, count = problem.latency.shape
    if chosen.shape != (clients,) or chosen.min() < 0 or chosen.max() >= count:
        raise ValueError(f"expected {clients} indices of edges in [0, {count}); got {chosen.tolist()[:8]}")
    return AssignmentCosts(
        float(problem.latency_s[np.arange(clients), chosen].sum()),
        float(sum(_mean_terms(problem.unscaled, problem.trust, chosen, count))),
        problem.objective(chosen),
    )


class _Problem(NamedTuple):
    """The objective in numbers; weights and scales are in the matrices."""

    latency: Floats  # weighted, over the scale [N, E]
    divergence: Floats  # weighted, over the scale [N, N]
    trust: Floats  # [N]
    distrust: Floats  # [N], with the square root of the weight over the even share in it
    latency_s: Floats  # as given [N, E]
    unscaled: Floats  # as given [N, N]

    @staticmethod
    def of(
        latency_s: Tensor,
        divergences: Tensor | None,
        trust: Tensor | None,
        latency_weight: float,
        behaviour_weight: float,
        spread_weight: float,
    ) -> "_Problem":
        """Check and scale."""
        seconds = _array(latency_s)
        if seconds.ndim != 2 or 0 in seconds.shape:
            raise ValueError(f"expected latencies [N, E] of at least one client and edge; got shape {seconds.shape}")
        _require_finite("latency_s", seconds)
        clients, count = seconds.shape
        apart = np.zeros((clients, clients)) if divergences is None else _array(divergences)
        if apart.shape != (clients, clients):
            raise ValueError(
                f"expected divergences of shape {(clients, clients)}, as there are latencies; got {apart.shape}"
            )
        _require_finite("divergences", apart)
        if np.diagonal(apart).any() or not np.allclose(apart, apart.T, rtol=1e-4, atol=1e-6 * float(apart.max())):
            raise ValueError("expected symmetric divergences with a zero diagonal; got others: use symmetric_kl")
        apart = (apart + apart.T) / 2  # single precision leaves differences
        trusted = np.ones(clients) if trust is None else _array(trust)
        if trusted.shape != (clients,) or not ((trusted >= 0) & (trusted <= 1)).all():
            raise ValueError(f"expected trust in [0, 1] for each of {clients} clients; got {trusted.tolist()[:8]}")
        weights = {
            "latency_weight": latency_weight,
            "behaviour_weight": behaviour_weight,
            "spread_weight": spread_weight,
        }
        for name, weight in weights.items():
            least = -math.inf if name == "behaviour_weight" else 0.0
            if not (least <= weight < math.inf and weight != -math.inf):
                raise ValueError(f"expected {name} >= {least:g}, and finite; got {weight}")
        distrust = 1 - trusted
        even = max(1.0, float(distrust.sum()) / count)
        between = apart[~np.eye(clients, dtype=bool)]
        return _Problem(
            seconds * (latency_weight / _scale(seconds)),
            apart * (behaviour_weight / _scale(between)),
            trusted,
            distrust * math.sqrt(spread_weight / even),
            seconds,
            apart,
        )

    def objective(self, edges: Places) -> float:
        """The sum that `assign` makes small."""
        count = self.latency.shape[1]
        spread = np.bincount(edges, self.distrust, count)
        near = self.latency[np.arange(len(edges)), edges].sum()
        return float(near + sum(_mean_terms(self.divergence, self.trust, edges, count)) + (spread**2).sum())


def _mean_terms(divergence: Floats, trust: Floats, edges: Places, count: int) -> list[float]:
    """For each edge the sum over its members of their mean divergence to all members, weighted by trust."""
    terms = []
    for edge in range(count):
        members = np.flatnonzero(edges == edge)
        weight = trust[members]
        if weight.sum() > 0:
            terms.append(float(weight @ divergence[np.ix_(members, members)] @ weight / weight.sum()))
    return terms


def _starts(problem: _Problem, capacities: Places) -> list[Places]:
    """Partitions to start from; those of behaviour may exceed the capacities, since they only serve as prototypes."""
    starts = [_match(problem.latency, capacities)]
    clients, count = problem.latency.shape
    if problem.divergence.any() and clients > 2 and count > 1:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        condensed = squareform(problem.divergence, checks=False)
        alike = condensed.min() >= 0  # for others, groups of the alike are no start
        for method in ("average", "ward") if alike else ():
            groups = fcluster(linkage(condensed, method), count, "maxclust") - 1
            starts.append(_nearest_edges(problem.latency, groups.astype(np.int64), None))
        generator = np.random.default_rng(0)  # a fixed seed: the same problem has one answer
        starts += list(generator.integers(count, size=(min(_DRAWN, _PAIRS // clients**2), clients)))
    return starts


def _settle(problem: _Problem, start: Places, capacities: Places) -> Places:
    """Alternate prototypes and exact assignment; return the best partition within the capacities."""
    count = problem.latency.shape[1]
    edges, least = start, math.inf
    for _ in range(_MAX_ITERATIONS):
        member = np.eye(count)[edges] * problem.trust[:, None]
        weight = member.sum(0)
        mean = problem.divergence @ member / np.where(weight > 0, weight, 1.0)
        spread = np.bincount(edges, problem.distrust, count)
        others = spread[None, :] - np.eye(count)[edges] * problem.distrust[:, None]
        costs = problem.latency + problem.trust[:, None] * mean + problem.distrust[:, None] * others
        after = _nearest_edges(problem.latency, _match(costs, capacities), capacities)
        objective = problem.objective(after)
        if objective >= least - _LEAST_GAIN:
            break
        edges, least = after, objective
    return edges


def _match(costs: Floats, capacities: Places) -> Places:
    """The assignment of least total cost within the capacities, exactly: one column for each place at an edge."""
    from scipy.optimize import linear_sum_assignment

    slots = np.repeat(np.arange(costs.shape[1]), np.minimum(capacities, len(costs)))
    _, columns = linear_sum_assignment(costs[:, slots])
    matched: Places = slots[columns].astype(np.int64)
    return matched


def _nearest_edges(latency: Floats, groups: Places, capacities: Places | None) -> Places:
    """Give whole groups the edges that are nearest in all, among those that hold them (None: all do)."""
    from scipy.optimize import linear_sum_assignment

    count = latency.shape[1]
    total = np.stack([np.bincount(groups, latency[:, edge], count) for edge in range(count)], 1)
    if capacities is not None:
        total[np.bincount(groups, minlength=count)[:, None] > capacities[None, :]] = math.inf
    _, edges = linear_sum_assignment(total)
    matched: Places = edges[groups].astype(np.int64)
    return matched


def _improve(problem: _Problem, start: Places, capacities: Places) -> Places:
    """Moves to free places and swaps of pairs, each client's best in turn, while they lower the objective.

    With P[n, k] = T_n T_k R_nk, A[n, e] its sum over the members k of e, and Q_e the sum of A[n, e] over the same
    members, the part of an edge in the objective is Q / W + D^2. What a move or a swap changes follows from these
    sums, so all edges and all partners of a client are tried at once.
    """
    latency, apart, trust, distrust = problem[:4]
    clients, count = latency.shape
    pairs = trust[:, None] * apart * trust[None, :]
    edges, everyone = start.copy(), np.arange(clients)
    member = np.eye(count)[edges]
    sums = pairs @ member
    quadratic, weight = (member * sums).sum(0), trust @ member
    spread, size = distrust @ member, member.sum(0)
    near, at_home = latency[everyone, edges], sums[everyone, edges]

    def part(quadratic: Floats, weight: Floats, spread: Floats) -> Floats:
        # an edge without trusted members has Q = 0, of which sums leave rounding errors
        mean: Floats = quadratic * (weight > 1e-9) / np.maximum(weight, 1e-9)
        mean += spread * spread
        return mean

    def relocate(client: int, edge: int) -> None:
        before = int(edges[client])
        quadratic[before] -= 2 * sums[client, before]
        quadratic[edge] += 2 * sums[client, edge]
        sums[:, before] -= pairs[client]
        sums[:, edge] += pairs[client]
        for total, value in ((weight, trust[client]), (spread, distrust[client]), (size, 1.0)):
            total[before] -= value
            total[edge] += value
        edges[client], near[client] = edge, latency[client, edge]

    for _ in range(_MAX_PASSES):
        changed = False
        for client in range(clients):
            here, faith, doubt, own = int(edges[client]), trust[client], distrust[client], sums[client]
            now = part(quadratic, weight, spread)
            left = quadratic[here] - 2 * own[here]
            moves = latency[client] + part(quadratic + 2 * own, weight + faith, spread + doubt) - now
            moves += part(left, weight[here] - faith, spread[here] - doubt) - near[client] - now[here]
            moves[size >= capacities] = math.inf  # also to where it is, if that is full
            moves[here] = math.inf
            shared = 2 * pairs[client]
            here_after = part(
                left + 2 * sums[:, here] - shared, weight[here] - faith + trust, spread[here] - doubt + distrust
            )
            there_after = part(
                (quadratic + 2 * own)[edges] - 2 * at_home - shared,
                (weight + faith)[edges] - trust,
                (spread + doubt)[edges] - distrust,
            )
            swaps = (latency[client] - now)[edges] + latency[:, here] - near
            swaps += here_after + there_after - (near[client] + now[here])
            swaps[edges == here] = math.inf
            edge, partner = int(moves.argmin()), int(swaps.argmin())
            if min(moves[edge], swaps[partner]) >= -_LEAST_GAIN:
                continue
            changed = True
            if moves[edge] > swaps[partner]:
                edge = int(edges[partner])
                relocate(partner, here)
            relocate(client, edge)
            at_home = sums[everyone, edges]
        if not changed:
            break
    return edges


def _array(values: Tensor) -> Floats:
    return np.asarray(torch.as_tensor(values).detach().cpu(), dtype=np.float64)


def _scale(values: Floats) -> float:
    """Median, or 1 where there is nothing to scale."""
    median = float(np.median(values)) if values.size else 0.0
    return median if median > 0 else float(values.max(initial=0.0)) or 1.0


def _require_finite(name: str, values: Floats) -> None:
    good = np.isfinite(values) & (values >= 0)
    if not good.all():
        bad = sorted({int(row) for row in np.argwhere(~good)[:, 0]})
        raise ValueError(
            f"expected {name} that are finite and at least 0; got others for clients {bad[:8]}: leave them out"
        )


def _checked_capacities(capacities: Any, shape: tuple[int, ...]) -> Places:
    clients, count = shape
    places = np.asarray(capacities)
    if places.shape != (count,) or not np.issubdtype(places.dtype, np.integer) or (places < 0).any():
        raise ValueError(f"expected a whole number of places for each of {count} edges; got {places.tolist()}")
    if places.sum() < clients:
        raise ValueError(
            f"expected places for {clients} clients; got capacities {places.tolist()}, {places.sum()} in all: raise"
            " them, or add an edge"
        )
    return places.astype(np.int64)
