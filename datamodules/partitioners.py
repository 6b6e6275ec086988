"""Divide the examples of one training set among simulated clients.

The way the data is divided decides how hard a federated problem is, so it is kept apart from reading and
tokenizing, as pure functions: labels and a ``numpy.random.Generator`` in, one array of example indices per
client out. Every example is used exactly once, each array is sorted, and the same generator state gives the
same result.

A skewed draw can leave a client with nothing. Each function then raises an error that names the clients and a
setting that does work *with the same generator state*; it has been tried, not guessed.

Shapes: E examples, C different labels, N clients.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Drawn = TypeVar("Drawn")

MAX_DRAWS: Final = 20
"""How many times ``dirichlet`` and ``groups`` draw before they give up."""


def iid(
    labels: npt.ArrayLike, num_clients: int, generator: np.random.Generator, min_examples: int = 1
) -> list[Indices]:
    """Deal the examples like cards: equal sizes, up to one example.

    Args:
        labels: one per example; only their number matters here. [E]
        num_clients: N >= 1.
        generator: source of the order.
        min_examples: the fewest examples a client may have.

    Raises:
        ValueError: there are fewer than N * ``min_examples`` examples.

    Example:
        >>> [len(part) for part in iid([0] * 7, 3, np.random.default_rng(0))]
        [3, 2, 2]
    """
    num_examples = len(_codes(labels, num_clients)[0])
    _require_enough(num_examples, num_clients, min_examples, "iid")
    return _sorted_parts(np.array_split(generator.permutation(num_examples), num_clients))


def dirichlet(
    labels: npt.ArrayLike,
    num_clients: int,
    generator: np.random.Generator,
    alpha: float,
    min_examples: int = 1,
) -> list[Indices]:
    """Spread each label over the clients in proportions drawn from Dirichlet(alpha).

    For every label c: p_c ~ Dirichlet(alpha, ..., alpha) over the N clients, and client n gets the share
    p_c[n] of the examples of c. Small alpha: few labels per client and unequal sizes; large alpha: close to
    iid. Up to ``MAX_DRAWS`` draws are made until every client has ``min_examples``.

    Args:
        labels: one per example. [E]
        num_clients: N >= 1.
        generator: source of the proportions and of the order.
        alpha: concentration, > 0.
        min_examples: the fewest examples a client may have.

    Raises:
        ValueError: some client is left with fewer than ``min_examples``.

    References:
        Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution for federated
        visual classification", arXiv 1909.06335. There each client draws a mix of labels and all sizes are
        equal; here, as in most later work, each label draws a mix of clients, so every example is used.
    """
    codes, totals = _codes(labels, num_clients)
    _require_positive("alpha", alpha)
    _require_enough(len(codes), num_clients, min_examples, "dirichlet")

    def draw(alpha: float, num_clients: int, source: np.random.Generator) -> tuple[Indices, Indices]:
        counts = _draw_counts(totals, num_clients, alpha, min_examples, source)
        return counts.sum(axis=0), counts

    counts = _draw_or_explain(draw, alpha, num_clients, generator, min_examples, "dirichlet")
    return _sorted_parts(_deal(codes, counts, generator))


def shards(
    labels: npt.ArrayLike,
    num_clients: int,
    generator: np.random.Generator,
    shards_per_client: int = 2,
    min_examples: int = 1,
) -> list[Indices]:
    """Sort by label, cut into N * ``shards_per_client`` equal pieces, deal the pieces at random.

    With two shards a client sees about two labels.

    Args:
        labels: one per example. [E]
        num_clients: N >= 1.
        generator: source of the order within a label and of the dealing.
        shards_per_client: >= 1.
        min_examples: the fewest examples a client may have.

    Raises:
        ValueError: there are too few examples for that many shards.

    References:
        McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data",
        arXiv 1602.05629, section 3.
    """
    codes, _ = _codes(labels, num_clients)
    _require_positive("shards_per_client", shards_per_client)
    per_shard = max(1, -(-min_examples // shards_per_client))
    _require_enough(len(codes), num_clients, per_shard * shards_per_client, "shards")
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    pieces = np.array_split(order, num_clients * shards_per_client)
    dealt = generator.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return _sorted_parts([np.concatenate([pieces[piece] for piece in row]) for row in dealt])


def groups(
    labels: npt.ArrayLike,
    num_clients: int,
    generator: np.random.Generator,
    num_groups: int,
    alpha: float,
    min_examples: int = 1,
) -> tuple[list[Indices], Indices]:
    """Plant groups of clients: groups differ as in ``dirichlet``, the clients of one group are alike.

    Gives clustering something to find, and the truth to compare it with. Membership is random with equal
    group sizes (up to one), so that neither blocks nor round-robin match it by accident.

    Args:
        labels: one per example. [E]
        num_clients: N >= 1.
        generator: source of all draws.
        num_groups: 1 <= num_groups <= N.
        alpha: concentration of the label mix of the groups, > 0.
        min_examples: the fewest examples a client may have.

    Returns:
        The parts, and the group of each client. [N]

    Raises:
        ValueError: some client is left with fewer than ``min_examples``.
    """
    codes, totals = _codes(labels, num_clients)
    _require_positive("alpha", alpha)
    if not 1 <= num_groups <= num_clients:
        raise ValueError(
            f"expected 1 <= num_groups <= num_clients, got num_groups={num_groups}, "
            f"num_clients={num_clients}: lower num_groups or raise num_clients"
        )
    _require_enough(len(codes), num_clients, min_examples, "groups")

    def draw(
        alpha: float, num_clients: int, source: np.random.Generator
    ) -> tuple[Indices, tuple[Indices, list[Indices]]]:
        members = source.permutation(np.arange(num_clients) % num_groups)
        clients = [np.flatnonzero(members == group) for group in range(num_groups)]
        largest = max(map(len, clients))
        counts = _draw_counts(totals, num_groups, alpha, min_examples * largest, source)
        sizes = np.empty(num_clients, dtype=np.int64)
        for group, total in enumerate(counts.sum(axis=0)):
            share, rest = divmod(int(total), len(clients[group]))
            sizes[clients[group]] = share + (np.arange(len(clients[group])) < rest)
        return sizes, (counts, clients)

    counts, clients = _draw_or_explain(draw, alpha, num_clients, generator, min_examples, "groups", num_groups)
    parts: list[Indices] = [np.empty(0, dtype=np.int64)] * num_clients
    membership = np.empty(num_clients, dtype=np.int64)
    for group, examples in enumerate(_deal(codes, counts, generator)):
        membership[clients[group]] = group
        pieces = np.array_split(generator.permutation(examples), len(clients[group]))
        for client, piece in zip(clients[group], pieces, strict=True):
            parts[client] = piece
    return _sorted_parts(parts), membership


def by_column(owners: Sequence[str], min_examples: int = 1) -> tuple[list[str], list[Indices]]:
    """Give every example to the owner that its row names.

    Args:
        owners: one client name per example. [E]
        min_examples: the fewest examples a client may have.

    Returns:
        The client names, sorted, and their parts.

    Raises:
        ValueError: some client has fewer than ``min_examples``.

    Example:
        >>> by_column(["b", "a", "b"])
        (['a', 'b'], [array([1]), array([0, 2])])
    """
    if not len(owners):
        raise ValueError("expected at least one example, got none: give a file with rows")
    names, codes = np.unique(np.asarray(owners, dtype=str), return_inverse=True)
    sizes = np.bincount(codes, minlength=len(names))
    small = [f"{names[i]} ({sizes[i]})" for i in np.flatnonzero(sizes < min_examples)]
    if small:
        raise ValueError(
            f"expected at least min_examples={min_examples} examples for every client, got "
            f"{_shorten(small)}: remove the rows of those clients or lower min_examples"
        )
    parts = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
    return [str(name) for name in names], _sorted_parts(parts)


def set_aside(strata: npt.ArrayLike, fraction: float, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """Divide the examples in a kept and a smaller part with the same mix; no stratum loses its last example.

    Args:
        strata: the label or the owner of each example. [E]
        fraction: size of the smaller part, in [0, 1).
        generator: decides which examples.

    Returns:
        Indices of the kept examples and of those set aside, both sorted.
    """
    codes, totals = _codes(strata, 1)
    quota = np.floor(totals * fraction).astype(np.int64)
    missing = round(len(codes) * fraction) - int(quota.sum())
    by_remainder = np.argsort(quota - totals * fraction, kind="stable")
    quota[by_remainder[: max(0, missing)]] += 1
    quota = np.minimum(quota, totals - 1)
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    rank = np.arange(len(codes)) - np.repeat(np.cumsum(totals) - totals, totals)
    aside = rank < np.repeat(quota, totals)
    return np.sort(order[~aside]), np.sort(order[aside])


def _codes(labels: npt.ArrayLike, num_clients: int) -> tuple[Indices, Indices]:
    """Return labels as numbers from 0 to C-1 [E], and how many examples each has [C]."""
    _require_positive("num_clients", num_clients)
    _, codes, totals = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return codes.astype(np.int64), totals.astype(np.int64)


def _draw_counts(
    totals: Indices, num_clients: int, alpha: float, min_examples: int, generator: np.random.Generator
) -> Indices:
    """Draw how many examples of each label every client gets [C, N]; the last draw may fall short."""
    for _ in range(MAX_DRAWS):
        shares = generator.dirichlet(np.full(num_clients, alpha), size=len(totals))
        # A random offset per label: plain rounding would give the few examples of rare labels to the same
        # clients every time.
        offset = generator.random((len(totals), 1))
        ends = np.floor(np.cumsum(shares, axis=1) * totals[:, None] + offset).astype(np.int64)
        ends[:, -1] = totals
        counts = np.diff(ends, axis=1, prepend=0)
        if counts.sum(axis=0).min() >= min_examples:
            break
    return counts


def _deal(codes: Indices, counts: Indices, generator: np.random.Generator) -> list[Indices]:
    """Pick examples at random so that client n gets ``counts[c, n]`` of label c."""
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    num_clients = counts.shape[1]
    owner = np.repeat(np.tile(np.arange(num_clients), len(counts)), counts.ravel())
    order = order[np.argsort(owner, kind="stable")]
    return list(np.split(order, np.cumsum(counts.sum(axis=0))[:-1]))


def _draw_or_explain(
    draw: Callable[[float, int, np.random.Generator], tuple[Indices, Drawn]],
    alpha: float,
    num_clients: int,
    generator: np.random.Generator,
    min_examples: int,
    name: str,
    fewest: int = 1,
) -> Drawn:
    """Return what ``draw`` made besides the sizes, or raise with an alpha and a client count that work."""
    start = copy.deepcopy(generator)
    sizes, drawn = draw(alpha, num_clients, generator)
    if sizes.min() >= min_examples:
        return drawn

    def works(alpha: float, num_clients: int) -> bool:
        return bool(draw(alpha, num_clients, copy.deepcopy(start))[0].min() >= min_examples)

    larger = next((a for a in _larger(alpha) if works(a, num_clients)), None)
    fewer = next((n for n in range(num_clients - 1, fewest - 1, -1) if works(alpha, n)), None)
    advice = [f"alpha={larger:g}"] if larger is not None else []
    advice += [f"num_clients={fewer}"] if fewer is not None else []
    small = [f"client-{i} ({sizes[i]})" for i in np.flatnonzero(sizes < min_examples)]
    raise ValueError(
        f"expected at least min_examples={min_examples} examples for every client, got {_shorten(small)} "
        f"in the last of {MAX_DRAWS} {name} draws with alpha={alpha:g}, num_clients={num_clients}: "
        + (f"with the same seed {' or '.join(advice)} works" if advice else "use more data or partition=iid")
    )


def _larger(alpha: float) -> list[float]:
    """Return round numbers above alpha: 1, 2, 3, 5 times powers of ten, up to 1000."""
    return [m * 10.0**e for e in range(-3, 3) for m in (1, 2, 3, 5) if m * 10.0**e > alpha] + [1000.0]


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"expected {name} > 0, got {value}: give a positive number")


def _require_enough(num_examples: int, num_clients: int, min_examples: int, name: str) -> None:
    if num_examples >= num_clients * max(1, min_examples):
        return
    most = num_examples // max(1, min_examples)
    raise ValueError(
        f"expected at least {max(1, min_examples)} examples for each of {num_clients} clients, got "
        f"{num_examples} in all for partition {name}: " + (f"use num_clients <= {most}" if most else "use more data")
    )


def _shorten(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _sorted_parts(parts: Sequence[Indices]) -> list[Indices]:
    return [np.sort(part).astype(np.int64) for part in parts]
