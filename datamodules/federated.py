"""The federated text data of a run, as a LightningDataModule whose epochs are global rounds.

A client's batches are a pure function of the run's seed, the client and the batch's number in the run.
Nothing else about the data has state: a client can move to another process, a run can resume at round r, and
a slow client can skip a round, and the batches are still the ones the plan said.

In Lightning one item of the training loader is a mapping from client to batches, one item per step; which
clients it holds is asked of the strategy when the item is made, through the ``Federation`` protocol.
"""

from dataclasses import dataclass, replace
from inspect import getattr_static
from typing import TYPE_CHECKING, Literal, cast

import lightning as L
import numpy as np
import torch

from elsa_pl.datamodules import partitioners
from elsa_pl.datamodules.batches import Batch, BatchOrder, Indices, TokenizedExamples, tokenize
from elsa_pl.datamodules.rounds import EvalLoader, EvalSplit, Federation, PredictLoader, RoundLoader
from elsa_pl.datamodules.sources import Columns, Rows, find_labels, load_rows, load_source
from elsa_pl.functional.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FederatedTextDataModule", "Federation"]

Partition = Literal["iid", "dirichlet", "shards", "groups", "column"]


@dataclass(frozen=True)
class _Loaded:
    """Everything that ``load`` finds out."""

    rows: dict[str, Rows]
    labels: list[str]
    parts: dict[str, Indices]
    groups: dict[str, int] | None


class FederatedTextDataModule(L.LightningDataModule):
    """Text examples of many clients, for classification or causal language modelling."""

    def __init__(
        self,
        *,
        dataset: str | None = None,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        client_column: str | None = None,
        labels: list[str] | None = None,
        task: Literal["classification", "causal_lm"] = "classification",
        tokenizer: str | None = None,
        max_length: int = 64,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        num_clients: int = 8,
        partition: Partition = "dirichlet",
        alpha: float = 0.5,
        shards_per_client: int = 2,
        num_groups: int = 4,
        validation_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Check and keep the settings; nothing is read before ``load``.

        Args:
            dataset: ``bundled:helpdesk`` or a hub id (``owner/name`` or ``owner/name:configuration``).
            train_file: a .csv, .tsv, .json, .jsonl or .parquet file, instead of ``dataset``.
            validation_file: beside ``train_file``; without it a part of the training rows is set aside.
            test_file: beside ``train_file``.
            predict_file: what ``predict`` reads, with or without labels; default: the test rows.
            text_column: the text.
            text_pair_column: the second text of sentence pair tasks.
            label_column: the label; in ``causal_lm`` only partitions by label read it.
            client_column: the owner of a training row, for ``partition=column``.
            labels: the label vocabulary in its order; default: the sorted labels of the training rows.
            task: ``classification``, or ``causal_lm`` where the text itself is to be predicted.
            tokenizer: name of the model whose tokenizer is used.
            max_length: tokens kept of an example, special tokens included; >= 4.
            batch_size: examples of one training batch of one client.
            eval_batch_size: examples of one validation or test batch.
            num_clients: how many clients the training rows are divided among.
            partition: how: see ``elsa_pl.datamodules.partitioners``.
            alpha: concentration of ``dirichlet`` and ``groups``, > 0.
            shards_per_client: for ``shards``.
            num_groups: for ``groups``.
            validation_fraction: part of the training rows, in [0, 1), set aside when the source has no
                validation rows; stratified by label (by client for ``column``).
            seed: of the partition, the validation rows and the order of batches.

        Raises:
            ValueError: a value is out of range, or settings contradict each other.
        """
        super().__init__()
        _check_choice("task", task, ("classification", "causal_lm"))
        _check_choice("partition", partition, ("iid", "dirichlet", "shards", "groups", "column"))
        for name, value, least in (
            ("max_length", max_length, 4),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_clients", num_clients, 1),
            ("shards_per_client", shards_per_client, 1),
            ("num_groups", num_groups, 1),
        ):
            if value < least:
                raise ValueError(f"expected {name} >= {least}, got {value}: raise {name}")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"expected alpha > 0, got {alpha}: give a positive number")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"expected 0 <= validation_fraction < 1, got {validation_fraction}: give a part of 1")
        if partition == "groups" and num_groups > num_clients:
            raise ValueError(
                f"expected num_groups <= num_clients, got num_groups={num_groups}, "
                f"num_clients={num_clients}: lower num_groups or raise num_clients"
            )
        if (dataset is None) == (train_file is None):
            given = "neither" if dataset is None else f"dataset={dataset} and train_file={train_file}"
            raise ValueError(f"expected exactly one of dataset and train_file, got {given}: give one of them")
        if dataset is not None and (validation_file is not None or test_file is not None):
            raise ValueError(
                f"expected validation_file and test_file only beside train_file, got them with "
                f"dataset={dataset}: use train_file, or the splits of the data set"
            )
        if (partition == "column") != (client_column is not None):
            raise ValueError(
                f"expected client_column with partition=column and only there, got partition={partition}, "
                f"client_column={client_column}: set both or neither"
            )
        if labels is not None and task == "causal_lm":
            raise ValueError(f"expected no labels with task=causal_lm, got {labels}: remove labels")
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError(f"expected at least two different labels, got {labels}: correct labels")
        self.task = task
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self._files = {
            "dataset": dataset,
            "train_file": train_file,
            "validation_file": validation_file,
            "test_file": test_file,
        }
        self._columns = Columns(
            text=text_column,
            text_pair=text_pair_column,
            label=label_column,
            client=client_column,
            label_required=task == "classification",
        )
        self._predict_file = predict_file
        self._predict_rows: Rows | None = None
        self._given_labels = labels
        self._partition = partition
        self._num_clients = num_clients
        self._alpha = alpha
        self._shards_per_client = shards_per_client
        self._num_groups = num_groups
        self._validation_fraction = validation_fraction
        self._own_client: str | None = None
        self._loaded: _Loaded | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._train_tokens: dict[str, TokenizedExamples] = {}
        self._orders: dict[str, BatchOrder] = {}
        self._eval_batches: dict[tuple[str, int, int], list[Batch]] = {}

    def load(self, own_client: str | None = None) -> None:
        """Read the source, find the labels, set validation rows aside and partition. Idempotent.

        Args:
            own_client: the name of a site that reads a file of its own: all training rows are then that
                client's, nothing is partitioned, and ``labels`` must have been given for classification.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the data is not what the settings say, or the partition leaves a client without data.
        """
        if self._loaded is not None:
            if own_client != self._own_client:
                raise ValueError(
                    f"expected the data to be loaded for one owner, got own_client={own_client} after "
                    f"{self._own_client}: make another FederatedTextDataModule"
                )
            return
        if own_client is not None and self.task == "classification" and self._given_labels is None:
            raise ValueError(
                f"expected labels where a site reads its own file, got none for {own_client}: set "
                "data.labels to the same list at every site, since no site sees the labels of the others"
            )
        source = load_source(columns=self._columns, **self._files)
        vocabulary = None
        if self.task == "classification":
            vocabulary = self._given_labels or source.label_names or find_labels(source.train["label"])
        splits = {"train": source.train, "validation": source.validation, "test": source.test}
        rows = {
            split: Rows.of(table, split, vocabulary, given=self._given_labels is not None)
            for split, table in splits.items()
            if table is not None
        }
        train = rows["train"]
        if "validation" not in rows and self._validation_fraction > 0:
            strata = train.clients or train.labels or [""] * len(train.texts)
            generator = np.random.default_rng(derive_seed(self.seed, "validation rows"))
            kept, aside = partitioners.set_aside(strata, self._validation_fraction, generator)
            rows["train"], rows["validation"] = train.take(kept), train.take(aside)
        self._own_client = own_client
        names, parts, groups = self._divide(rows["train"], own_client)
        self._loaded = _Loaded(rows, vocabulary or [], dict(zip(names, parts, strict=True)), groups)

    def _divide(self, train: Rows, own_client: str | None) -> tuple[list[str], list[Indices], dict[str, int] | None]:
        """Return client names, their rows, and the planted group of each where there are groups."""
        if own_client is not None:
            return [own_client], [np.arange(len(train.texts))], None
        if self._partition == "column":
            assert train.clients is not None
            return *partitioners.by_column(train.clients), None
        labels = train.labels
        if labels is None:
            if self._partition != "iid":
                raise ValueError(
                    f"expected a column {self._columns.label!r} for partition={self._partition}, got none: "
                    "use partition=iid, or partition=column with client_column"
                )
            labels = [""] * len(train.texts)
        generator = np.random.default_rng(derive_seed(self.seed, "partition"))
        names = [f"client-{i}" for i in range(self._num_clients)]
        if self._partition == "groups":
            parts, groups = partitioners.groups(labels, self._num_clients, generator, self._num_groups, self._alpha)
            return names, parts, dict(zip(names, groups.tolist(), strict=True))
        if self._partition == "dirichlet":
            return names, partitioners.dirichlet(labels, self._num_clients, generator, self._alpha), None
        if self._partition == "shards":
            return (
                names,
                partitioners.shards(labels, self._num_clients, generator, self._shards_per_client),
                None,
            )
        return names, partitioners.iid(labels, self._num_clients, generator), None

    @property
    def labels(self) -> list[str]:
        """The label vocabulary; a label's place is its class number. Empty for ``causal_lm``.

        Known without loading where ``labels`` were given.
        """
        if self._loaded is None and self._given_labels is not None:
            return list(self._given_labels)
        return list(self._require_loaded("labels").labels)

    @property
    def num_labels(self) -> int:
        """The number of classes; 0 for ``causal_lm``. Known without loading where ``labels`` were given."""
        if self._loaded is None and self._given_labels is not None:
            return len(self._given_labels)
        return len(self._require_loaded("num_labels").labels)

    @property
    def client_names(self) -> list[str]:
        """All clients, in order."""
        return list(self._require_loaded("client_names").parts)

    @property
    def client_sizes(self) -> dict[str, int]:
        """The number of training examples of each client."""
        return {name: len(part) for name, part in self._require_loaded("client_sizes").parts.items()}

    @property
    def client_groups(self) -> dict[str, int] | None:
        """The planted group of each client; None unless ``partition=groups``."""
        return self._require_loaded("client_groups").groups

    @property
    def label_histogram(self) -> dict[str, list[int]]:
        """The number of training examples of each client with each label."""
        loaded = self._require_loaded("label_histogram")
        codes = loaded.rows["train"].codes
        if codes is None:
            return {name: [] for name in loaded.parts}
        count = len(loaded.labels)
        return {name: np.bincount(codes[part], minlength=count).tolist() for name, part in loaded.parts.items()}

    @property
    def split_sizes(self) -> dict[str, int]:
        """The number of examples of each split that there is."""
        return {split: len(rows.texts) for split, rows in self._require_loaded("split_sizes").rows.items()}

    def train_batch(self, client: str, index: int) -> Batch:
        """Return the batch with number ``index`` (from 0, over the whole run) of ``client``.

        A pure function of the settings, the client and the number: see ``BatchOrder``. For the main thread
        only: fast tokenizers are not made for several.

        Raises:
            ValueError: there is no such client.
        """
        loaded = self._require_loaded("train_batch")
        if client not in loaded.parts:
            raise ValueError(f"expected client to be one of {', '.join(loaded.parts)}, got {client}: correct it")
        if client not in self._orders:
            part = loaded.parts[client]
            tokens = self._tokenize(loaded.rows["train"].take(part), client)
            self._train_tokens[client] = tokens
            self._orders[client] = BatchOrder(tokens.lengths(), self.batch_size, self.seed, client)
        return self._train_tokens[client].batch(self._orders[client].rows(index))

    def eval_batches(self, split: EvalSplit, shard: int = 0, num_shards: int = 1) -> list[Batch]:
        """Return the batches of one shard of a split, shortest examples first.

        Over all shards every example appears exactly once. The list is empty if there is no such split.
        """
        loaded = self._require_loaded("eval_batches")
        if not 0 <= shard < num_shards:
            raise ValueError(f"expected 0 <= shard < num_shards, got shard={shard}, num_shards={num_shards}")
        key = (split, shard, num_shards)
        if split in loaded.rows and key not in self._eval_batches:
            rows = loaded.rows[split]
            tokens = self._tokenize(rows.take(np.arange(shard, len(rows.texts), num_shards)), split)
            order = np.argsort(tokens.lengths(), kind="stable")
            starts = range(0, len(order), self.eval_batch_size)
            self._eval_batches[key] = [tokens.batch(order[i : i + self.eval_batch_size]) for i in starts]
        return self._eval_batches.get(key, [])

    @property
    def predict_rows(self) -> Rows:
        """The rows that ``predict`` is about, in the order of their file.

        Raises:
            FileNotFoundError: ``predict_file`` is missing.
            ValueError: it is not what the settings say, or there are neither such a file nor test rows.
        """
        if self._predict_rows is None:
            loaded = self._require_loaded("predict_rows")
            if self._predict_file is not None:
                columns = replace(self._columns, client=None, label_required=False)
                table = load_rows("predict", self._predict_file, columns)
                self._predict_rows = Rows.of(table, "predict", None, given=False)
            elif "test" in loaded.rows:
                self._predict_rows = loaded.rows["test"]
            else:
                raise ValueError("expected rows to predict, got none: set data.predict_file or data.test_file")
        return self._predict_rows

    def predict_batches(self) -> list[Batch]:
        """Return the batches of `predict_rows`, shortest examples first; ``rows`` [B] are their places in the file.

        ``labels`` mean nothing for classification: the file need not have any.
        """
        rows = self.predict_rows
        codes = np.zeros(len(rows.texts), dtype=np.int64) if self.task == "classification" else None
        tokens = self._tokenize(replace(rows, codes=codes), "predict")
        order = np.argsort(tokens.lengths(), kind="stable")
        parts = [order[i : i + self.eval_batch_size] for i in range(0, len(order), self.eval_batch_size)]
        return [{**tokens.batch(part), "rows": torch.from_numpy(part)} for part in parts]

    def setup(self, stage: str) -> None:
        """Load the data, of the strategy's own client where it has one; a process without clients loads none."""
        federation = self._federation()
        if federation.holds_data:
            self.load(federation.own_client)

    def train_dataloader(self) -> RoundLoader:
        """Return the steps of a global round."""
        return RoundLoader(self, self._federation())

    def val_dataloader(self) -> EvalLoader:
        """Return this process's share of the validation examples."""
        return EvalLoader(self, self._federation(), "validation")

    def test_dataloader(self) -> EvalLoader:
        """Return this process's share of the test examples."""
        federation = self._federation()
        if (
            federation.holds_data
            and federation.own_client is None
            and "test" not in self._require_loaded("test_dataloader").rows
        ):
            raise ValueError("expected test examples, got none: set data.test_file")
        return EvalLoader(self, federation, "test")

    def predict_dataloader(self) -> PredictLoader:
        """Return the examples to predict, in the process that predicts."""
        return PredictLoader(self, self._federation())

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        """Leave the batch where it is: each part of the model moves what it needs."""
        return batch

    def _federation(self) -> Federation:
        strategy = self.trainer.strategy if self.trainer is not None else None
        missing = object()  # looked up without running properties, which may not have an answer yet
        if any(getattr_static(strategy, name, missing) is missing for name in ("own_client", "participants")):
            raise TypeError(
                f"expected a strategy that knows clients and rounds, got {type(strategy).__name__}: use "
                "elsa_pl.strategies.HierarchicalStrategy, or call load() and train_batch() yourself"
            )
        return cast(Federation, strategy)

    def _require_loaded(self, name: str) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError(f"expected the data to be loaded before {name} is used: call load() first")
        return self._loaded

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids that the tokenizer may give."""
        return len(self._require_tokenizer())

    def _tokenize(self, rows: Rows, origin: str) -> TokenizedExamples:
        return tokenize(self._require_tokenizer(), rows.texts, rows.pairs, rows.codes, self.max_length, origin)

    def _require_tokenizer(self) -> "PreTrainedTokenizerBase":
        if self._tokenizer is None:
            if self.tokenizer_name is None:
                raise ValueError("expected the name of a tokenizer, got none: set data.tokenizer to the model's name")
            from elsa_pl.models import load_tokenizer

            self._tokenizer = load_tokenizer(self.tokenizer_name)
        return self._tokenizer


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {value}: correct it")
