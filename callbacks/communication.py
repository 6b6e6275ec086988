"""What crosses links, written down: per round, client, link and direction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from lightning.pytorch.callbacks import Callback

from elsa_pl.callbacks.probing import is_federated, log_agreed
from elsa_pl.links import Counts, codecs_in, wire_bytes

_COLUMNS = ["round", "phase", "client", "link", "direction", "messages", "payload_bytes", "wire_bytes"]


class CommunicationMonitor(Callback):
    """Writes ``traffic.csv`` into the run's folder: messages and bytes of states and gradients.

    ``payload_bytes`` are those of the tensors as they are sent. ``wire_bytes`` add what RPC puts around them (see
    `elsa_pl.links.traffic`); in a project without `elsa_pl`'s strategy nothing is sent, and they are left out. Per
    round, ``traffic/<link>_<direction>`` is logged: payload bytes over all clients.

    Example:
        >>> monitor = CommunicationMonitor()
        >>> monitor.state_dict()
        {'rows': []}
    """

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []
        self._sums: dict[str, float] = {}  # of the round, by metric

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    def num_bytes(self, pl_module: "pl.LightningModule") -> int | None:
        """Payload so far, in a project without `elsa_pl`'s strategy; None where no stage stands anywhere."""
        codecs = codecs_in(pl_module)
        pending = sum(codec.traffic.payload_bytes for codec in codecs)
        return sum(row[_COLUMNS.index("payload_bytes")] for row in self._rows) + pending if codecs else None

    def on_traffic(self, trainer: "pl.Trainer", phase: str, traffic: Mapping[str, Counts]) -> None:
        """Note what crossed since the last time; the strategy calls it in every process with the same."""
        if trainer.state.fn == "fit":
            self._note(trainer, phase, traffic, on_wire=True)
            if phase == "training":
                self._log(trainer)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._drop(trainer, pl_module)  # of what another monitor, or none, was there for

    def on_test_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._drop(trainer, pl_module)

    def on_predict_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._drop(trainer, pl_module)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._take(trainer, pl_module, "training")  # validation interrupts an epoch

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._take(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not is_federated(trainer):
            self._take(trainer, pl_module, "training")
            self._log(trainer)

    def _drop(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        """What crossed outside of training and its validation belongs to no round."""
        if not is_federated(trainer):
            for codec in codecs_in(module):
                codec.traffic.take()

    def _take(self, trainer: "pl.Trainer", module: "pl.LightningModule", phase: str) -> None:
        if is_federated(trainer):
            return
        traffic: dict[str, Counts] = {codec.name: codec.traffic.take() for codec in codecs_in(module)}
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._note(trainer, phase, traffic, on_wire=False)

    def _log(self, trainer: "pl.Trainer") -> None:
        log_agreed(trainer, self._sums)
        self._sums = {}

    def _note(self, trainer: "pl.Trainer", phase: str, traffic: Mapping[str, Counts], *, on_wire: bool) -> None:
        for client, counts in sorted(traffic.items()):
            for place, (messages, payload) in sorted(counts.items()):
                link, direction = place.split("/")
                wire = wire_bytes(place, messages, payload) if on_wire else None
                self._rows.append([trainer.current_epoch, phase, client, link, direction, messages, payload, wire])
                if phase == "training":
                    name = f"traffic/{link}_{direction}"
                    self._sums[name] = self._sums.get(name, 0.0) + payload
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(self._rows, columns=_COLUMNS).to_csv(folder / "traffic.csv", index=False)
