"""Whole runs of the command, as many at a time as there are cores; finished ones are found again by their settings."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elsa_pl.errors import ElsaError
from elsa_pl.experiments.cells import Cell, run_all
from elsa_pl.experiments.suites import put

Settings = Mapping[str, Any]


def all_of(jobs: Sequence[tuple[str, Settings]], output: Path) -> dict[str, Path]:
    """Run what has not been run, one for each core at a time; the folders of the runs by name."""
    cells = []
    for name, settings in jobs:
        config: dict[str, Any] = {}
        for key, value in settings.items():
            put(config, key, value)
        cells.append(Cell(name, config, {}))
    try:
        return run_all(cells, output)
    except ElsaError as error:
        raise SystemExit(f"error: {error}") from error


def summary(folder: Path) -> dict[str, Any]:
    """The summary of a run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def several(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and the values of the seeds."""
    return f"{statistics.mean(values):.{digits}f} ({' '.join(f'{value:.{digits}f}' for value in values)})"
