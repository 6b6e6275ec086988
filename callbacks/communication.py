"""What crosses links, written down: per round, client, link and direction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from lightning.pytorch.callbacks import Callback

from elsa_pl.callbacks.probing import is_federated, log_agreed
from elsa_pl.links import Codec, Counts, wire_bytes

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

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    def on_traffic(self, trainer: "pl.Trainer", phase: str, traffic: Mapping[str, Counts]) -> None:
        """Note what crossed since the last time; the strategy calls it in every process with the same."""
        if not trainer.training and not trainer.validating:
            return
        self._note(trainer, phase, traffic, on_wire=True)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if is_federated(trainer):
            return
        codecs = [module for module in pl_module.modules() if isinstance(module, Codec)]
        traffic: dict[str, Counts] = {codec.name: codec.traffic.take() for codec in codecs}
        self._note(trainer, "training", traffic, on_wire=False)

    def _note(self, trainer: "pl.Trainer", phase: str, traffic: Mapping[str, Counts], *, on_wire: bool) -> None:
        sums: dict[str, float] = {}
        for client, counts in sorted(traffic.items()):
            for place, (messages, payload) in sorted(counts.items()):
                link, direction = place.split("/")
                wire = wire_bytes(place, messages, payload) if on_wire else None
                self._rows.append([trainer.current_epoch, phase, client, link, direction, messages, payload, wire])
                sums[f"traffic/{link}_{direction}"] = sums.get(f"traffic/{link}_{direction}", 0.0) + payload
        if phase == "training":
            log_agreed(trainer, sums)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(self._rows, columns=_COLUMNS).to_csv(folder / "traffic.csv", index=False)
