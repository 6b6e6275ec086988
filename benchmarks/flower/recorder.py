"""A callback that notes of each round of this project's run what the Flower run notes of its own."""

import json
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.flower.processes import cpu_seconds
from elsa_pl.tiers import SplitModel


class RoundRecorder(Callback):
    """Writes ``round-N.pt`` (the global adapters after round N) and ``rounds.json`` (when rounds began and ended).

    A round ends when the new adapters are everywhere and before they are evaluated. With it the CPU time that all
    processes together took for it is noted.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._rounds: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._rounds.append({"started": time.time()})
        self._cpu_s = cpu_seconds()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:  # it has started the others
            self._rounds[-1] |= {"ended": time.time(), "cpu_s": cpu_seconds() - self._cpu_s}
            assert isinstance(module, SplitModel)
            torch.save(module.global_adapters(), self._folder / f"round-{len(self._rounds)}.pt")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            (self._folder / "rounds.json").write_text(json.dumps(self._rounds, indent=2) + "\n")
