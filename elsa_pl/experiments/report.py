"""The report of a suite, from its table and what was said of it.

The means, intervals and targets that one compares methods by are computed here and not by whoever reads the table, so
that all suites are compared by the same.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from elsa_pl.errors import ConfigurationError
from elsa_pl.experiments.results import read_results, read_suite
from elsa_pl.report.curves import AXES, draw_lines, of_several
from elsa_pl.report.page import Cell, Page, Section, Table, draw, number, text

if TYPE_CHECKING:
    from elsa_pl.report.curves import Line

_MEASURES = (
    ("test_accuracy", "test accuracy [%]", 100.0),
    ("seconds", "time of training [s]", 1.0),
    ("simulated_s", "simulated time [s]", 1.0),
    ("peak_bytes", "memory [GB]", 1e-9),
)
_CHANGE = 1.5
"""A figure besides accuracy is shown where it grows by so much."""

_MOST_HEADLINES = 6

_NUMBERED = re.compile(r"(.*?)-(\d+(?:\.\d+)?)$")


def write_suite_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a suite, and its pictures into ``pictures/``; returns the page's path.

    Args:
        folder: with ``results.csv`` and ``suite.json``; see `elsa_pl.experiments.results`.

    Raises:
        ConfigurationError: no table, one of another format, or files that do not go together.
    """
    suite = read_suite(folder)
    table = read_results(folder)
    for kind in ("method", "case"):
        if unknown := sorted(set(table[kind]) - set(suite[f"{kind}s"])):
            raise ConfigurationError(
                f"{folder / 'results.csv'} has the {kind} {unknown[0]!r}, and suite.json has not: run the suite again"
            )
    done, failed = (table[table.status == status] for status in ("done", "failed"))
    cells = table.drop_duplicates(["case", "data_set", "method", "seed"])
    seeds = ", ".join(map(str, sorted(cells.seed.unique())))
    page = Page(
        title=suite["title"],
        subtitle=f"{len(cells)} runs, seeds {seeds}, size {suite['size']}; elsa_pl {suite['versions']['elsa_pl']}",
        figures=[(str(len(cells) - len(failed)), "runs ended well"), (str(len(failed)), "runs failed")],
    )
    if missing := suite.get("num_runs", len(cells)) - len(cells):
        page.figures.append((str(missing), "runs are still to come: means may be over different seeds"))
    if len(failed):
        errors = [
            (f"{row.case}, {row.data_set}, {row.method}, seed {row.seed}{_log_of(folder, row.run)}", row.error)
            for row in failed.itertuples()
        ]
        page.sections.append(Section("Failed runs", errors=errors))
    order = [name for name in suite["methods"] if name in set(cells.method)]
    cases = [name for name in suite["cases"] if name in set(done.case)]
    page.figures += _best(done, cases)
    page.sections += _by_number(folder, done, order, cases)
    for case in cases:
        for data_set, part in done[done.case == case].groupby("data_set", sort=False):
            page.sections.append(_compare(folder, suite, str(case), str(data_set), part, order))
    page.sections.append(_runs(folder, done))
    page.sections.append(_methods(suite, order))
    page.details.append(("versions", "\n".join(f"{name} {found}" for name, found in suite["versions"].items())))
    page.details.append(
        ("cases", "\n".join(f"{name}: {what or 'as in the files'}" for name, what in suite["cases"].items()))
    )
    if "configuration" in suite:  # older suites have none
        said = yaml.safe_dump(suite["configuration"], sort_keys=False, width=120)
        page.details.append(("configuration", said))
    return page.write(folder / "report.html")


def _best(done: pd.DataFrame, cases: list[str]) -> list[tuple[str, str]]:
    """The best mean test accuracy in the first cases and data sets, and whose it is."""
    kinds = ["case", "data_set", "method"]
    means = done.dropna(subset="test_accuracy").groupby(kinds, sort=False).test_accuracy.mean().reset_index()
    best = means.loc[means.groupby(kinds[:2], sort=False).test_accuracy.idxmax()]
    best = best.sort_values("case", key=lambda names: names.map(cases.index), kind="stable")
    return [
        (f"{100 * row.test_accuracy:.1f}%", f"best test accuracy in {row.case}, {row.data_set}: {row.method}")
        for row in best.head(_MOST_HEADLINES).itertuples()
    ]


def _log_of(folder: Path, run: object) -> str:
    """Where a run's output lies, if it does: not where another suite ran it under its own name."""
    return f": {run}/output.log" if run and (folder / str(run) / "output.log").is_file() else ""


def _methods(suite: dict[str, Any], order: list[str]) -> Section:
    rows = [[text(name), text(suite["methods"][name])] for name in order]
    return Section("Methods", tables=[Table(["method", "what it is"], rows)])


def _runs(folder: Path, done: pd.DataFrame) -> Section:
    """A row for each run, with its own report."""
    rows = []
    for place, part in done.groupby(["case", "data_set", "method", "seed"], sort=False):
        path = f"{part.run.iloc[0]}/report.html"
        there = (folder / path).is_file()
        *names, seed = (text(name) for name in place)
        rows.append(
            [*names, seed, number(part.test_accuracy.max(), 1, 100), Cell("report", "report", path if there else "")]
        )
    return Section("Runs", tables=[Table(["case", "data set", "method", "seed", "test accuracy [%]", "page"], rows)])


def _compare(
    folder: Path, suite: dict[str, Any], case: str, data_set: str, part: pd.DataFrame, order: list[str]
) -> Section:
    """Methods on one data set in one case."""
    target = suite["target_accuracy"].get(data_set)
    methods = [name for name in order if name in set(part.method)]
    tested = part.dropna(subset="test_accuracy").pivot_table(index="seed", columns="method", values="test_accuracy")
    heads = ["method", "test accuracy [%]", "by seed", f"points to {methods[0]}"]
    heads += ["sent [MB]", "simulated [s]", "memory [GB]"]
    if target is not None:
        heads += ["target reached", "rounds to it", "sent to it [MB]", "simulated to it [s]"]
    heads += [f"validation accuracy with {budget:g} MB [%]" for budget in suite["budgets_mb"]]
    rows = []
    for method in methods:
        own = part[part.method == method]
        accuracies = tested[method].dropna() if method in tested else pd.Series(dtype=float)
        last = own.sort_values("round").groupby("seed").last()
        by_seed = ", ".join(f"{100 * value:.1f}" for value in accuracies)
        row = [text(method), number(accuracies.mean(), 1, 100), Cell(by_seed, by_seed)]
        row += [_difference(tested, method, methods[0]), number(last.bytes.mean(), 1, 1e-6)]
        row += [number(last.simulated_s.mean(), 0), number(last.peak_bytes.mean(), 2, 1e-9)]
        if target is not None:
            row += _to_target(own, target)
        row += [_within(own, 1e6 * budget) for budget in suite["budgets_mb"]]
        rows.append(row)
    section = Section(f"{case}, {data_set}")
    section.text = suite["cases"][case]
    if target is not None:
        section.text += f"{'; ' if section.text else ''}target: {100 * target:.0f}% validation accuracy."
    section.tables.append(Table(heads, rows))
    for name, column, scale in (("rounds", "round", 1.0), ("bytes", "bytes", 1e-6), ("simulated", "simulated_s", 1.0)):
        label, against = AXES[name]
        lines = {
            method: line
            for method in methods
            if (line := _line(part[part.method == method], column, scale)) and line.x.any()  # one that sends nothing
        }
        if not lines:
            continue
        figure = draw_lines(
            lines,
            x=label,
            y="validation accuracy [%]",
            title=f"{data_set}: accuracy against {against}",
            target=None if target is None else 100 * target,
            order=order,
        )
        path = folder / "pictures" / f"{case}-{data_set}-{name}"
        section.pictures.append(draw(figure, path, f"validation accuracy of each method against {label}"))
    return section


def _difference(tested: pd.DataFrame, method: str, first: str) -> Cell:
    """Points to the first method, paired by seed, with a 95% interval from two seeds on."""
    if method == first or method not in tested or first not in tested:
        return Cell("", None)
    points = (100 * (tested[method] - tested[first])).dropna()
    if points.empty:
        return Cell("", None)
    mean = float(points.mean())
    if len(points) == 1:
        return Cell(f"{mean:+.1f}", mean)
    half = float(stats.t.ppf(0.975, len(points) - 1) * points.std(ddof=1) / len(points) ** 0.5)
    return Cell(f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]", mean)


def _to_target(own: pd.DataFrame, target: float) -> list[Cell]:
    """How many seeds reach the target, and means over these of the first round that does."""
    reached = own[own.val_accuracy >= target].sort_values("round").groupby("seed").first()
    count = own.seed.nunique()
    cells = [Cell(f"{len(reached)} of {count}", float(len(reached)))]
    cells += [number(reached["round"].mean(), 1), number(reached.bytes.mean(), 1, 1e-6)]
    return [*cells, number(reached.simulated_s.mean(), 0)]


def _within(own: pd.DataFrame, num_bytes: float) -> Cell:
    """The best round that so many bytes pay for: the mean over seeds, of which none may be without a round."""
    best = own[own.bytes <= num_bytes].dropna(subset="val_accuracy").groupby("seed").val_accuracy.max()
    return number(best.mean() if len(best) == own.seed.nunique() else float("nan"), 1, 100)


def _line(own: pd.DataFrame, column: str, scale: float) -> "Line | None":
    """Over the rounds that all seeds have."""
    heights = own.pivot_table(index="seed", columns="round", values="val_accuracy").dropna(axis=1)
    placed = own.assign(place=own[column])
    places = placed.pivot_table(index="seed", columns="round", values="place").dropna(axis=1)
    rounds = heights.columns.intersection(places.columns)
    if not len(rounds):
        return None
    return of_several(scale * places[rounds].to_numpy(), 100 * heights[rounds].to_numpy())


def _by_number(folder: Path, done: pd.DataFrame, order: list[str], cases: list[str]) -> list[Section]:
    """Figures against the numbers in the cases' names, such as faulty-0, faulty-25: charts for each data set."""
    numbered: dict[str, dict[float, str]] = {}
    for case in cases:
        if (match := _NUMBERED.match(case)) is not None:
            numbered.setdefault(match[1], {})[float(match[2])] = case
    sections = []
    for name, places in numbered.items():
        if len(places) < 2:
            continue
        section = Section(f"By {name}")
        for data_set, part in done.groupby("data_set", sort=False):
            for column, what, scale in _MEASURES:
                lines = {
                    method: line
                    for method in order
                    if (line := _against(part[part.method == method], column, scale, places))
                }
                varies = any(line.y.max() > _CHANGE * line.y.min() for line in lines.values())
                if not lines or not (varies or column == "test_accuracy"):
                    continue
                title = f"{data_set}: {what.split(' [')[0]} against {name}"
                figure = draw_lines(lines, x=name, y=what, title=title, order=order)
                path = folder / "pictures" / f"{name}-{data_set}-{column}"
                section.pictures.append(draw(figure, path, f"{what} of each method against {name}"))
        if section.pictures:
            sections.append(section)
    return sections


def _against(own: pd.DataFrame, column: str, scale: float, places: dict[float, str]) -> "Line | None":
    """The last figure of each run of a method, over the seeds that all of its places have."""
    last = own.dropna(subset=column).sort_values("round").groupby(["case", "seed"])[column].last()
    found = {place: last[case] for place, case in sorted(places.items()) if case in last.index.get_level_values("case")}
    heights = pd.DataFrame(found).dropna()
    if len(found) < 2 or not len(heights):
        return None
    return of_several(np.tile(np.array(list(found)), (len(heights), 1)), scale * heights.to_numpy())
