"""Places on a map, and labels that find room or say that there is none."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text

from elsa_pl.callbacks import drawing

Array = npt.NDArray[np.float64]


def points_drawn(places: Array, side_in: float = 5.0) -> Axes:
    axes = drawing.new_figure(side_in, side_in).add_subplot()
    axes.scatter(places[:, 0], places[:, 1])
    axes.margins(0.2)
    return axes


def sides_of(axes: Axes) -> Array:
    """Left, bottom, right and top of the labels, without the lines to their points. [*, 4]"""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    return np.array([Text.get_window_extent(text).extents for text in axes.texts]).reshape(-1, 4)


def num_overlaps(sides: Array) -> int:
    """The obvious slow way."""
    pairs = [(a, b) for i, a in enumerate(sides) for b in sides[:i]]
    return sum(bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]) for a, b in pairs)


@pytest.mark.parametrize("shape", [(2, 1), (9, 2), (30, 2)])
def test_places_are_those_of_points_in_the_plane(shape: tuple[int, int]) -> None:
    points = np.random.default_rng(0).normal(size=shape)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    places, stress = drawing.map_places(distances, seed=0)
    np.testing.assert_allclose(np.linalg.norm(places[:, None] - places, axis=-1), distances, atol=2e-3)
    assert stress < 2e-3
    assert np.ptp(places, axis=0)[0] >= np.ptp(places, axis=0)[1]
    assert (places[0] >= 0).all()
    np.testing.assert_array_equal(drawing.map_places(distances, seed=0)[0], places)


def test_places_of_a_tetrahedron_do_not_fit_the_plane() -> None:
    _, stress = drawing.map_places(1 - np.eye(4), seed=0)
    assert 0.1 < stress < 0.5


@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0])
def test_labels_of_points_cover_no_label_and_no_point(spread: float) -> None:
    places = np.random.default_rng(0).normal(size=(25, 2)) * spread
    places = np.vstack([places, [[-1.0, -1.0], [1.0, 1.0]]])
    axes = points_drawn(places)
    names = [f"client-{index}" for index in range(len(places))]
    assert drawing.label_points(axes, places, names, np.full(len(places), 3.0)) == []
    sides = sides_of(axes)
    assert num_overlaps(sides) == 0
    points = axes.transData.transform(places)
    inside = (sides[:, None, :2] < points).all(axis=-1) & (points < sides[:, None, 2:]).all(axis=-1)
    assert not inside.any()
    at: dict[str, Any] = {text.get_text(): text for text in axes.texts}
    assert all(tuple(at[name].xy) == tuple(place) for name, place in zip(names, places, strict=True))


def test_a_label_beside_its_point_has_no_line_and_one_far_away_has() -> None:
    places = np.vstack([np.zeros((12, 2)), [[3.0, 3.0]]])
    axes = points_drawn(places)
    drawing.label_points(axes, places, [*(f"crowd-{index}" for index in range(12)), "alone"], np.full(13, 3.0))
    lines = {text.get_text(): text.arrow_patch for text in axes.texts if hasattr(text, "arrow_patch")}
    assert lines["alone"] is None
    assert sum(line is not None for line in lines.values()) > 6


def test_names_without_room_are_reported_and_not_drawn() -> None:
    places = np.random.default_rng(0).normal(size=(60, 2))
    axes = points_drawn(places, side_in=1.8)
    left_out = drawing.label_points(axes, places, [f"client-{index}" for index in range(60)], np.full(60, 3.0))
    assert left_out
    shown = {text.get_text() for text in axes.texts}
    assert shown == {f"client-{index}" for index in range(60) if index not in left_out}
    assert num_overlaps(sides_of(axes)) == 0


def test_a_label_does_not_lie_on_a_line_when_there_is_room_beside_it() -> None:
    places = np.array([[0.0, 0.0], [1.0, 1.0]])
    axes = points_drawn(places)
    line = np.array([[-1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])
    drawing.label_points(axes, places, ["first", "second"], np.full(2, 3.0), [line])
    drawn = np.vstack([np.linspace(line[0], line[1], 500), np.linspace(line[1], line[2], 500)])
    pixels = axes.transData.transform(drawn)
    sides = sides_of(axes)
    assert not ((sides[:, None, :2] < pixels) & (pixels < sides[:, None, 2:])).all(axis=-1).any()


@pytest.mark.parametrize("heights", [[0.5], [0.0, 1.0], [0.5] * 8, [0.0, 0.01, 0.02, 0.5, 0.99, 1.0]])
def test_labels_at_the_ends_of_lines_move_apart_and_no_further(heights: list[float]) -> None:
    axes = drawing.new_figure(5, 5).add_subplot()
    axes.set_ylim(0, 1)
    for height in heights:
        axes.plot([0, 1], [0, height])
    labels = [f"label-{index}" for index in range(len(heights))]
    drawing.label_ends(axes, np.ones(len(heights)), np.array(heights), labels, ["black"] * len(heights))
    texts: list[Any] = list(axes.texts)
    placed = np.array([text.xyann[1] for text in texts])
    assert num_overlaps(sides_of(axes)) == 0
    line = drawing.LINE_IN * axes.figure.dpi / axes.get_window_extent().height
    assert (np.diff(placed) > line - 1e-9).all()
    assert np.abs(placed - np.sort(heights)).max() <= line * len(heights)
    if len(heights) < 3:
        np.testing.assert_allclose(placed, heights)


def test_a_long_name_keeps_its_ends() -> None:
    assert drawing.shorten("client-1") == "client-1"
    assert drawing.shorten("a" * 30 + "b" * 30) == "a" * 13 + "…" + "b" * 13


def test_only_png_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png; got 'trust\.pdf'"):
        drawing.save(drawing.new_figure(1, 1), tmp_path / "trust.pdf")
