"""What both systems do: data, clients, model and local steps.

Nothing here knows Flower, and of this project it takes only what decides the task: how rows are divided among clients,
which examples are in which batch, and the initial adapters. The loop over the steps is written anew, as anybody would.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.models import uncut
from elsa_pl.tiers import SplitModel

MODEL = "bundled:all-MiniLM-L6-v2"
PLAN = {"front": 6, "middle": 0, "tail": 0}
"""The cut of this project's run: none, as in Flower. Every other plan computes the same numbers."""
NUM_WORKERS = 2
"""Processes that train clients, with one thread each, in both systems."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """FedAvg with LoRA on TREC; every value is a number or a text, so that Flower can send it to its clients."""

    data_root: str
    """Folder of ``trec/train.csv`` and ``trec/test.csv``."""
    seed: int = 0
    num_rounds: int = 10
    num_clients: int = 10
    alpha: float = 0.5
    local_steps: int = 5
    batch_size: int = 16
    max_length: int = 64
    lr: float = 3e-3
    """The same in all rounds. AdamW is made anew in each."""
    model_per_message: bool = False
    """Flower's clients make their model anew for each message, as those of Flower's examples do, and keep none."""

    @property
    def data_settings(self) -> dict[str, Any]:
        """Arguments of the data module, but for tokenizer and seed."""
        return {
            "train_file": str(Path(self.data_root) / "trec" / "train.csv"),
            "test_file": str(Path(self.data_root) / "trec" / "test.csv"),
            "num_clients": self.num_clients,
            "partition": "dirichlet",
            "alpha": self.alpha,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
        }


class LocalTraining:
    """The data of all clients and one uncut model, which a process trains for one client after another.

    Args:
        task: what is trained.
    """

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(1)
        self._task = task
        self.data = FederatedTextDataModule(**task.data_settings, tokenizer=MODEL, seed=task.seed)
        self.data.load()
        self.renew()

    def renew(self) -> None:
        """Make the model anew, from the files of the pretrained one."""
        module = SplitModel(MODEL, seed=self._task.seed)
        module.num_labels = self.data.num_labels
        self._model = module.build()
        self._trained = {name: value for name, value in uncut(self._model).named_parameters() if value.requires_grad}

    def adapters(self) -> dict[str, Tensor]:
        """Copies of the adapters and the head, by their names in the uncut model."""
        return {name: value.detach().clone() for name, value in self._trained.items()}

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Take over adapters and head."""
        with torch.no_grad():
            for name, value in self._trained.items():
                value.copy_(adapters[name])

    def train(self, client: str, round: int) -> float:
        """The local steps of a client in a round, counted from 0; returns their mean loss."""
        self._model.train()
        optimizer = torch.optim.AdamW(self._trained.values(), lr=self._task.lr)
        losses: list[float] = []
        for step in range(self._task.local_steps):
            loss = self._model(**self.data.train_batch(client, round * self._task.local_steps + step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return math.fsum(losses) / len(losses)

    def round_cpu_s(self, rounds: int = 3) -> float:
        """CPU seconds of all clients' local steps in a round, the least of some: what both systems have to do."""
        taken = []
        for round in range(rounds):
            start = time.process_time()
            for client in self.data.client_names:
                self.train(client, round)
            taken.append(time.process_time() - start)
        return min(taken)

    @torch.inference_mode()
    def accuracy(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """The share of examples that get their label."""
        self._model.eval()
        right, total = 0, 0
        for batch in batches:
            predicted = self._model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            right += int((predicted.argmax(-1) == batch["labels"]).sum())
            total += len(batch["labels"])
        return right / total


@cache
def local_training(task: Task) -> LocalTraining:
    """The one of this process, made when it is first asked for."""
    return LocalTraining(task)
