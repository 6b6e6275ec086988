"""Writes what `predict` finds out, in the process that found it out: texts and predictions do not travel."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.datamodules import FederatedTextDataModule


class PredictionWriter(Callback):
    """Writes ``predictions.csv`` in the order of the rows that were read.

    Args:
        folder: the run's folder. In simulation the folder of the first process counts, because every process names
            one by its own clock.

    Attributes:
        path: the file, known in every process once predicting has started.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._outputs: list[dict[str, Tensor]] = []
        self.path = folder / "predictions.csv"

    def on_predict_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        strategy: Any = trainer.strategy
        shared = Path(strategy.broadcast(str(self._folder)))
        site = strategy.own_client
        self.path = (shared if site is None else self._folder / site) / "predictions.csv"

    def on_predict_batch_end(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs:
            self._outputs.append(outputs)

    def on_predict_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._outputs:
            data: FederatedTextDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.predict
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_predictions(self.path, data, self._outputs)
            self._outputs = []
        trainer.strategy.barrier()  # the others serve the process that predicts, and hear of it if it cannot write


def write_predictions(path: Path, data: FederatedTextDataModule, outputs: list[dict[str, Tensor]]) -> None:
    """Write the rows that were read, and beside each what was predicted.

    Args:
        path: the CSV file.
        data: where the rows came from.
        outputs: of ``SplitModel.predict_step``, in any order.
    """
    rows = data.predict_rows
    given = {"text": rows.texts, "text_pair": rows.pairs, "label": rows.labels}
    columns = {name: values for name, values in given.items() if values is not None}
    figures = [name for name in outputs[0] if name != "rows"]
    found: dict[int, list[str]] = {}
    for output in outputs:
        for place, *values in zip(output["rows"].tolist(), *(output[name].tolist() for name in figures), strict=True):
            found[place] = [_shown(name, value, data.labels) for name, value in zip(figures, values, strict=True)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *figures])
        for place in sorted(found):
            writer.writerow([*(values[place] for values in columns.values()), *found[place]])


def _shown(name: str, value: float, labels: list[str]) -> str:
    if name == "prediction":
        return labels[int(value)]
    return f"{value:.6f}" if isinstance(value, float) else str(value)
