"""Lines of several methods, or of one run, over rounds, bytes and simulated time.

Runs and suites draw the same curves, and a method has one colour and one kind of line in all pictures of a page: drawn
in two places, they would soon differ.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from elsa_pl.callbacks import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

AXES = {
    "rounds": ("global round", "rounds"),
    "bytes": ("sent in training [MB]", "bytes sent"),
    "simulated": ("simulated time [s]", "simulated time"),
}
"""What accuracy is drawn against: the axis' label, and what a title calls it."""

_WIDTH_IN = 4.4
"""Letters are to be read on a phone, which makes a picture as narrow as it is itself."""
_MARK_IN = 0.5
"""A line in the legend, with the room around it."""


class Line(NamedTuple):
    """One line of a chart, with a band around it where there are several seeds; all of one length."""

    x: Array
    y: Array
    low: Array
    high: Array


def of_one(x: Sequence[float], y: Sequence[float]) -> Line:
    """A line without a band; places without a height are left out."""
    places, heights = np.asarray(x, float), np.asarray(y, float)
    there = np.isfinite(places) & np.isfinite(heights)
    return Line(places[there], heights[there], heights[there], heights[there])


def of_several(x: Array, y: Array) -> Line:
    """The mean over seeds, and from the least to the largest.

    Args:
        x: place of each round. [S, R]
        y: height. [S, R]
    """
    return Line(x.mean(0), y.mean(0), y.min(0), y.max(0))


def draw_lines(
    lines: Mapping[str, Line],
    *,
    x: str,
    y: str,
    title: str,
    target: float | None = None,
    order: Sequence[str] | None = None,
) -> "Figure":
    """Draw lines of one colour each.

    Args:
        lines: by name, which the legend shows where there are several.
        x: what the places are, with their unit.
        y: what the heights are.
        title: a sentence above.
        target: a height to be reached.
        order: all names that any of the charts shows which are read together: a name has one colour in all of them.

    Raises:
        ValueError: no lines.
    """
    from matplotlib.ticker import MaxNLocator

    if not lines:
        raise ValueError("expected at least one line; got none")
    num_entries = len(lines) + (target is not None)
    num_columns = max(1, min(3, int(_WIDTH_IN / (_MARK_IN + drawing.LETTER_IN * max(map(len, lines))))))
    num_rows = -(-num_entries // num_columns) if num_entries > 1 else 0
    figure = drawing.new_figure(_WIDTH_IN, 2.8 + drawing.LINE_IN * num_rows)
    axes = figure.add_subplot()
    entries = []
    styles = ("-", "--", ":", "-.")
    palette = drawing.PALETTE[:-1]
    names = list(order or lines)
    for name, line in lines.items():
        place = names.index(name)
        colour, style = palette[place % len(palette)], styles[place // len(palette) % len(styles)]
        marker = "o" if len(line.x) <= 20 else ""
        axes.plot(line.x, line.y, color=colour, linestyle=style, linewidth=1.5, marker=marker, markersize=3)
        if not np.array_equal(line.low, line.high):
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.12, linewidth=0)
        entries.append(drawing.entry(name, colour=colour, line=style))
    if target is not None:
        axes.axhline(target, color=drawing.DARK, linestyle=":", linewidth=1)
        entries.append(drawing.entry("target", colour=drawing.DARK, line=":"))
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    if "round" in x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    drawing.style(axes)
    if len(entries) > 1:
        drawing.legend(figure, entries, "outside lower left", num_columns)
    drawing.title(figure, title)
    return figure


def draw_bars(rows: Mapping[str, Mapping[str, float]], *, x: str, title: str) -> "Figure":
    """Draw stacked bars, one above the other.

    Args:
        rows: by name of the bar, the length of each of its parts by name; all have the same parts.
        x: what lengths are, with their unit.
        title: a sentence above.

    Raises:
        ValueError: no bars.
    """
    if not rows:
        raise ValueError("expected at least one bar; got none")
    figure = drawing.new_figure(_WIDTH_IN, max(1.8, 0.9 + 0.35 * len(rows)))
    axes = figure.add_subplot()
    parts = list(next(iter(rows.values())))
    left = np.zeros(len(rows))
    entries = []
    for part, colour in zip(parts, drawing.colours(len(parts)), strict=True):
        lengths = np.array([row[part] for row in rows.values()])
        axes.barh(list(rows), lengths, left=left, color=colour, height=0.6)
        left += lengths
        entries.append(drawing.entry(part, "s", colour))
    axes.invert_yaxis()
    axes.set_xlabel(x)
    drawing.style(axes)
    if len(parts) > 1:
        drawing.legend(figure, entries, "outside lower left", 3)
    drawing.title(figure, title)
    return figure
