"""Where a run's parts are does not change its numbers: one process, several, or torchrun's."""

import time
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback

from tests.runs import (
    ROOT,
    Run,
    Settings,
    assert_equal,
    initial_adapters,
    moved,
    run_apart,
    run_command,
    run_forked,
    run_here,
    write_data,
)

SETTINGS = {
    "strategy.num_edges": 2,
    "strategy.edge_rounds": 2,
    "strategy.participation": 0.75,
    "strategy.micro_batches": 2,
    "strategy.adapter_bits": 8,
    "model.lora": {"dropout": 0.1},
    "model.gradient_clip_val": 0.5,
    "model.accumulate_grad_batches": 2,
    "model.lr_schedule": "cosine",
    "model.warmup_fraction": 0.25,
    "data.batch_size": 4,
}
TIERS = {"strategy.layout": "tiers"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return {**SETTINGS, **write_data(tmp_path_factory.mktemp("data"))}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Run:
    return run_here(tmp_path_factory.mktemp("single"), "run", {**settings, "strategy.layout": "single"})


def comparable(metrics: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Without what depends on the machine."""
    return {
        epoch: {name: value for name, value in row.items() if not name.startswith("seconds/")}
        for epoch, row in metrics.items()
    }


def assert_same_run(run: Run, single: Run, *, hosts: int = 1) -> None:
    """Bit for bit, but for sums over evaluation batches, which several hosts share out and pad differently."""
    assert_equal(run.adapters(), single.adapters())
    got, expected = comparable(run.metrics()), comparable(single.metrics())
    assert got.keys() == expected.keys()
    for epoch, row in expected.items():
        assert got[epoch] == (row if hosts == 1 else pytest.approx(row, rel=1e-6)), epoch
    accuracies = [name for name in ("val_accuracy", "val_f1") for row in expected.values() if name in row]
    assert accuracies, "validation took place"
    assert run.summary()["test_accuracy"] == single.summary()["test_accuracy"]
    assert run.summary()["rounds"] == single.summary()["rounds"] == 2


def test_the_reference_trains(single: Run, settings: Settings) -> None:
    assert moved(single.adapters(), initial_adapters(settings))
    assert {"train_loss", "val_loss", "val_accuracy"} <= single.metrics()[1].keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_our_launcher_gives_the_same_numbers(tmp_path: Path, settings: Settings, single: Run) -> None:
    run = run_apart(tmp_path, "run", {**settings, "strategy.layout": "full", "strategy.num_hosts": 2})
    assert_same_run(run, single, hosts=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("hosts", [1, 2])
def test_tiers_give_the_same_numbers(hosts: int, tmp_path: Path, settings: Settings, single: Run) -> None:
    settings = {**settings, **TIERS, "strategy.num_hosts": hosts}
    assert_same_run(run_forked(tmp_path / "runs", "run", settings, 1 + hosts), single, hosts=hosts)


class LateCloud(Callback):
    """The first process begins each round well after the others."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            time.sleep(2.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_late_cloud_gives_the_same_numbers(tmp_path: Path, settings: Settings, single: Run) -> None:
    """Nobody steps at an edge that has the optimizer states of the round before."""
    settings = {**settings, **TIERS, "trainer.callbacks": [{"class_path": "tests.test_layouts.LateCloud"}]}
    assert_same_run(run_forked(tmp_path / "runs", "run", settings, 2), single)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_gives_the_same_numbers(tmp_path: Path, settings: Settings, single: Run) -> None:
    prefix = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    run = run_command(prefix, tmp_path, "run", {**settings, **TIERS})
    assert_same_run(run, single)


def test_passes_in_flight_do_not_change_the_numbers(tmp_path: Path, settings: Settings, single: Run) -> None:
    """Threads share nothing that they draw from or write to."""
    run = run_here(tmp_path, "run", {**settings, "strategy.passes_in_flight": 1})
    assert_same_run(run, single)


@pytest.mark.parametrize("plan", [(4, 0, 0), (1, 3, 0)], ids=["uncut", "two-part"])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.timeout(300)
def test_other_divisions_train_the_same_model(
    plan: tuple[int, int, int], processes: int, tmp_path: Path, settings: Settings
) -> None:
    """Federated averaging of the uncut model, and a two-part split: what differs is what is sent."""
    # what stays at an edge is not rounded on its way to the mean
    settings = {**settings, "strategy.adapter_bits": 32}
    whole = run_here(tmp_path, "whole", {**settings, "strategy.layout": "single"})
    settings = {**settings, "model.plan": dict(zip(("front", "middle", "tail"), plan, strict=True))}
    if processes == 1:
        run = run_here(tmp_path, "run", {**settings, "strategy.layout": "single"})
    else:
        run = run_forked(tmp_path / "runs", "run", {**settings, **TIERS, "strategy.num_hosts": 2}, processes)
    assert_equal(run.adapters(), whole.adapters())
    for epoch, row in comparable(whole.metrics()).items():
        figures = {name: value for name, value in row.items() if not name.startswith("bytes/")}
        assert {name: run.metrics()[epoch][name] for name in figures} == pytest.approx(figures, rel=1e-6)
    sent, expected = (each.summary()["bytes"] for each in (run, whole))
    assert sent["adapters"]["up"] > expected["adapters"]["up"] if plan[1] == 0 else sent["adapters"]["up"] > 0
    links = [place for link in ("uplink", "downlink") for place in sent.get(link, {}).values()]
    if plan[1] == 0:
        assert not any(links)
    else:
        if processes == 1:  # several hosts share out the evaluation's texts and pad them differently
            assert sent["uplink"]["forward"] > expected["uplink"]["forward"], "labels go to the edge"
        assert sent["uplink"]["backward"] == expected["uplink"]["backward"]
        assert sum(sent["downlink"].values()) < 0.05 * sum(expected["downlink"].values())


def test_bf16_is_used(tmp_path: Path, settings: Settings, single: Run) -> None:
    run = run_here(tmp_path, "run", {**settings, "trainer.precision": "bf16-mixed"})
    losses = [each.metrics()[1]["train_loss"] for each in (run, single)]
    assert losses[0] != losses[1], "fp32 would give this"
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_early_stopping_stops_every_process(tmp_path: Path, settings: Settings) -> None:
    """A process that missed the decision would wait for the others until a deadline, and main would fail."""
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "val_loss", "patience": 1, "min_delta": 100.0},
    }
    settings = {**settings, **TIERS, "trainer.callbacks": [stop], "trainer.max_epochs": 6}
    run = run_forked(tmp_path / "runs", "run", settings, num_processes=2)
    assert run.summary()["rounds"] == 2
    assert run.summary()["test_accuracy"] is not None
