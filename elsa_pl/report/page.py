"""A page of sections, tables and pictures, with all that it shows inside of it.

A report is sent by mail, opened from an archive or years later: whatever it would load from elsewhere is missing then.
So pictures are written into the page as well as beside it, and sorting takes a few lines of script.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is shown.
        value: what is sorted by: a number, or None for nothing, which comes last; texts are sorted as they are.
        link: a file beside the page that it leads to.
    """

    text: str
    value: float | str | None = None
    link: str = ""

    @property
    def numeric(self) -> bool:
        """Whether it stands to the right."""
        return not isinstance(self.value, str)


@dataclass(frozen=True)
class Table:
    """A table whose heads sort it.

    Attributes:
        heads: of the columns.
        rows: as many cells each.
        caption: above it.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture inside of the page.

    Attributes:
        source: a data URL.
        alt: what it shows, for who does not see it.
        wide: it takes the whole width.
        dense: on a phone it moves in its frame, since its letters would be too small to read.
    """

    source: str
    alt: str
    wide: bool = False
    dense: bool = False


@dataclass
class Section:
    """A part of the page under a heading."""

    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)
    """What failed, and the message."""


@dataclass
class Page:
    """The contents of a report."""

    title: str
    subtitle: str
    figures: list[tuple[str, str]] = field(default_factory=list)
    """Headline figures: value and what it is."""
    sections: list[Section] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)
    """Long texts that open on a click: title and text."""

    def write(self, path: Path) -> Path:
        """Write it as HTML, whole or not at all; returns the path."""
        environment = Environment(
            loader=PackageLoader("elsa_pl.report", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        partial = path.with_suffix(".partial")
        partial.write_text(environment.get_template("page.html.j2").render(page=self), encoding="utf-8")
        return partial.replace(path)


def draw(figure: "Figure", path: Path, alt: str, *, wide: bool = False) -> Picture:
    """Write a figure as PNG and SVG, and return it for a page.

    Args:
        figure: drawn already.
        path: without the ending; a name such as ``dirichlet-0.1`` has none either.
        alt: what it shows.
        wide: it takes the whole width of the page.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    # appended, since a name may have a dot of its own: dirichlet-0.1
    path.with_name(f"{path.name}.svg").write_bytes(content.getvalue())
    figure.savefig(path.with_name(f"{path.name}.png"))
    return Picture(_data_url("image/svg+xml", content.getvalue()), alt, wide)


def embed(path: Path, alt: str, *, wide: bool = False) -> Picture:
    """A PNG file for a page."""
    return Picture(_data_url("image/png", path.read_bytes()), alt, wide, dense=True)


def number(value: Any, digits: int = 1, scale: float = 1.0, unit: str = "") -> Cell:
    """A cell of a number, or an empty one where there is none."""
    if value is None or value != value:
        return Cell("", None)
    return Cell(f"{float(value) * scale:,.{digits}f}{unit}", float(value))


def text(value: object) -> Cell:
    """A cell of a text, or an empty one where there is none."""
    if value is None or value != value:
        return Cell("", "")
    return Cell(str(value), str(value))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
