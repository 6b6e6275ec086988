"""Divide the examples of one training set among simulated clients.

The way the data is divided decides how hard a federated problem is, so it is kept apart from reading and
tokenizing, as pure functions: labels and a ``numpy.random.Generator`` in, one array of example indices per
client out. Every example is used exactly once, each array is sorted, and the same generator state gives the
same result.

A skewed draw can leave a client with nothing. Each function then raises an error that names the clients and a
setting that does work *with the same generator state*; it has been tried, not guessed.

Shapes: E examples, C different labels, N clients.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from elsa_pl.datamodules.batches import Indices
from elsa_pl.datamodules.draws import (
    MAX_DRAWS,
    deal,
    draw_or_explain,
    label_codes,
    require_enough,
    require_positive,
    shorten,
    sorted_parts,
)


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
    num_examples = len(label_codes(labels, num_clients)[0])
    require_enough(num_examples, num_clients, min_examples, "iid")
    return sorted_parts(np.array_split(generator.permutation(num_examples), num_clients))


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
    codes, totals = label_codes(labels, num_clients)
    require_positive("alpha", alpha)
    require_enough(len(codes), num_clients, min_examples, "dirichlet")

    def draw(alpha: float, num_clients: int, source: np.random.Generator) -> tuple[Indices, Indices]:
        counts = _draw_counts(totals, num_clients, alpha, min_examples, source)
        return counts.sum(axis=0), counts

    counts = draw_or_explain(draw, alpha, num_clients, generator, min_examples, "dirichlet")
    return sorted_parts(deal(codes, counts, generator))


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
    codes, _ = label_codes(labels, num_clients)
    require_positive("shards_per_client", shards_per_client)
    per_shard = max(1, -(-min_examples // shards_per_client))
    require_enough(len(codes), num_clients, per_shard * shards_per_client, "shards")
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    pieces = np.array_split(order, num_clients * shards_per_client)
    dealt = generator.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return sorted_parts([np.concatenate([pieces[piece] for piece in row]) for row in dealt])


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
            f"{shorten(small)}: remove the rows of those clients or lower min_examples"
        )
    parts = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
    return [str(name) for name in names], sorted_parts(parts)


def set_aside(strata: npt.ArrayLike, fraction: float, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """Divide the examples in a kept and a smaller part with the same mix; no stratum loses its last example.

    Args:
        strata: the label or the owner of each example. [E]
        fraction: size of the smaller part, in [0, 1).
        generator: decides which examples.

    Returns:
        Indices of the kept examples and of those set aside, both sorted.
    """
    codes, totals = label_codes(strata, 1)
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
