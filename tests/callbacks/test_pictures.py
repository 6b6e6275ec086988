"""Pictures of clients: real figures are drawn, their texts measured, and written as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib import image, pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from elsa_pl.callbacks.drawing import FONT_PT
from elsa_pl.callbacks.pictures import MOST_NAMED, draw_divergences, draw_map, draw_trade_off, draw_trust, save

Array = npt.NDArray[np.float64]
SHORT, LONG = "client-{}", "hospital-of-north-{}"
SIZES = [(1, SHORT), (2, LONG), (8, SHORT), (20, LONG), (50, SHORT), (50, LONG)]


class Fleet(NamedTuple):
    divergences: Array
    names: list[str]
    clusters: list[int]
    edges: list[str]
    trust: list[float]
    faulty: list[str]


def fleet(num_clients: int, name: str = SHORT, far: bool = True) -> Fleet:
    """Clients in up to four groups and, among eight or more, one that is far from all; every fifth is faulty."""
    generator = np.random.default_rng(num_clients)
    clusters = np.arange(num_clients) % 4
    states = generator.normal(size=(4, 16))[clusters] * 2 + generator.normal(size=(num_clients, 16)) / 2
    if far and num_clients >= 8:
        states[1] += 40
    divergences = ((states[:, None] - states) ** 2).sum(axis=-1) / 2
    wrong = np.arange(num_clients) % 5 == 1
    return Fleet(
        divergences,
        [name.format(index) for index in range(num_clients)],
        clusters.tolist(),
        [f"edge-{edge}" for edge in generator.integers(0, 4, num_clients)],
        np.where(wrong, 0.1, generator.uniform(0.8, 1, num_clients)).tolist(),
        [name.format(index) for index in np.flatnonzero(wrong)],
    )


def history(clients: Fleet, num_rounds: int = 6) -> dict[str, list[float]]:
    """Trust that goes from 1 to the client's own in straight lines."""
    lines = np.linspace(1, clients.trust, num_rounds).T
    return dict(zip(clients.names, lines.tolist(), strict=True))


def texts_of(figure: Figure) -> list[Text]:
    """The texts that are drawn: not those of ticks outside of the axes' limits."""
    figure.draw_without_rendering()
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        hidden |= {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = (text for text in figure.findobj(Text) if isinstance(text, Text) and id(text) not in hidden)
    return [text for text in found if text.get_visible() and text.get_text()]


def sides_of(texts: Sequence[Text]) -> Array:
    """Left, bottom, right and top of the texts, without the lines to their points. [*, 4]"""
    return np.array([Text.get_window_extent(text).extents for text in texts]).reshape(-1, 4)


def overlaps(sides: Array) -> list[tuple[int, int]]:
    a, b = sides[:, None], sides[None]
    hit = (a[..., :2] < b[..., 2:]).all(axis=-1) & (b[..., :2] < a[..., 2:]).all(axis=-1)
    return list(zip(*np.nonzero(np.triu(hit, k=1)), strict=True))


def require_legible(figure: Figure) -> None:
    """Every text is at least 8 points high, lies within the figure, and covers no other text."""
    texts = texts_of(figure)
    sides = sides_of(texts)
    hit = [(texts[i].get_text(), texts[j].get_text()) for i, j in overlaps(sides)]
    assert not hit
    assert min(float(text.get_fontsize()) for text in texts) >= FONT_PT
    limits = figure.get_size_inches() * figure.dpi
    outside = np.flatnonzero(((sides[:, :2] < 0) | (sides[:, 2:] > limits)).any(axis=1))
    assert not [texts[index].get_text() for index in outside]


def labels(axes: Axes, axis: str) -> list[str]:
    return [label.get_text() for label in (axes.get_xticklabels() if axis == "x" else axes.get_yticklabels())]


def entries(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize(("num_clients", "name"), SIZES)
def test_divergences_are_legible(num_clients: int, name: str) -> None:
    clients = fleet(num_clients, name)
    figure = draw_divergences(clients.divergences, clients.names, clients.clusters)
    require_legible(figure)


@pytest.mark.parametrize(("num_clients", "name"), SIZES)
def test_maps_are_legible(num_clients: int, name: str) -> None:
    clients = fleet(num_clients, name)
    figure = draw_map(
        clients.divergences, clients.names, clusters=clients.clusters, edges=clients.edges, trust=clients.trust
    )
    require_legible(figure)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == sorted(clients.names)


@pytest.mark.parametrize(("num_clients", "name"), SIZES)
@pytest.mark.parametrize("known", [False, True])
def test_trust_is_legible(num_clients: int, name: str, known: bool) -> None:
    clients = fleet(num_clients, name)
    figure = draw_trust(history(clients), min_trust=0.3, faulty=clients.faulty if known else None)
    require_legible(figure)


def test_pictures_are_written_as_png_into_a_new_folder(tmp_path: Path) -> None:
    clients = fleet(8)
    figures = {
        "divergences": draw_divergences(clients.divergences, clients.names, clients.clusters),
        "clients": draw_map(clients.divergences, clients.names, clusters=clients.clusters),
        "trust": draw_trust(history(clients)),
        "assignment": draw_trade_off([0, 1], [0.1, 0.2], [2, 1], 1),
    }
    for name, figure in figures.items():
        path = save(figure, tmp_path / "new" / "folder" / f"{name}.png")
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(path)
        assert pixels.shape[:2] == tuple(int(side) for side in figure.get_size_inches()[::-1] * figure.dpi)
        assert pixels.std() > 0.01
    assert not pyplot.get_fignums()  # no figure is kept by anybody else


def test_the_matrix_is_ordered_by_cluster_and_its_borders_are_those_of_the_clusters() -> None:
    clients = fleet(8, far=False)
    clusters = [1, 0, 1, 0, 2, 0, 1, 0]
    figure = draw_divergences(clients.divergences, clients.names, clusters)
    order = [1, 3, 5, 7, 0, 2, 6, 4]
    axes = figure.axes[0]
    assert labels(axes, "y") == labels(axes, "x") == [clients.names[index] for index in order]
    drawn: Any = axes.images[0].get_array()
    cells = np.ma.getdata(drawn)
    expected = clients.divergences[np.ix_(order, order)]
    off = ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(cells[off], expected[off])
    assert np.isnan(cells.diagonal()).all()
    borders: list[Any] = list(axes.patches)
    assert {(border.get_x(), border.get_width()) for border in borders} == {(-0.5, 4), (3.5, 3), (6.5, 1)}
    assert {text.get_text() for text in texts_of(figure)} >= {"cluster 0", "cluster 1", "cluster 2"}


def test_the_colour_bar_has_a_unit_and_spans_the_divergences() -> None:
    clients = fleet(8)
    figure = draw_divergences(clients.divergences, clients.names, clients.clusters)
    bar = figure.axes[1]
    apart = clients.divergences[~np.eye(8, dtype=bool)]
    assert "nats" in bar.get_ylabel()
    assert bar.get_ylim() == pytest.approx((apart.min(), apart.max()))
    assert [float(label) for label in labels(bar, "y")][::4] == pytest.approx([apart.min(), apart.max()], rel=0.06)


@pytest.mark.parametrize("num_clients", [1, 3])
def test_identical_clients_are_drawn(num_clients: int) -> None:
    names = [f"client-{index}" for index in range(num_clients)]
    nothing = np.zeros((num_clients, num_clients))
    require_legible(draw_divergences(nothing, names, [0] * num_clients))
    figure = draw_map(nothing, names, clusters=[0] * num_clients)
    require_legible(figure)
    assert len(figure.axes[0].texts) == num_clients


def test_one_value_for_all_pairs_is_drawn() -> None:
    require_legible(draw_divergences(2 * (1 - np.eye(3)), ["a", "b", "c"], [0, 0, 0]))


def test_a_tensor_with_rounding_errors_is_drawn() -> None:
    divergences = torch.tensor([[1e-7, 1.0], [1.0000001, -1e-7]])
    require_legible(draw_divergences(divergences, ["a", "b"], torch.tensor([0, 1])))


def test_of_very_many_clients_the_clusters_are_named() -> None:
    clients = fleet(MOST_NAMED + 20)
    figure = draw_divergences(clients.divergences, clients.names, clients.clusters)
    require_legible(figure)
    assert labels(figure.axes[0], "y") == []
    assert {text.get_text() for text in texts_of(figure)} >= {f"cluster {number}" for number in range(4)}


def test_of_very_many_clients_the_least_trusted_are_named_on_the_map() -> None:
    clients = fleet(MOST_NAMED + 20)
    figure = draw_map(clients.divergences, clients.names, clusters=clients.clusters, trust=clients.trust)
    require_legible(figure)
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert len(shown) == MOST_NAMED
    assert set(clients.faulty) < shown
    assert figure.axes[0].get_xlabel().endswith("; 20 clients not named")


def test_colour_is_the_edge_shape_the_cluster_and_size_the_trust() -> None:
    clients = fleet(20)
    figure = draw_map(
        clients.divergences, clients.names, clusters=clients.clusters, edges=clients.edges, trust=clients.trust
    )
    points = points_by_client(figure, clients)
    looks: list[Any] = [points[name] for name in clients.names]
    colours = [to_hex(point.get_facecolor()[0]) for point in looks]
    shapes = [
        len(point.get_paths()[0].vertices) * 1000 + point.get_paths()[0].vertices[0].round(3).sum() for point in looks
    ]
    for found, meant in ((colours, clients.edges), (shapes, clients.clusters)):
        assert len(set(zip(found, meant, strict=True))) == len(set(found)) == len(set(meant))
    sizes = np.array([point.get_sizes()[0] for point in looks])
    slope, least = np.polyfit(clients.trust, sizes, 1)
    np.testing.assert_allclose(least + slope * np.array(clients.trust), sizes)
    assert slope > least > 0
    assert entries(figure) == [
        *("colour = edge", "edge-0", "edge-1", "edge-2", "edge-3"),
        *("shape = cluster", "cluster 0", "cluster 1", "cluster 2", "cluster 3"),
        *("size = trust", "0", "0.5", "1"),
    ]


def points_by_client(figure: Figure, clients: Fleet) -> dict[str, Any]:
    """The point that each name is written for."""
    points: list[Any] = list(figure.axes[0].collections)
    found = {}
    for text in figure.axes[0].texts:
        at: Any = text
        distances = [np.abs(point.get_offsets()[0] - np.array(at.xy)).max() for point in points]
        found[text.get_text()] = points[int(np.argmin(distances))]
    assert len(set(map(id, found.values()))) == len(clients.names)
    return found


def test_without_edges_and_trust_the_colour_is_the_cluster_and_all_points_are_equally_large() -> None:
    clients = fleet(20)
    figure = draw_map(clients.divergences, clients.names, clusters=clients.clusters)
    looks: list[Any] = [points_by_client(figure, clients)[name] for name in clients.names]
    colours = [to_hex(point.get_facecolor()[0]) for point in looks]
    assert len(set(zip(colours, clients.clusters, strict=True))) == len(set(colours)) == 4
    assert len({point.get_sizes()[0] for point in looks}) == 1
    assert "size = trust" not in entries(figure)


def test_a_map_with_more_edges_and_clusters_than_colours_and_shapes_is_legible() -> None:
    clients = fleet(20)
    edges, clusters = [f"site_{index % 16}" for index in range(20)], list(range(20))
    figure = draw_map(clients.divergences, clients.names, clusters=clusters, edges=edges, trust=clients.trust)
    require_legible(figure)
    assert {"site_2", "site_15", "cluster 19"} <= set(entries(figure))


def test_clients_that_behave_alike_lie_close() -> None:
    clients = fleet(20, far=False)
    figure = draw_map(clients.divergences, clients.names, clusters=clients.clusters)
    points = points_by_client(figure, clients)
    places = np.array([points[name].get_offsets()[0] for name in clients.names], dtype=np.float64)
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    same = np.equal.outer(clients.clusters, clients.clusters)
    assert distances[same].max() < distances[~same].min()


def test_names_are_taken_literally_and_long_ones_shortened() -> None:
    names = ["_a", "cost$1$", "x" * 60]
    figure = draw_map(1 - np.eye(3), names, clusters=[0, 1, 2], edges=["_e", "$x^2$", "c"])
    require_legible(figure)
    assert {"_e", "$x^2$"} <= set(entries(figure))
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert {"_a", "cost$1$"} < shown
    assert max(map(len, shown)) < 30
    assert labels(draw_divergences(1 - np.eye(3), names, [0, 0, 0]).axes[0], "y")[:2] == names[:2]


def test_those_that_fall_below_the_rest_are_named_and_the_honest_are_grey() -> None:
    clients = fleet(50)
    figure = draw_trust(history(clients), min_trust=0.3, faulty=clients.faulty)
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {f"{name}  0.10" for name in clients.faulty}
    colours = [to_hex(line.get_color()) for line in axes.lines]
    assert colours.count("#999999") == 40
    assert colours.count("#d55e00") == 10
    assert "faulty (10)" in entries(figure)
    assert figure.get_suptitle() == "10 of 10 faulty clients and 0 of 40 honest ones fall below the rest"


def test_trust_is_drawn_at_the_rounds_of_the_scorings() -> None:
    (line,) = draw_trust({"a": [1.0, 0.9, 0.4]}, first_round=2, every=5).axes[0].lines
    assert np.asarray(line.get_xdata()).tolist() == [2, 7, 12]


def test_a_missed_faulty_client_and_a_suspected_honest_one_are_named() -> None:
    lines = {f"client-{index}": [1.0, 0.9] for index in range(20)}
    lines["client-4"] = [1.0, 0.2]
    figure = draw_trust(lines, faulty=["client-5"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["client-4  0.20", "client-5  0.90"]
    assert "honest, below the rest (1)" in entries(figure)
    assert figure.get_suptitle() == "0 of 1 faulty clients and 1 of 19 honest ones fall below the rest"


def test_without_knowledge_those_below_the_rest_are_named_with_and_without_a_bound() -> None:
    lines = {f"client-{index}": [1.0, 0.9] for index in range(20)}
    lines["client-4"] = [1.0, 0.7]
    assert [text.get_text() for text in draw_trust(lines).axes[0].texts] == ["client-4  0.70"]
    figure = draw_trust({name: [0.2] for name in lines}, min_trust=0.3)
    assert len(figure.axes[0].texts) == 20
    assert figure.get_suptitle() == "20 of 20 clients fall below the rest"
    assert draw_trust({name: [0.2] for name in lines}).get_suptitle() == "None of 20 clients fall below the rest"


@pytest.mark.parametrize("num_clients", [50, MOST_NAMED + 20])
def test_labels_stay_legible_and_in_order_when_all_lines_end_together(num_clients: int) -> None:
    generator = np.random.default_rng(0)
    lines = {f"client-{index}": [1.0, value] for index, value in enumerate(generator.uniform(0, 0.1, num_clients))}
    figure = draw_trust(lines, min_trust=0.5)
    require_legible(figure)
    texts: list[Any] = list(figure.axes[0].texts)
    assert len(texts) == min(num_clients, MOST_NAMED)
    assert [text.xy[1] for text in texts] == sorted(text.xy[1] for text in texts)
    assert [text.xyann[1] for text in texts] == sorted(text.xyann[1] for text in texts)


def test_rounds_are_counted_from_the_first_and_gaps_stay_gaps() -> None:
    lines = {"a": [1.0, float("nan"), 0.6], "b": [0.9, 0.8, float("nan")], "c": [float("nan")] * 3}
    axes = draw_trust(lines, first_round=3).axes[0]
    drawn = {tuple(np.nan_to_num(np.asarray(line.get_ydata()), nan=-1)): line.get_xdata() for line in axes.lines}
    assert set(drawn) == {(1, -1, 0.6), (0.9, 0.8, -1), (-1, -1, -1)}
    assert all(list(np.asarray(rounds)) == [3, 4, 5] for rounds in drawn.values())
    texts: list[Any] = list(axes.texts)
    assert {(text.get_text(), text.xy) for text in texts} == {("a  0.60", (5, 0.6)), ("b  0.80", (4, 0.8))}


def test_the_trade_off_marks_the_chosen_assignment_and_both_optima() -> None:
    weights, latencies, divergences = [0, 0.5, 1, 2, 9], [0.6, 0.6, 0.66, 0.9, 1.0], [90, 90, 60, 55, 54]
    figure = draw_trade_off(weights, latencies, divergences, chosen=2)
    require_legible(figure)
    axes = figure.axes[0]
    dashed = [np.column_stack([*line.get_data()]) for line in axes.lines if line.get_linestyle() == "--"]
    assert [line[0, 0] for line in dashed if np.ptp(line[:, 0]) == 0] == [600]
    assert [line[0, 1] for line in dashed if np.ptp(line[:, 1]) == 0] == [54]
    star: Any = axes.collections[-1]
    np.testing.assert_allclose(star.get_offsets(), [[660, 60]])
    assert {text.get_text() for text in axes.texts} == {"0 to 0.5", "1", "2", "9"}
    assert figure.get_suptitle().startswith("The chosen assignment: 10% more latency and 11% more divergence")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("total latency [ms]", "total divergence [nats]")


def test_the_trade_off_of_who_wants_unlike_clients_together_marks_the_most_divergence() -> None:
    weights, latencies, divergences = [0, -0.5, -1, -9], [0.6, 0.6, 0.66, 1.0], [60, 60, 90, 120]
    figure = draw_trade_off(weights, latencies, divergences, chosen=2)
    require_legible(figure)
    axes = figure.axes[0]
    dashed = [np.column_stack([*line.get_data()]) for line in axes.lines if line.get_linestyle() == "--"]
    assert [line[0, 1] for line in dashed if np.ptp(line[:, 1]) == 0] == [120]
    title = " ".join(figure.get_suptitle().split())
    assert title == "The chosen assignment: 10% more latency than the least, and 75% of the most divergence"


@pytest.mark.parametrize(
    ("latencies", "divergences"),
    [([0.5], [3]), ([0.5, 0.5, 0.5], [3, 3, 3]), ([0, 0.1], [2, 0]), (range(30), range(30, 0, -1))],
)
def test_any_trade_off_is_legible(latencies: list[float], divergences: list[float]) -> None:
    weights = [0.0, *np.geomspace(0.01, 100, len(latencies))][1:]
    figure = draw_trade_off(weights, latencies, divergences, chosen=0)
    require_legible(figure)


NAMES = ["a", "b"]
FINE = [[0.0, 1.0], [1.0, 0.0]]
