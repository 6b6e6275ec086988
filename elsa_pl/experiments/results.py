"""The table of a suite: a row for each cell and global round, from what the runs left in their folders."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from elsa_pl.errors import ConfigurationError
from elsa_pl.experiments.cells import Outcome

FORMAT = 1
"""Of a suite's folder; another one is refused."""

COLUMNS = (
    *("case", "data_set", "method", "seed", "status", "error", "run", "round"),
    *("train_loss", "val_loss", "val_accuracy", "test_accuracy", "bytes", "seconds", "simulated_s", "peak_bytes"),
)
"""``bytes``, ``seconds`` and ``simulated_s`` are totals up to the round, training only; ``test_accuracy`` stands in the
round whose adapters were tested, and ``peak_bytes``, the first process' memory, in the last."""

_TEXTS = ("case", "data_set", "method", "status", "error", "run")


def rows_of(outcome: Outcome, folder: Path) -> list[dict[str, Any]]:
    """The rows of a cell.

    Args:
        outcome: of the cell.
        folder: of the suite, from which the run is named.
    """
    place = {**outcome.cell.place, "status": "done" if outcome.run is not None else "failed", "error": outcome.error}
    if outcome.run is None:
        return [place]
    place["run"] = Path(*[".."] * 1, *outcome.run.relative_to(folder.parent).parts).as_posix()
    return [{**place, **figures} for figures in _figures(outcome.run)]


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


def check_folder(folder: Path) -> None:
    """Refuse a suite's folder of another format.

    Raises:
        ConfigurationError: with both formats.
    """
    path = folder / "suite.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text()).get("format")
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"{path} is no suite's description: move the folder away, or give --output") from error
    if found != FORMAT:
        raise ConfigurationError(
            f"{path} is of format {found!r}, and this version of elsa_pl writes format {FORMAT}: give another --output,"
            " or use the version that wrote it"
        )


def read_results(folder: Path) -> pd.DataFrame:
    """The table of a suite, columns as in `COLUMNS`.

    Raises:
        ConfigurationError: another format, no table, or columns that are missing.
    """
    check_folder(folder)
    path = folder / "results.csv"
    try:
        # names stay names: a case may be called 0.10, and a method none
        numbers = {name: [""] for name in COLUMNS if name not in _TEXTS}
        table = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False, na_values=numbers)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"expected a suite's table in {path}; got: {error}: run the suite first") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise ConfigurationError(f"{path} lacks the columns {', '.join(missing)}: run the suite again")
    return table
