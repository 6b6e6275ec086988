"""Runs of the two systems on one task, and what is read from the folders that they leave."""

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.flower import processes
from benchmarks.flower.task import MODEL, NUM_WORKERS, PLAN, Task


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run showed. Of lists there is one entry for each round."""

    startup_s: float
    """From the command to the end of the first round, less the median of the others: what is loaded when differs."""
    round_s: list[float]
    """Wall seconds of training and averaging, without evaluation and checkpoints."""
    cpu_s: list[float]
    """CPU seconds of all processes in that time."""
    down_bytes: list[int]
    """Adapters sent towards the clients."""
    up_bytes: list[int]
    """Adapters sent by the clients, and by this project's edge to the cloud."""
    val_accuracy: list[float]
    test_accuracy: float
    """Of the last round."""
    folder: Path
    """Of ``round-N.pt``."""

    def adapters(self, round: int) -> dict[str, Tensor]:
        """The global adapters after a round, counted from 1."""
        found: dict[str, Tensor] = torch.load(self.folder / f"round-{round}.pt", weights_only=True)
        return found


def run_ours(task: Task, folder: Path) -> Outcome:
    """``python train.py fit``: flat FedAvg, with one edge, which only passes on what the clients send."""
    settings = {
        "seed_everything": task.seed,
        "model.model": MODEL,
        "model.plan": PLAN,
        "model.optimizer": {"class_path": "AdamW", "init_args": {"lr": task.lr}},
        **{f"data.{name}": value for name, value in task.data_settings.items()},
        "trainer.max_epochs": task.num_rounds,
        "trainer.callbacks": [
            {"class_path": "benchmarks.flower.recorder.RoundRecorder", "init_args": {"folder": str(folder)}}
        ],
        "trainer.strategy.init_args.layout": "tiers",
        "trainer.strategy.init_args.num_edges": 1,
        "trainer.strategy.init_args.num_hosts": NUM_WORKERS,
        "trainer.strategy.init_args.passes_in_flight": 1,
        "trainer.strategy.init_args.local_steps": task.local_steps,
        "checkpoint.save_top_k": 0,  # the last round is tested
    }
    arguments = ["train.py", "fit", "--output_dir", str(folder), "--name", "run"]
    for key, value in settings.items():
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    started = processes.run(arguments, folder / "log.txt")
    (run_folder,) = (folder / "run").iterdir()
    metrics = pd.read_csv(run_folder / "metrics.csv")
    summary = json.loads((run_folder / "summary.json").read_text())

    def by_round(name: str) -> list[Any]:
        """A column has its numbers in rows of their own, one for each round."""
        return list(metrics[name].dropna())

    return Outcome(
        **_times(folder, started),
        down_bytes=list(map(int, by_round("bytes/adapters/down"))),
        up_bytes=list(map(int, by_round("bytes/adapters/up"))),
        val_accuracy=by_round("val_accuracy"),
        test_accuracy=summary["test_accuracy"],
        folder=folder,
    )


def run_flower(task: Task, folder: Path) -> Outcome:
    """The simulation of Flower, with as many Ray actors as there are hosts in the other run."""
    (folder / "task.json").write_text(json.dumps(asdict(task)))
    # a short path: Ray puts sockets there, whose names may have 107 bytes
    with tempfile.TemporaryDirectory(prefix="flower-", ignore_cleanup_errors=True) as own:
        arguments = ["-m", "benchmarks.flower.simulation", str(folder), own]
        started = processes.run(arguments, folder / "log.txt", {"FLWR_HOME": own})
    rounds = json.loads((folder / "rounds.json").read_text())
    return Outcome(
        **_times(folder, started),
        down_bytes=[round["down_bytes"] for round in rounds],
        up_bytes=[round["up_bytes"] for round in rounds],
        val_accuracy=[round["val_accuracy"] for round in rounds],
        test_accuracy=rounds[-1]["test_accuracy"],
        folder=folder,
    )


RUN: dict[str, Callable[[Task, Path], Outcome]] = {"elsa_pl": run_ours, "Flower": run_flower}
"""The systems, in the order in which they take turns."""


def _times(folder: Path, started: float) -> dict[str, Any]:
    rounds = json.loads((folder / "rounds.json").read_text())
    round_s = [round["ended"] - round["started"] for round in rounds]
    startup_s = rounds[0]["ended"] - started - statistics.median(round_s[1:])
    return {"startup_s": startup_s, "round_s": round_s, "cpu_s": [round["cpu_s"] for round in rounds]}
