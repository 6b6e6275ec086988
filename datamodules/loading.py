"""From settings to the rows of every split and every client: what the data module does once, before any batch."""

from dataclasses import dataclass, replace

import numpy as np

from elsa_pl.datamodules.batches import Indices
from elsa_pl.datamodules.division import Divided, Division
from elsa_pl.datamodules.faults import FaultKind, FaultSettings, corrupt_labels
from elsa_pl.datamodules.partitioners import set_aside
from elsa_pl.datamodules.probes import set_probes_aside
from elsa_pl.datamodules.sources import Columns, Rows, find_labels, load_source
from elsa_pl.functional.seeding import derive_seed


@dataclass(frozen=True)
class Loaded:
    """The rows of a run, and whose they are."""

    rows: dict[str, Rows]
    """By split."""
    labels: list[str]
    divided: Divided
    faults: dict[str, FaultKind]
    """The faulty clients."""
    probes: Rows | None
    """Training texts set aside as probes, if any were."""

    @property
    def sizes(self) -> dict[str, int]:
        """The number of examples of each client."""
        return {name: len(part) for name, part in self.divided.parts.items()}

    @property
    def label_histogram(self) -> dict[str, list[int]]:
        """The number of examples of each client with each label, before any fault."""
        codes = self.rows["train"].codes
        return {
            name: [] if codes is None else np.bincount(codes[part], minlength=len(self.labels)).tolist()
            for name, part in self.divided.parts.items()
        }

    def rows_of(self, client: str, seed: int) -> Rows:
        """Return the rows that a client trains on, with wrong labels if those are its fault.

        Raises:
            ValueError: there is no such client.
        """
        parts = self.divided.parts
        if client not in parts:
            raise ValueError(f"expected client to be one of {', '.join(parts)}, got {client}: correct it")
        rows = self.rows["train"].take(parts[client])
        if client not in self.faults or rows.codes is None:
            return rows
        generator = np.random.default_rng(derive_seed(seed, "faulty labels", client))
        return replace(rows, codes=corrupt_labels(self.faults[client], rows.codes, len(self.labels), generator))


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The settings that decide which rows there are; their meaning is explained at `FederatedTextDataModule`."""

    dataset: str | None
    train_file: str | None
    validation_file: str | None
    test_file: str | None
    columns: Columns
    task: str
    labels: list[str] | None
    validation_fraction: float
    num_probes: int
    """Training texts to set aside as probes; 0 where there is a file of them."""
    division: Division
    faults: FaultSettings
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"expected 0 <= validation_fraction < 1, got {self.validation_fraction}: give a part of 1")
        if (self.dataset is None) == (self.train_file is None):
            both = f"dataset={self.dataset} and train_file={self.train_file}"
            given = "neither" if self.dataset is None else both
            raise ValueError(f"expected exactly one of dataset and train_file, got {given}: give one of them")
        if self.dataset is not None and (self.validation_file is not None or self.test_file is not None):
            raise ValueError(
                f"expected validation_file and test_file only beside train_file, got them with "
                f"dataset={self.dataset}: use train_file, or the splits of the data set"
            )
        labels = self.labels
        if labels is not None and self.task == "causal_lm":
            raise ValueError(f"expected no labels with task=causal_lm, got {labels}: remove labels")
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError(f"expected at least two different labels, got {labels}: correct labels")
        self.faults.check(self.task)

    def load(self, own_client: str | None) -> Loaded:
        """Read the source, find the labels, set validation rows and probes aside, and divide the rest.

        Args:
            own_client: the owner of all training rows; None where they are to be divided.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the data is not what the settings say, the partition leaves a client without rows, or there
                are fewer rows than probes asked for.
        """
        if own_client is not None:
            self._check_site(own_client)
        source = load_source(
            columns=self.columns,
            dataset=self.dataset,
            train_file=self.train_file,
            validation_file=self.validation_file,
            test_file=self.test_file,
        )
        vocabulary = None
        if self.task == "classification":
            vocabulary = self.labels or source.label_names or find_labels(source.train["label"])
        splits = {"train": source.train, "validation": source.validation, "test": source.test}
        rows = {
            split: Rows.of(table, split, vocabulary, given=self.labels is not None)
            for split, table in splits.items()
            if table is not None
        }
        if "validation" not in rows and self.validation_fraction > 0:
            generator = np.random.default_rng(derive_seed(self.seed, "validation rows"))
            chosen = set_aside(_strata(rows["train"]), self.validation_fraction, generator)
            rows["train"], rows["validation"] = _part(rows["train"], chosen)
        probes = None
        if self.num_probes:
            generator = np.random.default_rng(derive_seed(self.seed, "probes"))
            rows["train"], probes = _part(
                rows["train"], set_probes_aside(_strata(rows["train"]), self.num_probes, generator)
            )
            probes = replace(probes, labels=None, codes=None, clients=None)
        if own_client is not None:
            divided = Divided({own_client: np.arange(len(rows["train"].texts))})
            faults = self.faults.of_site(own_client)
        else:
            divided = self.division.divide(rows["train"], self.seed, self.columns.label)
            faults = self.faults.of(list(divided.parts), self.seed)
        return Loaded(rows, vocabulary or [], divided, faults, probes)

    def _check_site(self, own_client: str) -> None:
        """What a site cannot find out in its own rows must be set, and what it must not give away must not."""
        if self.task == "classification" and self.labels is None:
            raise ValueError(
                f"expected labels where a site reads its own file, got none for {own_client}: set "
                "data.labels to the same list at every site, since no site sees the labels of the others"
            )
        if self.num_probes:
            raise ValueError(
                f"expected a probe_file where a site reads its own file, got num_probes={self.num_probes} alone at "
                f"{own_client}: its training texts are private; set data.probe_file to the same texts at every site"
            )


def _part(rows: Rows, chosen: tuple[Indices, Indices]) -> tuple[Rows, Rows]:
    return rows.take(chosen[0]), rows.take(chosen[1])


def _strata(train: Rows) -> list[str]:
    """What the rows that are set aside must be representative of."""
    return train.clients or train.labels or [""] * len(train.texts)
