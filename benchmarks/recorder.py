"""Callbacks of the benchmarks: they note what clients submitted, or leave some of them out."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.callbacks.probing import Probed, ProbingCallback, gather


class UpdateRecorder(Callback):
    """Writes at the end, by round and client, the submitted LoRA adapters less the global ones, as one vector.

    Into ``updates.pt`` of the run's folder. For runs in layout ``single``, where all updates are at hand.
    """

    def __init__(self) -> None:
        self._rounds: dict[int, dict[str, Tensor]] = {}

    def on_before_aggregate(self, trainer: L.Trainer, scope: str, updates: list[Any]) -> list[Any]:
        if scope == "edge":
            module: Any = trainer.lightning_module
            received = module.global_adapters()
            for update in updates:
                moved = [
                    (update.adapters[name] - value).flatten() for name, value in received.items() if ".lora_" in name
                ]
                self._rounds.setdefault(trainer.current_epoch + 1, {})[update.sender] = torch.cat(moved)
        return updates

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.save(self._rounds, Path(trainer.default_root_dir) / "updates.pt")


class PredictionRecorder(ProbingCallback):
    """Writes at the end, by round, what the clients' models predict for the probes.

    Into ``predictions.pt`` of the run's folder.
    """

    def __init__(self) -> None:
        super().__init__(None, warmup_rounds=1, every_n_rounds=1)
        self._rounds: list[dict[str, Tensor]] = []

    def on_clients_probed(self, trainer: L.Trainer, probed: Probed) -> None:
        gathered = gather(trainer, {client: (predictions,) for client, (_, predictions, _) in probed.items()})
        if gathered is not None:
            self._rounds.append({client: predictions for client, (predictions,) in gathered.items()})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(self._rounds, Path(trainer.default_root_dir) / "predictions.pt")


class LeaveOut(Callback):
    """Some clients train, and do not count: what the run would be without them.

    Args:
        clients: whose weight becomes 0.
    """

    def __init__(self, clients: list[str]) -> None:
        self._clients = set(clients)

    def on_before_aggregate(self, trainer: L.Trainer, scope: str, updates: list[Any]) -> list[Any]:
        return [update for update in updates if scope == "cloud" or update.sender not in self._clients]
