"""Plant groups of clients whose data is alike: something for clustering to find, and the truth to compare it with.

Membership is random with equal group sizes (up to one), so that neither blocks nor round-robin match it by accident.
Apart from that as in `elsa_pl.datamodules.partitioners`.

Shapes: E examples, C different labels, N clients, G groups.
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
    sorted_parts,
)
from elsa_pl.datamodules.wording import divide_by_wording


def groups(
    labels: npt.ArrayLike,
    num_clients: int,
    generator: np.random.Generator,
    num_groups: int,
    alpha: float,
    min_examples: int = 1,
) -> tuple[list[Indices], Indices]:
    r"""Plant groups of clients: each group draws its own mix of labels, and all its clients have that mix.

    Gives clustering something to find, and the truth to compare it with. For every group g:

    .. math:: q_g \sim \mathrm{Dirichlet}(\alpha C p)

    where p is the mix of the whole set: with labels of equal frequency the symmetric Dirichlet(alpha). Mixes overlap,
    the less the smaller alpha is. All clients get the same number of examples, up to rounding, the largest for which
    there are enough of every label: :math:`\min_c E_c / \sum_g k_g q_g[c]`, with k_g clients in g. The rest of the
    labels that are less in demand **remains unused**, since handing it out would change the mixes.

    Membership is random with equal group sizes (up to one), so that neither blocks nor round-robin match it by
    accident. Up to ``MAX_DRAWS`` draws are made until every client has ``min_examples``.

    Args:
        labels: one per example. [E]
        num_clients: N >= 1.
        generator: source of all draws.
        num_groups: 1 <= G <= N.
        alpha: concentration per label of the mixes, > 0, on average over the labels.
        min_examples: the fewest examples a client may have.

    Returns:
        The parts, and the group of each client. [N]

    Raises:
        ValueError: some client is left with fewer than ``min_examples``.

    References:
        Hsu, Qi and Brown 2019, arXiv 1909.06335, draw each client's mix so, from Dirichlet(alpha p). A factor C makes
        alpha mean what it means elsewhere. Not symmetric where p is uneven: one group that draws mostly the rarest of
        TREC's labels (1.6%) would leave its 20 clients 24 examples each, in the median over seeds; so it is 126.
    """
    codes, totals = label_codes(labels, num_clients)
    require_positive("alpha", alpha)
    _require_groups(num_groups, num_clients)
    require_enough(len(codes), num_clients, min_examples, "groups")

    def draw(alpha: float, num_clients: int, source: np.random.Generator) -> tuple[Indices, tuple[Indices, Indices]]:
        members = _draw_members(num_clients, num_groups, source)
        num_members = np.bincount(members)
        for _ in range(MAX_DRAWS):
            counts = _draw_mixes(totals, num_members, alpha, source)
            smallest = counts.sum(axis=0) // num_members
            if smallest.min() >= min_examples:
                break
        return smallest[members], (counts, members)

    counts, members = draw_or_explain(draw, alpha, num_clients, generator, min_examples, "groups", num_groups)
    unused = totals - counts.sum(axis=1)
    *dealt, _ = deal(codes, np.column_stack([counts, unused]), generator)
    return _share_out(dealt, members), members


def sources(
    labels: npt.ArrayLike,
    texts: Sequence[str],
    num_clients: int,
    generator: np.random.Generator,
    num_groups: int,
    min_examples: int = 1,
) -> tuple[list[Indices], Indices]:
    """Plant groups of clients with the same mix of labels, whose texts differ in wording.

    Harder to tell apart than ``groups``. The texts of each label are divided by
    `elsa_pl.datamodules.wording.divide_by_wording`, each group gets one piece of every label, and its clients share
    it at random. All clients have the mix of the whole set and equal sizes, up to rounding. Membership as in
    ``groups``.

    Args:
        labels: one per example. [E]
        texts: one per example. [E]
        num_clients: N >= 1.
        generator: source of all draws.
        num_groups: 1 <= G <= N.
        min_examples: the fewest examples a client may have.

    Returns:
        The parts, and the group of each client. [N]

    Raises:
        ValueError: there are too few examples for that many clients.
    """
    codes, totals = label_codes(labels, num_clients)
    _require_groups(num_groups, num_clients)
    require_enough(len(codes), num_clients, min_examples, "sources")
    members = _draw_members(num_clients, num_groups, generator)
    source = divide_by_wording(texts, codes, _even_counts(totals, np.bincount(members)), generator)
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    parts = _share_out([order[source[order] == group] for group in range(num_groups)], members)
    if (smallest := min(map(len, parts))) < min_examples:
        raise ValueError(
            f"expected at least min_examples={min_examples} examples for every client, got {smallest} for one of "
            f"{num_clients} in partition sources: lower num_clients or use more data"
        )
    return parts, members


def _draw_mixes(totals: Indices, num_members: Indices, alpha: float, generator: np.random.Generator) -> Indices:
    """Draw a mix of labels for every group; return how many examples of each label the group gets [C, G]."""
    concentration = alpha * len(totals) * totals / totals.sum()
    mixes = generator.dirichlet(concentration, size=len(num_members)).T
    wanted = mixes * num_members
    demand = wanted.sum(axis=1)
    scale = np.min(totals[demand > 0] / demand[demand > 0])
    # A random offset per label, as in _draw_counts: the shares of rare labels are below one example.
    ends = np.floor(np.cumsum(wanted * scale, axis=1) + generator.random((len(totals), 1))).astype(np.int64)
    return np.diff(np.minimum(ends, totals[:, None]), axis=1, prepend=0)


def _even_counts(totals: Indices, num_members: Indices) -> Indices:
    """Divide the examples of every label among groups in proportion to their members [C, G].

    What does not divide evenly goes to the groups that are furthest behind, over the labels so far.
    """
    share = num_members / num_members.sum()
    counts = np.floor(np.outer(totals, share)).astype(np.int64)
    behind = np.zeros(len(share))
    for row, total in zip(counts, totals, strict=True):
        behind += total * share - row
        rest = int(total - row.sum())
        chosen = np.argsort(-behind, kind="stable")[:rest]
        row[chosen] += 1
        behind[chosen] -= 1
    return counts


def _draw_members(num_clients: int, num_groups: int, generator: np.random.Generator) -> Indices:
    """Return the group of each client [N]."""
    return generator.permutation(np.arange(num_clients) % num_groups)


def _share_out(groups: Sequence[Indices], members: Indices) -> list[Indices]:
    """Deal each group's examples, which come label by label, to its clients: all with the same mix, up to rounding."""
    parts: list[Indices] = [np.empty(0, dtype=np.int64)] * len(members)
    for group, examples in enumerate(groups):
        clients = np.flatnonzero(members == group)
        for place, client in enumerate(clients):
            parts[client] = examples[place :: len(clients)]
    return sorted_parts(parts)


def _require_groups(num_groups: int, num_clients: int) -> None:
    if not 1 <= num_groups <= num_clients:
        raise ValueError(
            f"expected 1 <= num_groups <= num_clients, got num_groups={num_groups}, "
            f"num_clients={num_clients}: lower num_groups or raise num_clients"
        )
