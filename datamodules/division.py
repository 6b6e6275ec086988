"""How a run's training rows become the clients' rows: the settings of the partitions, checked, and what they do."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from elsa_pl.datamodules import partitioners, planted
from elsa_pl.datamodules.batches import Indices
from elsa_pl.datamodules.sources import Rows
from elsa_pl.functional.seeding import derive_seed

Partition = Literal["iid", "dirichlet", "shards", "groups", "sources", "column"]


@dataclass(frozen=True)
class Divided:
    """The rows of each client."""

    parts: dict[str, Indices]
    groups: dict[str, int] | None = None
    """The planted group of each client, where there are groups."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """The settings of a partition; their meaning is explained at `FederatedTextDataModule`."""

    partition: Partition
    num_clients: int
    alpha: float
    shards_per_client: int
    num_groups: int
    client_column: str | None

    def __post_init__(self) -> None:
        if self.partition not in get_args(Partition):
            raise ValueError(
                f"expected partition to be one of {', '.join(get_args(Partition))}, got {self.partition}: correct it"
            )
        for name in ("num_clients", "shards_per_client", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}: raise {name}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"expected alpha > 0, got {self.alpha}: give a positive number")
        if self.partition in ("groups", "sources") and self.num_groups > self.num_clients:
            raise ValueError(
                f"expected num_groups <= num_clients, got num_groups={self.num_groups}, "
                f"num_clients={self.num_clients}: lower num_groups or raise num_clients"
            )
        if (self.partition == "column") != (self.client_column is not None):
            raise ValueError(
                f"expected client_column with partition=column and only there, got partition={self.partition}, "
                f"client_column={self.client_column}: set both or neither"
            )

    def divide(self, train: Rows, seed: int, label_column: str | None) -> Divided:
        """Divide the rows among clients.

        Args:
            train: the training rows.
            seed: of the run.
            label_column: its name, for errors.

        Raises:
            ValueError: the partition needs labels that are not there, or leaves a client without rows.
        """
        if self.partition == "column":
            assert train.clients is not None
            owners, parts = partitioners.by_column(train.clients)
            return Divided(dict(zip(owners, parts, strict=True)))
        labels = train.labels
        if labels is None:
            if self.partition not in ("iid", "sources"):
                raise ValueError(
                    f"expected a column {label_column!r} for partition={self.partition}, got none: "
                    "use partition=iid, or partition=column with client_column"
                )
            labels = [""] * len(train.texts)
        generator = np.random.default_rng(derive_seed(seed, "partition"))
        names = [f"client-{i}" for i in range(self.num_clients)]
        groups: Indices | None = None
        if self.partition == "groups":
            parts, groups = planted.groups(labels, self.num_clients, generator, self.num_groups, self.alpha)
        elif self.partition == "sources":
            parts, groups = planted.sources(labels, train.texts, self.num_clients, generator, self.num_groups)
        elif self.partition == "dirichlet":
            parts = partitioners.dirichlet(labels, self.num_clients, generator, self.alpha)
        elif self.partition == "shards":
            parts = partitioners.shards(labels, self.num_clients, generator, self.shards_per_client)
        else:
            parts = partitioners.iid(labels, self.num_clients, generator)
        return Divided(
            dict(zip(names, parts, strict=True)),
            None if groups is None else dict(zip(names, groups.tolist(), strict=True)),
        )
