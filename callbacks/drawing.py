"""Figures of one look, places on a map, and labels that cover neither each other nor the points.

matplotlib puts text where it is told to, so fifty names become a smear. Here labels of points look for free room, and
labels at the ends of lines are moved apart. Both measure the text that will be drawn, so they come last: after them
nothing in the figure may move. Figures are built without ``pyplot``, which keeps every figure in a global list and must
not be used from other threads; matplotlib is imported when something is drawn, not by whoever imports a callback.

Shapes: K labels, C candidate places, O boxes of four sides (left, bottom, right, top), in pixels.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation

Array = npt.NDArray[np.float64]

FONT_PT: Final = 8
LINE_IN: Final = 11 / 72
"""Height of a line of text and some room, in inches."""
LETTER_IN: Final = 0.068
"""Width of a wide letter, in inches."""
DARK: Final = "#333333"
# Okabe and Ito 2008, "Color universal design": told apart by colour-blind readers. The last is too light for lines.
PALETTE: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")

_TITLE_PT = 11
_DPI = 120
_GAP_PT = 2.0
_STEP_PT = 3.0
_NUM_ANGLES = 32
_NUM_TRIED = 300
_CROSSING_PT = 15.0  # a crossing is as bad as so much more distance


def new_figure(width_in: float, height_in: float, layout: str = "constrained") -> "Figure":
    """An empty figure that draws to memory; ``layout`` is matplotlib's layout engine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout=layout)  # type: ignore[arg-type]  # a Literal there
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a figure as PNG, and make the folder that it goes to.

    Raises:
        ValueError: the file name does not end in .png.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"expected a file name that ends in .png; got {path.name!r}: change its ending")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi="figure")
    return path


def style(axes: "Axes") -> None:
    """Fonts of one size."""
    axes.tick_params(labelsize=FONT_PT)
    axes.xaxis.label.set_fontsize(FONT_PT)
    axes.yaxis.label.set_fontsize(FONT_PT)


def title(figure: "Figure", sentence: str) -> None:
    """Put a sentence at the top left, in as many lines as the width needs."""
    width_in, height_in = figure.get_size_inches()
    wrapped = textwrap.fill(sentence, int((width_in - 0.2) * 72 / (0.55 * _TITLE_PT)))
    # a layout engine makes room for it only where it is free to choose the height
    height: dict[str, Any] = {} if figure.get_layout_engine() else {"y": 1 - 0.08 / height_in}
    figure.suptitle(wrapped, x=0.1 / width_in, ha="left", va="top", fontsize=_TITLE_PT, **height)


def entry(label: str, marker: str = "", colour: Any = "white", *, line: Any = "", area: float = 60.0) -> "Line2D":
    """What a legend shows beside a text: a point, a line or, without both, nothing, for a heading."""
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"markeredgecolor": DARK, "markeredgewidth": 0.7, "markersize": area**0.5}
    return Line2D([], [], label=label, marker=marker, color=colour, linestyle=line, **look)


def colours(count: int) -> list[Any]:
    """So many colours, told apart by colour-blind readers as long as there are at most eight."""
    from matplotlib import colormaps

    return list(PALETTE[:count]) if count <= len(PALETTE) else list(colormaps["viridis"](np.linspace(0, 1, count)))


def colour_bar(image: "ScalarMappable", axes: "Axes", marks: Array, label: str) -> None:
    """Fill axes with the colours of an image, with numbers of two digits at the marks."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, cax=axes)
    bar.minorticks_off()
    bar.set_ticks(marks.tolist(), labels=[f"{float(f'{mark:.2g}'):g}" for mark in marks])
    bar.set_label(label)
    style(axes)


def legend(figure: "Figure", entries: Sequence["Line2D"], place: Any, num_columns: int) -> None:
    """A legend outside of the axes; its texts are taken literally."""
    drawn = figure.legend(handles=entries, loc=place, ncols=num_columns, fontsize=FONT_PT, frameon=False)
    for text in drawn.get_texts():
        text.set_parse_math(False)


def map_places(distances: Array, seed: int) -> tuple[Array, float]:
    """Places in the plane whose distances are near those given: metric multidimensional scaling by SMACOF.

    The map is turned so that its longer side lies flat, and the first point is not left of or below the middle.

    Args:
        distances: symmetric, with zeros in the diagonal. [K, K]
        seed: of the scaling.

    Returns:
        The places [K, 2], and Kruskal's stress-1: 0 is perfect, above 0.2 is poor.
    """
    from sklearn.manifold import MDS

    if not distances.any():  # one point, or points that coincide
        return np.zeros((len(distances), 2)), 0.0
    scaling = MDS(metric="precomputed", init="classical_mds", n_init=1, normalized_stress=True, random_state=seed)
    places = scaling.fit_transform(distances)
    places -= places.mean(axis=0)
    places = places @ np.linalg.svd(places, full_matrices=False)[2].T
    return places * np.where(places[0] < 0, -1, 1), float(scaling.stress_)


def shorten(name: str, most: int = 28) -> str:
    """Leave out the middle of a long name.

    Example:
        >>> shorten("hospital-of-north-a", most=9)
        'hosp…th-a'
    """
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def label_points(
    axes: "Axes", places: Array, names: Sequence[str], radii_pt: Array, lines: Sequence[Array] = ()
) -> list[int]:
    """Write names next to points, where they cover no other name and no point; far ones get a line to their point.

    Names are placed one after the other, those at the rim of a crowd first, each at the nearest free place. To be on
    the inner side, to cover a line, or to have the own line cross names or lines, counts like being farther away.

    Args:
        axes: where the points have been drawn; nothing may be changed after this call.
        places: of the points, in data coordinates. [K, 2]
        names: of the points. [K]
        radii_pt: of the points, in typographic points. [K]
        lines: polylines that have been drawn, in data coordinates. Each [*, 2]

    Returns:
        The indices of the names that were left out because no place was free.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    _settle(figure)
    pixel = figure.dpi / 72
    gap, radii = _GAP_PT * pixel, np.asarray(radii_pt) * pixel
    points = axes.transData.transform(places)
    inside = np.array(axes.get_window_extent().extents) + gap * np.array([1, 1, -1, -1])
    blocked = np.hstack([points - radii[:, None], points + radii[:, None]])
    named = np.empty((0, 4))
    inked = np.vstack([np.empty((0, 2, 2)), *(_segments(axes.transData.transform(line)) for line in lines)])
    outward = _outward(points)
    left_out = []
    for index in np.argsort(-np.linalg.norm(outward, axis=1), kind="stable"):
        point = points[index]
        label = shorten(names[index])
        half = _size(figure, label) / 2
        centres, costs = _candidates(point, half, radii[index] + gap, outward[index], inside, pixel)
        boxes = np.hstack([centres - half - gap / 2, centres + half + gap / 2])
        free = np.flatnonzero(_within(boxes, inside) & ~_overlap(boxes, np.vstack([blocked, named])).any(axis=1))
        if not free.size:
            left_out.append(int(index))
            continue
        free = free[np.argsort(costs[free], kind="stable")][:_NUM_TRIED]
        ways = np.stack(np.broadcast_arrays(point, np.clip(point, boxes[free, :2], boxes[free, 2:])), axis=1)
        crossings = _crossings(ways, np.vstack([inked, *_diagonals(named)]))
        crossings += sum(_crossings(diagonals, inked) for diagonals in _diagonals(boxes[free]))
        best = int(np.argmin(costs[free] + _CROSSING_PT * pixel * crossings))
        box, way = boxes[free[best]], ways[best]
        named = np.vstack([named, box])
        far = bool(np.linalg.norm(way[1] - point) > radii[index] + 3 * gap)
        if far:
            inked = np.vstack([inked, way[None]])
        offset, start = (box[:2] + half - point + gap / 2) / pixel, (way[1] - box[:2]) / (box[2:] - box[:2])
        _annotate(axes, label, places[index], offset, "offset points", start if far else None)
    return sorted(left_out)


def label_ends(axes: "Axes", x: Array, heights: Array, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Write labels to the right of the axes, each beside the end of its line or, where it is crowded, nearby.

    The least squares displacement that keeps labels a line apart and in order is an isotonic regression: of
    h_k - k d, with h_k the sorted heights and d the height of a line.

    Args:
        axes: where the lines have been drawn; nothing may be changed after this call.
        x: where the lines end, in data coordinates. [K]
        heights: where they end, in data coordinates. [K]
        labels: one per line. [K]
        colours: of the lines. [K]
    """
    from scipy.optimize import isotonic_regression

    if not len(labels):
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    order = np.argsort(heights, kind="stable")
    right = ("axes fraction", "data")
    # the layout makes room for the widest one
    texts = [
        _annotate(axes, labels[k], (x[k], heights[k]), (1.05, heights[k]), right, (0, 0.5), colours[k]) for k in order
    ]
    _settle(figure)
    low, high = axes.get_ylim()
    line = LINE_IN * figure.dpi / axes.get_window_extent().height * (high - low)
    steps = np.arange(len(order)) * line
    shifted = isotonic_regression(np.asarray(heights, dtype=np.float64)[order] - steps).x
    for text, height in zip(texts, np.clip(shifted, low, max(low, high - steps[-1])) + steps, strict=True):
        text.xyann = (1.05, float(height))


def _settle(figure: "Figure") -> None:
    """Let the layout find its sizes, and keep them: from here on places in pixels can be relied on."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _annotate(
    axes: "Axes", label: str, place: Any, at: Any, coordinates: Any, start: Any, colour: str = DARK
) -> "Annotation":
    """Write text; ``start`` is where a line to the place begins, as parts of the text's width and height."""
    line = {"arrowstyle": "-", "linewidth": 0.6, "color": colour, "shrinkA": 0, "shrinkB": 0, "relpos": start}
    look: dict[str, Any] = {"fontsize": FONT_PT, "verticalalignment": "center", "parse_math": False}
    look["horizontalalignment"] = "center" if coordinates == "offset points" else "left"
    look["arrowprops"] = None if start is None else line
    return axes.annotate(label, place, at, textcoords=coordinates, annotation_clip=False, **look)


def _size(figure: "Figure", label: str) -> Array:
    """Width and height of a text, in pixels."""
    text = figure.text(0, 0, label, fontsize=FONT_PT, parse_math=False)
    extent = text.get_window_extent()
    text.remove()
    return np.array([extent.width, extent.height])


def _outward(points: Array) -> Array:
    """The direction in which each point has the fewest others, near ones counting most.

    Its length is near 1 at the rim of a crowd, and near 0 inside. [K, 2]
    """
    apart = points[:, None] - points[None]
    squares = (apart**2).sum(axis=-1, keepdims=True) + 1.0
    return np.asarray((apart / squares).sum(axis=1) / (1 / np.sqrt(squares)).sum(axis=1))


def _candidates(
    point: Array, half: Array, radius: float, outward: Array, inside: Array, pixel: float
) -> tuple[Array, Array]:
    """Where the middle of a label may be, on ever wider ellipses, and how bad that is in pixels [C, 2], [C]."""
    angles = np.linspace(0, 2 * np.pi, _NUM_ANGLES, endpoint=False)
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    reaches = radius + _STEP_PT * pixel * np.concatenate([[0.0], np.cumsum(1.06 ** np.arange(60))])
    reaches = reaches[reaches < max(inside[2:] - inside[:2])]
    centres = point + reaches[:, None, None] * directions + directions * half
    costs = reaches[:, None] - 6 * pixel * directions @ outward
    return centres.reshape(-1, 2), costs.ravel()


def _within(boxes: Array, sides: Array) -> npt.NDArray[np.bool_]:
    return np.asarray((boxes[:, :2] >= sides[:2]).all(axis=1) & (boxes[:, 2:] <= sides[2:]).all(axis=1))


def _overlap(boxes: Array, others: Array) -> npt.NDArray[np.bool_]:
    """Which boxes overlap which others [C, O]."""
    left, bottom, right, top = boxes.T[..., None]
    wide = (left < others[:, 2]) & (right > others[:, 0])
    return np.asarray(wide & (bottom < others[:, 3]) & (top > others[:, 1]))


def _segments(line: Array) -> Array:
    return np.stack([line[:-1], line[1:]], axis=1)


def _diagonals(boxes: Array) -> tuple[Array, Array]:
    """A line through a box crosses at least one of these, each [O, 2, 2]."""
    return boxes.reshape(-1, 2, 2), boxes[:, [0, 3, 2, 1]].reshape(-1, 2, 2)


def _crossings(segments: Array, others: Array) -> npt.NDArray[np.int64]:
    """How many of the others each segment crosses [C]."""

    def side(line: Array, points: Array) -> Array:
        way, to = line[..., 1, :] - line[..., 0, :], points - line[..., 0, :]
        return np.asarray(np.sign(way[..., 0] * to[..., 1] - way[..., 1] * to[..., 0]))

    first, second = segments[:, None], others[None]
    apart = side(second, first[..., 0, :]) * side(second, first[..., 1, :]) < 0
    return np.asarray((apart & (side(first, second[..., 0, :]) * side(first, second[..., 1, :]) < 0)).sum(axis=1))
