"""The table of a suite: a row for each cell and global round, from what the runs left in their folders.

It is written anew after each run and replaced as a whole: whatever interrupts a suite leaves a table that can be read.
One that another version wrote is refused, rather than read for something else.
"""

import functools
import json
from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from elsa_pl.errors import ConfigurationError
from elsa_pl.experiments.cells import Cell, Outcome, digest_of
from elsa_pl.experiments.suites import CELLS_FOLDER

FORMAT = 1
"""Of a suite's folder; another one is refused."""

COLUMNS = (
    *("case", "data_set", "method", "seed", "status", "error", "run", "round"),
    *("train_loss", "val_loss", "val_accuracy", "test_accuracy", "bytes", "seconds", "simulated_s", "peak_bytes"),
)
"""``bytes``, ``seconds`` and ``simulated_s`` are totals up to the round, training only; ``test_accuracy`` stands in the
round whose adapters were tested, and ``peak_bytes``, the first process' memory, in the last. ``run`` is the folder of a
run, from the suite's; that of one that failed holds its ``output.log``."""

_TEXTS = ("case", "data_set", "method", "status", "error", "run")

_DESCRIPTION: dict[str, type] = {
    "title": str,
    "size": str,
    "versions": dict,
    "methods": dict,
    "cases": dict,
    "target_accuracy": dict,
    "budgets_mb": list,
}
"""What a report needs of ``suite.json``."""

_ANEW = "move it away, and run the suite again, which takes what has ended from its runs"


def rows_of(outcome: Outcome, folder: Path) -> list[dict[str, Any]]:
    """The rows of a cell.

    Args:
        outcome: of the cell.
        folder: of the suite, from which the run is named.
    """
    place = {**outcome.cell.place, "status": "done" if outcome.run is not None else "failed", "error": outcome.error}
    if outcome.run is None:
        return [{**place, "run": _folder_of_failed(outcome.cell)}]
    place["run"] = Path("..", *outcome.run.relative_to(folder.parent).parts).as_posix()
    return [{**place, **figures} for figures in _figures(outcome.run)]


def checked(outcome: Outcome) -> Outcome:
    """The outcome, or a failed one if the figures of its run cannot be read."""
    if outcome.run is None:
        return outcome
    try:
        _figures(outcome.run)
    except (OSError, ValueError, LookupError, TypeError) as error:
        said = f"error: cannot read the figures in {outcome.run}: {error!r}: suites need metrics.csv of Lightning's"
        return Outcome(outcome.cell, error=f"{said} CSVLogger; take trainer.logger out, or delete that folder")
    return outcome


def failed_before(table: pd.DataFrame, cells: Iterable[Cell]) -> list[Outcome]:
    """Those of the cells that failed when a table was written, with their errors."""
    errors = dict(table[table.status == "failed"][["run", "error"]].itertuples(index=False))
    return [Outcome(cell, error=errors[place]) for cell in cells if (place := _folder_of_failed(cell)) in errors]


def set_aside(folder: Path, table: pd.DataFrame, digests: Container[str]) -> Path | None:
    """Give the table another name if it has runs that the next one will not have, so that no figure is lost.

    Args:
        folder: of the suite.
        table: what is there.
        digests: of the cells whose figures the next table will have.

    Returns:
        Its new path; None if the table can be replaced.
    """
    runs = table[table.status == "done"].run.unique()
    if all(digest_of(Path(run)) in digests for run in runs):
        return None
    path, description = folder / "results.csv", folder / "suite.json"
    suffix = f"-{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d_%H-%M-%S}"
    moved = path.replace(path.with_stem(path.stem + suffix))
    if description.exists():
        description.replace(description.with_stem(description.stem + suffix))
    return moved


def _folder_of_failed(cell: Cell) -> str:
    return f"../{CELLS_FOLDER}/{cell.folder}"


@functools.cache
def _figures(run: Path) -> list[dict[str, Any]]:
    """What there is in each round of a run that has ended; kept, since the table is written anew after each run."""
    table = pd.read_csv(run / "metrics.csv")
    rounds = table.drop(columns="step").groupby("epoch").max()
    tested = rounds["test_accuracy"].dropna() if "test_accuracy" in rounds else pd.Series(dtype=float)
    rounds = rounds[rounds["train_loss"].notna()]
    totals = {
        "bytes": rounds[[name for name in rounds if name.startswith("bytes/")]].sum(axis=1).cumsum(),
        "seconds": rounds[[name for name in rounds if name.startswith("seconds/")]].sum(axis=1).cumsum(),
    }
    summary = json.loads((run / "summary.json").read_text())
    rows = []
    for number, row in rounds.iterrows():
        found = {name: row.get(name) for name in ("train_loss", "val_loss", "val_accuracy")}
        found |= {name: total[number] for name, total in totals.items()}
        found["simulated_s"] = row.get("simulated/time_s")
        rows.append({"round": int(str(number)) + 1, **found})
    best = summary["tested_round"] if len(tested) else None
    for entry in rows:
        if entry["round"] == best:
            entry["test_accuracy"] = float(tested.iloc[-1])
    rows[-1]["peak_bytes"] = summary["peak_bytes"]
    return rows


def write_results(folder: Path, suite: Mapping[str, Any], outcomes: Iterable[Outcome]) -> None:
    """Write ``results.csv`` and ``suite.json``, each as a whole or not at all.

    Args:
        folder: of the suite.
        suite: what is said of it besides the table.
        outcomes: of the cells so far.
    """
    rows = [row for outcome in outcomes for row in rows_of(outcome, folder)]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(["case", "data_set", "method", "seed", "round"])
    for name, text in (
        ("suite.json", json.dumps({"format": FORMAT, **suite}, indent=2) + "\n"),
        ("results.csv", table.to_csv(index=False)),
    ):
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)


def _check_folder(folder: Path) -> None:
    """Refuse a suite's folder of another format.

    Raises:
        ConfigurationError: with both formats.
    """
    if (folder / "suite.json").exists():
        _read_description(folder)


def read_suite(folder: Path) -> dict[str, Any]:
    """What is said of a suite besides its table.

    Raises:
        ConfigurationError: no suite, another format, or something that a report needs is missing.
    """
    path = folder / "suite.json"
    if not path.is_file():
        raise ConfigurationError(f"expected a suite in {folder}; got no suite.json: run the suite first")
    found = {"budgets_mb": [], **_read_description(folder)}  # older suites have no budgets
    for name, kind in _DESCRIPTION.items():
        if not isinstance(found.get(name), kind):
            raise ConfigurationError(
                f"{path}: expected {name} to be of type {kind.__name__}; got {found.get(name)!r}: run the suite again"
            )
    return found


def read_before(folder: Path) -> pd.DataFrame:
    """The table that an earlier call left, empty if there is none; raises as `read_results`."""
    if (folder / "results.csv").exists():
        return read_results(folder)
    _check_folder(folder)
    return pd.DataFrame(columns=list(COLUMNS))


def read_results(folder: Path) -> pd.DataFrame:
    """The table of a suite, columns as in `COLUMNS`.

    Raises:
        ConfigurationError: another format, no table, columns that are missing, or texts in columns of numbers.
    """
    _check_folder(folder)
    path = folder / "results.csv"
    numbers = [name for name in COLUMNS if name not in _TEXTS]
    try:
        # names stay names: a case may be called 0.10, and a method none
        empty = {name: [""] for name in numbers}
        table = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False, na_values=empty)
        for name in numbers:
            if name in table:
                table[name] = pd.to_numeric(table[name])
    except OSError as error:
        raise ConfigurationError(f"expected a suite's table in {path}; got: {error}: run the suite first") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is no suite's table: {error}: {_ANEW}") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise ConfigurationError(f"{path} lacks the columns {', '.join(missing)}: {_ANEW}")
    return table


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "suite.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        written = found.get("format")
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"{path} is no suite's description: move the folder away, or give --output") from error
    if written != FORMAT:
        raise ConfigurationError(
            f"{path} is of format {written!r}, and this version of elsa_pl writes format {FORMAT}: give another"
            " --output, or use the version that wrote it"
        )
    return found
