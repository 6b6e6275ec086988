"""Pictures of how clients behave: who is like whom, where they are placed, who is trusted.

The divergences of forty clients are a wall of digits in a log; a picture shows at once that three of them lie apart.
Each ``draw_*`` function takes plain arrays and returns a figure, and ``save`` writes it, so any project can use them.
No label covers another, with 50 clients as well.

Shapes: N clients, W weights.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from elsa_pl.callbacks import drawing
from elsa_pl.callbacks.drawing import DARK, LETTER_IN, LINE_IN, PALETTE, entry, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["draw_divergences", "draw_map", "draw_trade_off", "draw_trust", "save"]

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MOST_NAMED: Final = 100
"""Of more clients than this, only the least trusted ones are named, and in the matrix only the clusters."""

_SPOTS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "*")
_STYLES = ("-", "--", "-.", ":")
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#999999"
_ALONE = "One client: there is nothing to compare it with"


def draw_divergences(divergences: npt.ArrayLike, names: Sequence[str], clusters: npt.ArrayLike) -> "Figure":
    """Draw the matrix of divergences, ordered by cluster, with the borders of the clusters.

    Colours are logarithmic, as one faulty client can be thousands of times farther from the others than they are from
    each other. The diagonal is left out.

    Args:
        divergences: symmetric, at least 0, in nats. [N, N]
        names: of the clients. [N]
        clusters: number of the cluster of each client. [N]

    Raises:
        ValueError: no clients, shapes that do not fit, or divergences that are negative, not finite or not symmetric.

    Example:
        >>> figure = draw_divergences([[0, 9, 1], [9, 0, 9], [1, 9, 0]], ["a", "b", "c"], [0, 1, 0])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['a', 'c', 'b']
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    matrix, num_clients = _checked_divergences(divergences, names), len(names)
    labels = _per_client("clusters", clusters, num_clients)
    order = np.argsort(labels, kind="stable")
    matrix, labels = matrix[np.ix_(order, order)], labels[order]
    shown = [drawing.shorten(names[index]) for index in order] if num_clients <= MOST_NAMED else []

    # Places in inches, not by a layout engine: a row must be as high as a line of text.
    side = max(3.0, min(num_clients, MOST_NAMED) * LINE_IN)
    left = bottom = 0.45 + LETTER_IN * max(map(len, shown), default=0)
    width, height = left + side + 1.8, bottom + side + 0.6
    figure = drawing.new_figure(width, height, layout="none")
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    positive = matrix[matrix > 0]
    least, most = positive.min(initial=np.inf), positive.max(initial=0.0)
    norm = LogNorm(least, most) if least < most else Normalize(0, most or 1)
    # Identical clients have divergence 0, which has no logarithm: they get the darkest colour.
    cells = np.clip(matrix, norm.vmin, None)
    np.fill_diagonal(cells, np.nan)
    colours = colormaps["cividis"].with_extremes(bad="0.85")
    image = axes.imshow(cells, cmap=colours, norm=norm, interpolation="nearest")

    starts = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), num_clients]
    middles: dict[float, str] = {}
    for start, end in pairwise(starts):
        for colour, thick in (("white", 3.0), ("black", 1.2)):
            corner, length = (start - 0.5, start - 0.5), end - start
            border = Rectangle(corner, length, length, fill=False, edgecolor=colour, linewidth=thick, clip_on=False)
            axes.add_patch(border)
        middle = (start + end - 1) / 2
        if (middle - max(middles, default=-np.inf)) * side / num_clients > 0.99 * LINE_IN:
            middles[middle] = f"cluster {labels[start]}"
    axes.set_xticks(range(len(shown)), shown, rotation=90, parse_math=False)
    axes.set_yticks(range(len(shown)), shown, parse_math=False)
    axes.set(xlabel="client, ordered by cluster", ylabel="client, ordered by cluster")
    drawing.style(axes)
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(middles), list(middles.values()))
    right.tick_params(length=0, labelsize=drawing.FONT_PT)
    bar_axes = figure.add_axes(((left + side + 0.85) / width, bottom / height, 0.15 / width, side / height))
    marks = np.geomspace(least, most, 5) if least < most else np.linspace(0, most or 1, 5)
    drawing.colour_bar(image, bar_axes, marks, "symmetric KL divergence [nats]")
    sentence = "Blocks are clusters; the darker a cell, the more alike its two clients behave"
    drawing.title(figure, sentence if num_clients > 1 else _ALONE)
    return figure


def draw_map(
    divergences: npt.ArrayLike,
    names: Sequence[str],
    *,
    clusters: npt.ArrayLike,
    edges: Sequence[str] | None = None,
    trust: npt.ArrayLike | None = None,
    seed: int = 0,
) -> "Figure":
    r"""Draw clients as points that lie close when they behave alike: colour = edge, shape = cluster, size = trust.

    The places are those of metric multidimensional scaling (SMACOF) of the distances
    :math:`\sqrt{\ln(1 + R_{nk} / \tilde R)}`, with :math:`\tilde R` the median of the divergences that are not 0. The
    divergence of two Gaussians grows like a *squared* distance, hence the root; the logarithm keeps one client that is
    far from all from pressing the others into one point, and what was Euclidean stays so (Schoenberg 1938: ln(1 + x) is
    a Bernstein function). Kruskal's stress-1 says how badly two dimensions hold these distances: 0 is perfect, above
    0.2 is poor.

    Args:
        divergences: symmetric, at least 0, in nats. [N, N]
        names: of the clients. [N]
        clusters: number of the cluster of each client. [N]
        edges: name of the edge of each client; without them the colour is the cluster's. [N]
        trust: in [0, 1]; without it all points are equally large. [N]
        seed: of the scaling.

    Raises:
        ValueError: as `draw_divergences`, or trust outside [0, 1].

    Example:
        >>> figure = draw_map([[0, 9], [9, 0]], ["a", "b"], clusters=[0, 1], edges=["north", "south"])
        >>> sorted(text.get_text() for text in figure.axes[0].texts)
        ['a', 'b']
    """
    matrix, num_clients = _checked_divergences(divergences, names), len(names)
    labels = [int(label) for label in _per_client("clusters", clusters, num_clients)]
    kinds = sorted(set(labels))
    owners = [f"cluster {label}" for label in labels]
    groups = [f"cluster {kind}" for kind in kinds]
    if edges is not None:
        owners = [str(edge) for edge in _per_client("edges", edges, num_clients)]
        groups = sorted(set(owners), key=lambda name: (len(name), name))  # edge-2 before edge-10
    scores = np.ones(num_clients) if trust is None else _per_client("trust", trust, num_clients).astype(np.float64)
    _require_trust(scores)
    spots = {kind: _SPOTS[i] if i < len(_SPOTS) else f"${kind}$" for i, kind in enumerate(kinds)}
    colours = dict(zip(groups, drawing.colours(len(groups)), strict=True))
    usual = np.median(matrix[matrix > 0]) if matrix.any() else 1.0
    places, stress = drawing.map_places(np.sqrt(np.log1p(matrix / usual)), seed)

    side = float(np.clip(1.1 * num_clients**0.5 + 1, 5, 14))
    spread = np.ptp(places, axis=0)
    flat = float(np.clip(spread[1] / spread[0], 0.65, 1)) if spread[0] > 0 else 0.65
    figure = drawing.new_figure(side + 2, side * flat + 0.5)
    axes = figure.add_subplot()
    full = float(np.clip(2500 / num_clients, 50, 130))
    areas = full * (0.15 + 0.85 * scores)  # one without trust can still be seen
    for index in np.argsort(-scores, kind="stable"):  # small points come last, above the others
        colour, spot = colours[owners[index]], spots[labels[index]]
        look: dict[str, Any] = {"marker": spot, "facecolor": colour, "edgecolor": DARK, "linewidth": 0.7}
        axes.scatter(places[index, 0], places[index, 1], s=areas[index], **look)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.15)
    axes.set_xlabel(f"first coordinate [√ln(1 + divergence / median)]; stress-1 of the map: {stress:.2f}")
    axes.set_ylabel("second coordinate [√ln(1 + divergence / median)]")
    drawing.style(axes)

    entries: list[Line2D] = []
    if edges is not None:
        entries += [entry("colour = edge", ""), *(entry(group, "o", colours[group]) for group in groups)]
    entries += [entry("shape = cluster" if edges is not None else "shape and colour = cluster", "")]
    entries += [entry(f"cluster {k}", spots[k], colours.get(f"cluster {k}", "white")) for k in kinds]
    if trust is not None:
        entries += [
            entry("size = trust", ""),
            *(entry(f"{t:g}", "o", area=full * (0.15 + 0.85 * t)) for t in (0.0, 0.5, 1.0)),
        ]
    drawing.legend(figure, entries, "outside right center", -(-len(entries) // int((side * flat - 0.6) / 0.175)))
    sentence = "Clients that lie close together behave alike"
    sentence += "" if trust is None else "; the smaller a point, the less its client is trusted"
    drawing.title(figure, sentence if num_clients > 1 else _ALONE)
    named = np.sort(np.argsort(scores, kind="stable")[:MOST_NAMED])
    left_out = drawing.label_points(axes, places[named], [names[i] for i in named], areas[named] ** 0.5 / 2)
    nameless = num_clients - len(named) + len(left_out)
    if nameless:
        axes.set_xlabel(f"{axes.get_xlabel()}; {nameless} clients not named")
    return figure


def draw_trust(
    history: Mapping[str, Sequence[float]],
    *,
    first_round: int = 1,
    every: int = 1,
    min_trust: float | None = None,
    faulty: Collection[str] | None = None,
) -> "Figure":
    """Draw trust over rounds, a line per client, and name those that fall below the rest.

    Below the rest is a client whose last trust is below ``min_trust``, or below the median of all by more than 0.1 and
    by three scaled median absolute deviations. Named are these and the faulty ones, or up to eight clients all.

    Args:
        history: trust of each client in each round in which clients were scored, in [0, 1]; nan where it was not.
        first_round: number of the first of these rounds.
        every: rounds from one of them to the next.
        min_trust: below it a client does not count; None when there is no bound.
        faulty: clients that are known to be faulty, in an experiment; None when nobody knows.

    Raises:
        ValueError: no clients or rounds, clients with different numbers of rounds, trust outside [0, 1], or faulty
            clients that have no history.

    Example:
        >>> figure = draw_trust({"a": [1.0, 0.9], "b": [0.8, 0.1]}, min_trust=0.3, faulty=["b"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['b  0.10', 'a  0.90']
    """
    from matplotlib.ticker import MaxNLocator

    lengths = sorted({len(values) for values in history.values()})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(
            f"expected at least one client, and the same number of rounds, at least 1, for all; got {lengths}: "
            "put nan where a client was not judged"
        )
    unknown = sorted(set(faulty or ()) - set(history))
    if unknown:
        raise ValueError(f"expected a history of each faulty client; got none of {unknown[:4]}: add or drop them")
    names, values = list(history), np.array([list(row) for row in history.values()], dtype=np.float64)
    _require_trust(values[~np.isnan(values)])
    latest = np.array([max(np.flatnonzero(~np.isnan(row)), default=-1) for row in values])
    last = values[np.arange(len(names)), latest]
    low, wrong = _below_the_rest(last, min_trust), np.array([name in (faulty or ()) for name in names])
    marked = low | wrong | (len(names) <= len(PALETTE))
    ends = np.flatnonzero(marked & ~np.isnan(last))
    ends = ends[np.argsort(last[ends], kind="stable")][:MOST_NAMED]

    figure = drawing.new_figure(8, max(4.5, 1.6 + len(ends) * LINE_IN))
    axes = figure.add_subplot()
    rounds = first_round + every * np.arange(lengths[0])
    looks = _looks(low, wrong, marked, known=faulty is not None)
    for index in np.argsort(marked, kind="stable"):  # those marked come last, above the others
        (colour, line), width = looks[index], 1.5 if marked[index] else 0.8
        spot = "o" if len(rounds) <= 20 else ""
        axes.plot(rounds, values[index], color=colour, linestyle=line, linewidth=width, marker=spot, markersize=3)
    axes.set(xlabel="global round", ylabel="trust, from 0 (none) to 1 (full)", ylim=(-0.03, 1.03))
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    drawing.style(axes)

    entries: list[Line2D] = []
    if faulty is not None:
        entries += [entry(f"faulty ({wrong.sum()})", colour=_RED, line="-")]
        entries += [entry(f"honest ({(~wrong & ~low).sum()})", colour=_GREY, line="-")]
        if (~wrong & low).any():
            entries += [entry(f"honest, below the rest ({(~wrong & low).sum()})", colour=_BLUE, line="--")]
    elif not marked.all():
        entries += [entry(f"the rest ({(~marked).sum()} clients)", colour=_GREY, line="-")]
    if min_trust is not None:
        axes.axhline(min_trust, color="black", linestyle=":", linewidth=1)
        entries += [entry(f"below {min_trust:g} a client does not count", colour="black", line=":")]
    if entries:
        drawing.legend(figure, entries, "outside lower left", len(entries))
    sentence = f"{low.sum() or 'None'} of {len(names)} clients {'falls' if low.sum() == 1 else 'fall'} below the rest"
    if len(names) == 1:
        sentence = _ALONE
    elif faulty is not None:
        sentence = f"{(wrong & low).sum()} of {wrong.sum()} faulty clients and {(~wrong & low).sum()} of"
        sentence += f" {(~wrong).sum()} honest ones fall below the rest"
    drawing.title(figure, sentence)
    texts = [f"{drawing.shorten(names[index])}  {last[index]:.2f}" for index in ends]
    drawing.label_ends(axes, rounds[latest[ends]], last[ends], texts, [looks[index][0] for index in ends])
    return figure


def draw_trade_off(
    weights: Sequence[float],
    latencies: npt.ArrayLike,
    divergences: npt.ArrayLike,
    chosen: int,
    *,
    weight_name: str = "weight of behaviour against latency",
) -> "Figure":
    """Draw total latency against total divergence of assignments that were computed for several weights.

    The dashed lines are the least latency and the least divergence of the assignments given, or the most if that is
    what the chosen one's weight, below 0, asks for; so give the two extreme ones too. Weights that lead to the same
    totals share a point.

    Args:
        weights: of the assignments, in any unit. [W]
        latencies: total latency of each assignment, in seconds. [W]
        divergences: total divergence of each assignment, in nats. [W]
        chosen: index of the assignment that was taken.
        weight_name: what the weights weigh.

    Raises:
        ValueError: no assignment, sequences of different lengths, totals that are negative or not finite, or a
            ``chosen`` that is no index of them.

    Example:
        >>> figure = draw_trade_off([0, 1, 9], [0.10, 0.11, 0.20], [50, 42, 40], chosen=1)
        >>> figure.get_suptitle()
        'The chosen assignment: 10% more latency and 5% more divergence than the least of each'
    """
    totals = [np.asarray(values, dtype=np.float64) for values in (weights, latencies, divergences)]
    shapes = [values.shape for values in totals]
    if shapes != [(len(weights),)] * 3 or not len(weights) or not 0 <= chosen < len(weights):
        raise ValueError(
            "expected as many latencies and divergences as weights, at least 1, and a chosen one of them; got shapes "
            f"{shapes} and chosen={chosen}: give one of each per assignment"
        )
    points = np.column_stack([totals[1] * 1000, totals[2]])
    if not (np.isfinite(points).all() and (points >= 0).all()):
        raise ValueError(f"expected finite totals of at least 0; got {points.tolist()}: leave out what failed")
    places, which = np.unique(points, axis=0, return_inverse=True)
    spans = [np.sort(totals[0][which == k]) for k in range(len(places))]
    texts = [f"{span[0]:g}" if len(set(span)) == 1 else f"{span[0]:g} to {span[-1]:g}" for span in spans]

    figure = drawing.new_figure(7.5, 5)
    axes = figure.add_subplot()
    apart = totals[0][chosen] < 0
    best = np.array([points[:, 0].min(), points[:, 1].max() if apart else points[:, 1].min()])
    axes.axvline(best[0], color=_BLUE, linestyle="--", linewidth=1)
    axes.axhline(best[1], color=_RED, linestyle="--", linewidth=1)
    axes.plot(*places.T, color=_GREY, linewidth=0.8, zorder=1)
    axes.scatter(places[:, 0], places[:, 1], s=40, color=DARK, zorder=2)
    star = points[[chosen]]
    axes.scatter(star[:, 0], star[:, 1], s=220, marker="*", facecolor=PALETTE[1], edgecolor=DARK, zorder=3)
    axes.margins(0.12)
    axes.set(xlabel="total latency [ms]", ylabel="total divergence [nats]")
    drawing.style(axes)
    entries = [
        entry(f"assignment; number: {weight_name}", "o", DARK),
        entry("the chosen one", "*", PALETTE[1], area=150),
        entry(f"least latency: {best[0]:.4g} ms", colour=_BLUE, line="--"),
        entry(f"{'most' if apart else 'least'} divergence: {best[1]:.4g} nats", colour=_RED, line="--"),
    ]
    drawing.legend(figure, entries, "outside lower left", 2)
    more = _more(points[chosen, 0], best[0])
    if apart:
        share = points[chosen, 1] / best[1] if best[1] > 0 else 1.0
        sentence = f"The chosen assignment: {more} latency than the least, and {share:.0%} of the most divergence"
    else:
        further = _more(points[chosen, 1], best[1])
        sentence = f"The chosen assignment: {more} latency and {further} divergence than the least of each"
    drawing.title(figure, sentence)
    low, high = np.array(axes.get_xlim()), np.array(axes.get_ylim())
    bounds = [np.column_stack([best[[0, 0]], high]), np.column_stack([low, best[[1, 1]]])]
    radii = np.where(np.arange(len(places)) == which[chosen], 7.0, 3.5)
    drawing.label_points(axes, places, texts, radii, [places, *bounds])
    return figure


def _looks(low: Flags, wrong: Flags, marked: Flags, known: bool) -> list[tuple[str, str]]:
    """Colour and style of each line: by kind where the faulty ones are known, else one for each marked client."""
    if known:
        return [(_RED, "-") if w else (_BLUE, "--") if lo else (_GREY, "-") for lo, w in zip(low, wrong, strict=True)]
    own = [(colour, style) for style in _STYLES for colour in PALETTE[:-1]]
    ranks = np.cumsum(marked) - 1
    return [own[rank % len(own)] if mark else (_GREY, "-") for rank, mark in zip(ranks, marked, strict=True)]


def _below_the_rest(last: Array, min_trust: float | None) -> Flags:
    judged = last[~np.isnan(last)]
    if not judged.size:
        return np.zeros(len(last), dtype=bool)
    middle = np.median(judged)
    spread = 1.4826 * np.median(np.abs(judged - middle))
    return np.asarray((last < middle - max(0.1, 3 * spread)) | (last < (min_trust or 0.0)))


def _more(value: float, least: float) -> str:
    return f"{value / least - 1:.0%} more" if least > 0 else "some more" if value > 0 else "0% more"


def _checked_divergences(divergences: npt.ArrayLike, names: Sequence[str]) -> Array:
    """A copy, exactly symmetric, with zeros in the diagonal."""
    matrix = np.asarray(divergences, dtype=np.float64).copy()
    if not len(names) or matrix.shape != (len(names), len(names)):
        raise ValueError(
            f"expected divergences of shape [N, N] for N >= 1 names; got {list(matrix.shape)} and {len(names)} names"
        )
    np.fill_diagonal(matrix, 0)
    if not np.isfinite(matrix).all():
        raise ValueError("expected finite divergences; got nan or infinite ones: leave those clients out")
    rounding = 1e-5 * np.abs(matrix).max()
    if matrix.min() < -rounding or np.abs(matrix - matrix.T).max() > rounding:
        raise ValueError("expected divergences that are symmetric and at least 0: add the matrix to its transpose")
    return np.maximum((matrix + matrix.T) / 2, 0)


def _per_client(what: str, values: Any, num_clients: int) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (num_clients,):
        raise ValueError(f"expected one of {what} for each of {num_clients} names; got shape {list(array.shape)}")
    return array


def _require_trust(values: Array) -> None:
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"expected trust between 0 and 1; got {values.min():g} to {values.max():g}: scale or clip it")
