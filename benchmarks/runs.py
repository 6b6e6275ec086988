"""Whole runs of the command, as many at a time as there are cores; finished ones are found again by their settings."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Settings = Mapping[str, Any]


def run(output: Path, name: str, settings: Settings) -> Path:
    """Run ``train.py fit`` unless a run with these settings has a summary already; returns the folder."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = output / f"{name}-{digest}"
    done = list(folder.glob("*/summary.json"))
    if not done:
        arguments = ["fit", "--output_dir", str(output), "--name", folder.name]
        for key, value in settings.items():
            arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [sys.executable, "train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if ended.returncode:
            raise SystemExit(f"{name} failed:\n{ended.stdout}{ended.stderr}")
        done = list(folder.glob("*/summary.json"))
        print(f"  {name}", flush=True)
    return done[-1].parent


def all_of(jobs: Sequence[tuple[str, Settings]], output: Path) -> dict[str, Path]:
    """Run what has not been run, one for each core at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = pool.map(lambda job: run(output, *job), jobs)
        return dict(zip((name for name, _ in jobs), folders, strict=True))


def summary(folder: Path) -> dict[str, Any]:
    """The summary of a run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def several(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and the values of the seeds."""
    return f"{statistics.mean(values):.{digits}f} ({' '.join(f'{value:.{digits}f}' for value in values)})"
