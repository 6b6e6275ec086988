"""A callback that notes in every process of a run when its steps began and ended, and how much memory it took."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class Probe(Callback):
    """Writes ``<worker>.json``.

    It holds `first_step` (seconds since 1970), `steps_s` (wall seconds of the steps of each round, without the
    averaging that follows) and `peak_rss_mb`.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._starts: list[float] = []
        self._steps_s: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._starts.append(time.time())

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            self._steps_s.append(time.time() - self._starts[-1])

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        noted = {"first_step": self._starts[0], "steps_s": self._steps_s, "peak_rss_mb": peak_kb / 1024}
        (self._folder / f"{strategy.world.worker}.json").write_text(json.dumps(noted))
