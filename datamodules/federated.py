"""The federated text data of a run, as a LightningDataModule whose epochs are global rounds.

A client's batches are a pure function of the run's seed, the client and the batch's number in the run.
Nothing else about the data has state: a client can move to another process, a run can resume at round r, and
a slow client can skip a round, and the batches are still the ones the plan said.

In Lightning one item of the training loader is a mapping from client to batches, one item per step; which
clients it holds is asked of the strategy when the item is made, through the ``Federation`` protocol.
"""

from dataclasses import replace
from inspect import getattr_static
from typing import TYPE_CHECKING, Literal, cast

import lightning as L
import numpy as np
import torch

from elsa_pl.datamodules.batches import Batch, BatchOrder, TokenizedExamples, by_length, tokenize
from elsa_pl.datamodules.division import Division, Partition
from elsa_pl.datamodules.faults import DEFAULT_SCALE, FaultKind, FaultSettings
from elsa_pl.datamodules.loading import Loaded, Loading
from elsa_pl.datamodules.probes import Probes
from elsa_pl.datamodules.rounds import EvalLoader, EvalSplit, Federation, PredictLoader, RoundLoader
from elsa_pl.datamodules.sources import Columns, Rows, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FederatedTextDataModule", "Federation"]


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
        probe_file: str | None = None,
        num_probes: int = 0,
        faults: dict[str, FaultKind] | None = None,
        faulty_fraction: float = 0.0,
        fault: FaultKind | None = None,
        fault_scale: float = DEFAULT_SCALE,
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
            partition: how: see ``elsa_pl.datamodules.partitioners``, and ``elsa_pl.datamodules.planted`` for groups of
                clients that differ in the mix of their labels (``groups``) or in wording only (``sources``).
            alpha: concentration of ``dirichlet`` and ``groups``, > 0.
            shards_per_client: for ``shards``.
            num_groups: for ``groups`` and ``sources``.
            validation_fraction: part of the training rows, in [0, 1), set aside when the source has no
                validation rows; stratified by label (by client for ``column``).
            probe_file: public texts on which clients are compared: the text columns and no other. A site needs it.
            num_probes: how many texts of ``probe_file`` are used, its first; 0: all. Without a file, how many training
                texts are set aside as probes before partitioning, stratified as for validation; 0: none, and no probes.
            faults: client to kind of fault, for experiments: see ``elsa_pl.datamodules.faults.FaultKind``.
            faulty_fraction: part of the clients, in [0, 1), drawn by the seed, that have ``fault``.
            fault: their kind of fault.
            fault_scale: how many times an update is ``scaled`` or flipped (``sign_flip``), or a client is ``slow``.
            seed: of the partition, the validation rows, the probes, the faulty clients and the order of batches.

        Raises:
            ValueError: a value is out of range, or settings contradict each other.
        """
        super().__init__()
        _check_choice("task", task, ("classification", "causal_lm"))
        for name, value, least in (
            ("max_length", max_length, 4),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"expected {name} >= {least}, got {value}: raise {name}")
        division = Division(
            partition=partition,
            num_clients=num_clients,
            alpha=alpha,
            shards_per_client=shards_per_client,
            num_groups=num_groups,
            client_column=client_column,
        )
        self._columns = Columns(
            text=text_column,
            text_pair=text_pair_column,
            label=label_column,
            client=client_column,
            label_required=task == "classification",
        )
        self._loading = Loading(
            dataset=dataset,
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            columns=self._columns,
            task=task,
            labels=labels,
            validation_fraction=validation_fraction,
            num_probes=num_probes if probe_file is None else 0,
            division=division,
            faults=FaultSettings(by_client=faults, fraction=faulty_fraction, kind=fault, scale=fault_scale),
            seed=seed,
        )
        self._probes = Probes(probe_file, num_probes, self._columns)
        self.fault_scale = fault_scale
        self.task = task
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self._predict_file = predict_file
        self._predict_rows: Rows | None = None
        self._own_client: str | None = None
        self._loaded: Loaded | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._train_tokens: dict[str, TokenizedExamples] = {}
        self._orders: dict[str, BatchOrder] = {}
        self._eval_batches: dict[tuple[str, int, int], list[Batch]] = {}
        self._probe_batches: dict[int, list[Batch]] = {}

    def load(self, own_client: str | None = None) -> None:
        """Read the source, find the labels, set validation rows and probes aside, and partition. Idempotent.

        Args:
            own_client: the name of a site that reads a file of its own: all training rows are then that
                client's, nothing is partitioned, and ``labels`` must have been given for classification.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the data is not what the settings say, the partition leaves a client without data, or there
                are fewer rows than probes asked for.
        """
        if self._loaded is not None:
            if own_client != self._own_client:
                raise ValueError(
                    f"expected the data to be loaded for one owner, got own_client={own_client} after "
                    f"{self._own_client}: make another FederatedTextDataModule"
                )
            return
        loaded = self._loading.load(own_client)
        if own_client is None and self._probes.file is not None:
            self._probes.of(loaded, own_client)  # a fault in the file shows before anything starts
        self._loaded, self._own_client = loaded, own_client

    @property
    def labels(self) -> list[str]:
        """The label vocabulary; a label's place is its class number. Empty for ``causal_lm``.

        Known without loading where ``labels`` were given.
        """
        if self._loaded is None and self._loading.labels is not None:
            return list(self._loading.labels)
        return list(self._require_loaded("labels").labels)

    @property
    def num_labels(self) -> int:
        """The number of classes; 0 for ``causal_lm``. Known without loading where ``labels`` were given."""
        if self._loaded is None and self._loading.labels is not None:
            return len(self._loading.labels)
        return len(self._require_loaded("num_labels").labels)

    @property
    def client_names(self) -> list[str]:
        """All clients, in order."""
        return list(self._require_loaded("client_names").divided.parts)

    @property
    def client_sizes(self) -> dict[str, int]:
        """The number of training examples of each client."""
        return self._require_loaded("client_sizes").sizes

    @property
    def client_groups(self) -> dict[str, int] | None:
        """The planted group of each client; None unless ``partition`` is ``groups`` or ``sources``."""
        return self._require_loaded("client_groups").divided.groups

    @property
    def client_faults(self) -> dict[str, FaultKind]:
        """The faulty clients and what is wrong with them: the truth that a defence is judged against."""
        return dict(self._require_loaded("client_faults").faults)

    @property
    def label_histogram(self) -> dict[str, list[int]]:
        """The number of training examples of each client with each label; of faulty clients the true labels."""
        return self._require_loaded("label_histogram").label_histogram

    @property
    def split_sizes(self) -> dict[str, int]:
        """The number of examples of each split that there is; training examples without probes and unused ones."""
        return {split: len(rows.texts) for split, rows in self._require_loaded("split_sizes").rows.items()}

    def train_batch(self, client: str, index: int) -> Batch:
        """Return the batch with number ``index`` (from 0, over the whole run) of ``client``.

        A pure function of the settings, the client and the number: see ``BatchOrder``. For the main thread
        only: fast tokenizers are not made for several.

        Raises:
            ValueError: there is no such client.
        """
        loaded = self._require_loaded("train_batch")
        if client not in self._orders:
            tokens = self._tokenize(loaded.rows_of(client, self.seed), client)
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
            self._eval_batches[key] = [tokens.batch(part) for part in by_length(tokens, self.eval_batch_size)]
        return self._eval_batches.get(key, [])

    def probe_batches(self, batch_size: int | None = None) -> list[Batch]:
        """Return the batches of the probe texts, shortest first; ``rows`` [B] are their places among the probes.

        The same in every process. With ``probe_file`` it needs no loading, so that an edge or a cloud without data has
        probes too. Without ``labels`` for classification. The first call is for the main thread: see `train_batch`.

        Args:
            batch_size: examples of a batch; default: ``eval_batch_size``.

        Raises:
            FileNotFoundError: ``probe_file`` is missing.
            ValueError: it is not what it must be, or there are no probes, with what to set.
            RuntimeError: they are training texts, and the data is not loaded.
        """
        size = self.eval_batch_size if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"expected batch_size >= 1, got {size}: raise batch_size")
        if size not in self._probe_batches:
            rows = self._probes.of(self._loaded, self._own_client)
            self._probe_batches[size] = self._public_batches(rows, size, "the probes")
        return self._probe_batches[size]

    def text_batches(self, file: str, what: str = "text") -> list[Batch]:
        """Return the batches of a file of texts without labels, such as ``probe_file``, in the form of `probe_batches`.

        Args:
            file: its path.
            what: it is for; ``<what>_file`` is the setting's name in errors.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is not what it must be.
        """
        rows = Probes(file, 0, self._columns, what).of(None, None)
        return self._public_batches(rows, self.eval_batch_size, f"{what}_file {file}")

    def _public_batches(self, rows: Rows, size: int, origin: str) -> list[Batch]:
        tokens = self._tokenize(self._without_labels(rows), origin)
        batches = [{**tokens.batch(part), "rows": torch.from_numpy(part)} for part in by_length(tokens, size)]
        if self.task == "classification":
            batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
        return batches

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
        tokens = self._tokenize(self._without_labels(rows), "predict")
        parts = by_length(tokens, self.eval_batch_size)
        return [{**tokens.batch(part), "rows": torch.from_numpy(part)} for part in parts]

    def _without_labels(self, rows: Rows) -> Rows:
        """The same texts; in classification all of class 0, since no class means a language model's text."""
        codes = np.zeros(len(rows.texts), dtype=np.int64) if self.task == "classification" else None
        return replace(rows, codes=codes)

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

    def _require_loaded(self, name: str) -> Loaded:
        if self._loaded is None:
            raise RuntimeError(f"expected the data to be loaded before {name} is used: call load() first")
        return self._loaded

    @property
    def vocabulary_size(self) -> int:
        """The number of token ids that the tokenizer may give."""
        return len(self._require_tokenizer())

    def _tokenize(self, rows: Rows, origin: str) -> TokenizedExamples:
        return tokenize(self._require_tokenizer(), rows.texts, rows.pairs, rows.codes, self.max_length, origin)

    @property
    def special_ids(self) -> list[int]:
        """Token ids that stand for no text, such as [CLS]."""
        return list(self._require_tokenizer().all_special_ids)

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
