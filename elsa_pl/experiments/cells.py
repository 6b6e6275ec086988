"""Cells of a suite: one run of the command each, in a process of its own, found again by its settings.

Cells lie beside the suites and not in them, so that suites with a run in common share it.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import elsa_pl
from elsa_pl.errors import ElsaError

_LINES_OF_ERROR = 12
_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: for people.
        config: settings, as the contents of one file for train.py.
        place: what the table says of it besides its figures.
    """

    name: str
    config: Mapping[str, Any]
    place: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of its settings and of the version that runs them: what makes two cells the same, whatever their names."""
        settings = json.dumps([version("elsa_pl"), self.config], sort_keys=True, default=str)
        return hashlib.sha256(settings.encode()).hexdigest()[:10]

    @property
    def folder(self) -> str:
        """Where it runs."""
        return f"{self.name}-{self.digest}"

    def write(self, path: Path) -> None:
        """Write its settings as a configuration of train.py."""
        path.write_text(yaml.safe_dump(dict(self.config), sort_keys=False))


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: its run's folder, or the error."""

    cell: Cell
    run: Path | None = None
    error: str = ""
    seconds: float = 0.0

    @property
    def short_error(self) -> str:
        """The error in a line."""
        first, *more = self.error.splitlines()
        return first if not more or first.startswith("error:") else f"{first}: {more[-1]}"


def find_run(cells: Path, cell: Cell) -> Path | None:
    """The folder of a cell's run among all cells, if it has ended well."""
    return next((path.parent for path in sorted(cells.glob(f"*-{cell.digest}/*/summary.json"))), None)


def digest_of(run: Path) -> str:
    """The digest of the cell that a run is of, from the run's folder: see `Cell.folder`."""
    return run.parent.name.rpartition("-")[2]


class Runner:
    """Runs cells and ends them on request.

    Args:
        cells: folder of all cells.
    """

    def __init__(self, cells: Path) -> None:
        self._cells = cells
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def find(self, cell: Cell) -> Path | None:
        """The folder of the cell's run, if it has ended well."""
        return find_run(self._cells, cell)

    def run(self, cell: Cell) -> Outcome:
        """Run a cell unless it has ended well before. An error is part of the outcome."""
        found = self.find(cell)
        if found is not None:
            return Outcome(cell, found)
        start = time.monotonic()
        folder = self._cells / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        cell.write(config)
        log = folder / "output.log"
        root = str(Path(elsa_pl.__file__).parent.parent)
        arguments = ["fit", "--config", str(config), "--output_dir", str(self._cells), "--name", cell.folder]
        with log.open("wb") as output, self._lock:
            if self._stopped:
                return Outcome(cell, error="not run")
            process = subprocess.Popen(
                [sys.executable, "-m", "elsa_pl.cli", *arguments],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "TORCH_CPP_LOG_LEVEL": "ERROR",
                    "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            process.wait()
        finally:
            with self._lock:
                self._running.discard(process)
        seconds = time.monotonic() - start
        found = self.find(cell)
        if process.returncode == 0 and found is not None:
            return Outcome(cell, found, seconds=seconds)
        return Outcome(cell, error=error_of(log.read_text(errors="replace"), process.returncode), seconds=seconds)

    def stop(self) -> None:
        """End all cells that run, with what they have started, as Ctrl-C would, and start no more."""
        with self._lock:
            self._stopped = True
            left = list(self._running)
        for number in (signal.SIGINT, signal.SIGKILL):
            left = [process for process in left if _send(process, number)]
            deadline = time.monotonic() + _PATIENCE_S
            while any(_send(process, 0) for process in left) and time.monotonic() < deadline:
                time.sleep(0.05)


def run_cells(cells: Sequence[Cell], folder: Path, jobs: int, done: Callable[[Outcome], None]) -> None:
    """Run cells, several at a time; Ctrl-C ends those that run and keeps those that have ended.

    Args:
        cells: a cell that is there twice runs once.
        folder: of all cells.
        jobs: at a time.
        done: called, in this thread, with each cell's outcome as it ends; those found first.
    """
    runner = Runner(folder)
    for cell in (waiting := _unique(cells)):
        if (found := runner.find(cell)) is not None:
            done(Outcome(cell, found))
    with ThreadPoolExecutor(jobs, "elsa-cell") as pool:
        futures = []
        try:
            for cell in waiting:
                if runner.find(cell) is None:
                    futures.append(pool.submit(runner.run, cell))
            for future in as_completed(futures):
                done(future.result())
        except BaseException:
            for future in futures:
                future.cancel()
            runner.stop()
            raise


def run_all(cells: Sequence[Cell], folder: Path, jobs: int | None = None) -> dict[str, Path]:
    """Run cells; the folders of their runs by name.

    Args:
        cells: with different names.
        folder: of all cells.
        jobs: at a time; default: one for each core.

    Raises:
        ElsaError: one of them failed, with its error.
    """
    found: dict[str, Path] = {}

    def done(outcome: Outcome) -> None:
        if outcome.run is None:
            raise ElsaError(f"{outcome.cell.name} failed:\n{outcome.error}")
        found[outcome.cell.name] = outcome.run
        if outcome.seconds:
            print(f"  {outcome.cell.name}", flush=True)

    run_cells(cells, folder, jobs or os.cpu_count() or 1, done)
    return found


def _unique(cells: Iterable[Cell]) -> list[Cell]:
    return list({cell.digest: cell for cell in cells}.values())


def error_of(log: str, code: int) -> str:
    """What a run that failed said of it, or else how it ended and its last lines."""
    lines = [line for line in log.splitlines() if line.strip()]
    starts = [place for place, line in enumerate(lines) if line.startswith("error:")]
    if starts:
        return "\n".join(lines[starts[0] :][:_LINES_OF_ERROR])
    how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    return "\n".join([how, *lines[-_LINES_OF_ERROR:]])


def _send(process: "subprocess.Popen[bytes]", number: int) -> bool:
    """Send a signal to a cell and what it has started; whether any of them is there. 0 only asks."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # the latter on macOS, of those that have just ended
        return False
    return True
