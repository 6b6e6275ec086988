"""What a run writes about itself: checkpoints, metrics, bytes and the summary."""

import struct
from pathlib import Path

import pandas as pd
import pytest
from tensorboardX.proto import event_pb2

from elsa_pl.partition import SplitPlan, cut
from tests.runs import Run, Settings, assert_equal, make_data, make_module, run_here, write_data

HIDDEN_SIZE, FLOAT, BOOL = 32, 4, 1
CLIENTS = [f"client-{index}" for index in range(4)]


@pytest.fixture(scope="module")
def data_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_settings: Settings) -> Run:
    """A learning rate at which the accuracy goes up and down."""
    settings = {
        **data_settings,
        "trainer.max_epochs": 5,
        "strategy.num_edges": 2,
        "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}},
    }
    return run_here(tmp_path_factory.mktemp("run"), "run", settings)


def test_the_best_model_is_kept_and_tested(run: Run) -> None:
    accuracies = [run.metrics()[epoch]["val_accuracy"] for epoch in range(5)]
    assert len(set(accuracies)) > 1, "or any checkpoint would be the best"
    best = accuracies.index(max(accuracies))
    names = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert names == {run.checkpoint(best).name, "last.ckpt"}
    assert run.content()["epoch"] == 4
    assert run.content(best)["global_step"] == 2 * (best + 1), "a step is counted once for each batch"


def test_every_epoch_logs_its_figures(run: Run) -> None:
    links = {f"bytes/{link}/{way}" for link in ("uplink", "downlink") for way in ("forward", "backward")}
    expected = {"train_loss", "val_loss", "val_accuracy", "val_f1", "clients_lost", *links}
    expected |= {"bytes/adapters/up", "bytes/adapters/down", "seconds/steps", "seconds/aggregation"}
    for epoch in range(5):
        row = run.metrics()[epoch]
        assert expected <= row.keys()
        assert row["seconds/steps"] > 0
        assert row["clients_lost"] == 0


def test_summary(run: Run) -> None:
    summary = run.summary()
    assert list(summary) == [
        "test_accuracy",
        "test_f1",
        "test_loss",
        "test_perplexity",
        "test_merged_accuracy",
        "test_merged_f1",
        "test_merged_loss",
        "test_merged_perplexity",
        "rounds",
        "tested_round",
        "bytes",
        "seconds",
        "peak_bytes",
        "versions",
        "seed",
        "adapter",
    ]
    assert summary["rounds"] == 5
    accuracies = [run.metrics()[epoch]["val_accuracy"] for epoch in range(5)]
    assert summary["tested_round"] == 1 + accuracies.index(max(accuracies))
    assert 5e7 < summary["peak_bytes"] < 2e10
    assert summary["test_perplexity"] is None
    assert {"steps", "aggregation", "fit", "test", "total"} <= summary["seconds"].keys()
    assert {"elsa_pl", "torch", "lightning", "transformers", "peft"} <= summary["versions"].keys()
    assert Path(summary["adapter"]) == run.folder / "adapter"
    sent = summary["bytes"]
    assert sent["total"] == sum(count for link in ("uplink", "downlink", "adapters") for count in sent[link].values())
    rows = [run.metrics()[epoch] for epoch in range(5)]
    for link in ("uplink", "downlink", "adapters"):
        for way, count in sent[link].items():
            logged = sum(row[f"bytes/{link}/{way}"] for row in rows)
            # validation sends hidden states forward too; they are in the totals only
            assert count > logged if way == "forward" else count == logged


def test_runs_are_repeatable(tmp_path: Path, run: Run, data_settings: Settings) -> None:
    """Participants, batches and dropout draws come from the seed."""
    settings = {**data_settings, "strategy.participation": 0.5, "model.lora": {"dropout": 0.3}}
    first, second = (run_here(tmp_path, name, settings) for name in ("first", "second"))
    assert_equal(first.adapters(), second.adapters())
    other = run_here(tmp_path, "other", {**settings, "seed_everything": 1})
    assert other.summary()["seed"] == 1
    assert other.metrics()[1]["train_loss"] != first.metrics()[1]["train_loss"]


def ends_and_whole(settings: Settings) -> tuple[int, int]:
    """Bytes of the adapters of front and tail, and of all."""
    parts = cut(make_module(settings).build(), SplitPlan(front=1, middle=2, tail=1))
    front, middle, tail = (sum(p.numel() * FLOAT for p in part.adapters().values()) for part in parts)
    return front + tail, front + middle + tail


@pytest.mark.parametrize(("edges", "edge_rounds", "accumulate"), [(1, 1, 1), (2, 3, 2)])
def test_bytes_are_those_of_the_payload(
    edges: int, edge_rounds: int, accumulate: int, tmp_path: Path, data_settings: Settings
) -> None:
    settings = {
        "data.train_file": data_settings["data.train_file"],
        "data.validation_fraction": 0.0,
        "data.batch_size": 4,
        "trainer.max_epochs": 1,
        "strategy.num_edges": edges,
        "strategy.edge_rounds": edge_rounds,
        "model.accumulate_grad_batches": accumulate,
    }
    sent = run_here(tmp_path, "run", settings).summary()["bytes"]
    data = make_data(settings)
    steps = 2 * edge_rounds * accumulate
    tokens = sum(data.train_batch(client, k)["input_ids"].numel() for client in CLIENTS for k in range(steps))
    hidden = tokens * HIDDEN_SIZE * FLOAT
    assert sent["uplink"] == {"forward": hidden + tokens * BOOL, "backward": hidden}  # a mask goes along
    assert sent["downlink"] == {"forward": hidden, "backward": hidden}
    ends, whole = ends_and_whole(settings)
    assert sent["adapters"]["up"] == edge_rounds * len(CLIENTS) * ends + edges * whole
    assert sent["adapters"]["down"] == edge_rounds * len(CLIENTS) * ends + edges * whole


def test_bytes_of_a_round_count_its_participants(tmp_path: Path, data_settings: Settings) -> None:
    settings = {
        "data.train_file": data_settings["data.train_file"],
        "data.validation_fraction": 0.0,
        "strategy.participation": 0.5,
    }
    run = run_here(tmp_path, "run", settings)
    ends, whole = ends_and_whole(settings)
    for epoch in range(2):
        assert run.metrics()[epoch]["bytes/adapters/up"] == 2 * ends + whole


def events(folder: Path) -> dict[tuple[str, int], float]:
    """The scalars in TensorBoard's files, by name and step: records of a length, a checksum, an event and another."""
    found: dict[tuple[str, int], float] = {}
    for path in folder.glob("events.*"):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + size :]
    return found


def test_tensorboard_has_what_the_table_has(run: Run) -> None:
    found = events(run.folder / "tensorboard")
    table = pd.read_csv(run.folder / "metrics.csv").set_index("step")
    for name in ("train_loss", "val_accuracy", "bytes/adapters/up", "test_accuracy"):
        rows = table[name].dropna()
        assert len(rows) == (1 if name == "test_accuracy" else 5)
        assert {step: found[name, step] for step in rows.index} == pytest.approx(rows.to_dict(), rel=1e-6)


def test_other_loggers(tmp_path: Path, data_settings: Settings) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}}
    run = run_here(tmp_path, "run", {**data_settings, "trainer.logger": logger})
    (table,) = (tmp_path / "logs").rglob("metrics.csv")
    assert pd.read_csv(table)["val_accuracy"].count() == 2
    assert not (run.folder / "tensorboard").exists()
    assert not (run.folder / "metrics.csv").exists()
