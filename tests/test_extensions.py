"""What users write to extend a run, in `examples/`: it does what it says, alone and in a run of several processes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.functional.aggregation import weighted_mean
from elsa_pl.links import Codec
from elsa_pl.rpc.messages import Update
from tests.runs import ROOT, TOKENIZER, find_run, write_data

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of an example, found as `PYTHONPATH=examples` lets a run find it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return pytest.importorskip(request.param)


@pytest.mark.parametrize("example", ["keep_largest"], indirect=True)
def test_largest_numbers_arrive_and_their_gradients_come_back(example: Any) -> None:
    stage = example.KeepLargest(kept=2).link_stage("uplink")
    codec = Codec("uplink.1-2-1", "uplink", [stage], 6)
    encoder, decoder = codec.side("encoder"), codec.side("decoder")
    states = torch.tensor([[[1.0, -5.0, 0.5, 3.0, 0.0, -2.0]]], requires_grad=True)
    sent = encoder(states)
    assert sent.shape == (1, 1, 4)
    arrived = decoder(sent)
    assert arrived.tolist() == [[[0.0, -5.0, 0.0, 3.0, 0.0, 0.0]]]
    arrived.sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [[[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]]
    with pytest.raises(ValueError, match="kept must be at most 1"):
        stage.ends(3, "uplink", None)
    with pytest.raises(ValueError, match="kept must be at least 1"):
        example.KeepLargest(kept=0)


@pytest.mark.parametrize("example", ["centred_clipping"], indirect=True)
def test_no_sender_pulls_farther_than_the_median_one(example: Any) -> None:
    honest = [{"a": torch.tensor([1.0 + step / 10, 0.0])} for step in range(4)]
    liar = {"a": torch.tensor([-1e6, 1e6])}
    assert example.centred_clipping(honest[:1], [3.0])["a"].tolist() == [1.0, 0.0]
    merged = example.centred_clipping([*honest, liar], [1.0] * 5)["a"]
    assert (merged - weighted_mean(honest, [1.0] * 4)["a"]).norm() < 0.2

    updates = [Update(f"client-{index}", 2.0, sent) for index, sent in enumerate([*honest, liar])]
    lost = Update("client-5", 1.0, {"a": torch.tensor([torch.nan, 0.0])})
    trainer: Any = SimpleNamespace()
    (update,) = example.CentredClipping().on_before_aggregate(trainer, "edge", [*updates, lost])
    assert update.weight == 10
    assert torch.equal(update.adapters["a"], merged)
    assert example.CentredClipping().on_before_aggregate(trainer, "edge", [lost]) == []


@pytest.mark.parametrize("example", ["unequal_sizes"], indirect=True)
def test_unequal_sizes_become_clients(example: Any, tmp_path: Path) -> None:
    parts = example.unequal_sizes(100, 4, 1.0, np.random.default_rng(0))
    assert [len(part) for part in parts] == [47, 24, 16, 13]
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert [len(part) for part in example.unequal_sizes(4, 4, 9.0, np.random.default_rng(0))] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="expected 1 <= num_clients <= 3"):
        example.unequal_sizes(3, 4, 1.0, np.random.default_rng(0))

    files = write_data(tmp_path)
    owned = tmp_path / "owned.csv"
    example.main([files["data.train_file"], str(owned), "--num_clients", "3"])
    data = FederatedTextDataModule(
        train_file=str(owned),
        test_file=files["data.test_file"],
        tokenizer=TOKENIZER,
        partition="column",
        client_column="client",
        validation_fraction=0,
    )
    data.load()
    assert data.client_sizes == pd.read_csv(owned)["client"].value_counts().to_dict()
    assert len(data.client_sizes) == 3


@pytest.mark.slow
def test_stage_and_aggregator_in_a_run_of_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "fit", "--config", "configs/debug.yaml", "--output_dir", str(tmp_path)]
    own = ["--trainer.callbacks+=keep_largest.KeepLargest", "--trainer.callbacks+=centred_clipping.CentredClipping"]
    more = ["--trainer.callbacks+=CommunicationMonitor", "--trainer.strategy.layout", "tiers"]
    few = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        [*command, *own, *more, *few],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = find_run(tmp_path, "debug")
    assert run.summary()["rounds"] == 1
    traffic = pd.read_csv(run.folder / "traffic.csv").query("phase == 'training'")
    sent = traffic.groupby(["link", "direction"])["payload_bytes"].sum()
    assert sent["downlink", "forward"] == sent["downlink", "backward"] == sent["uplink", "backward"] > 0
    assert 1 < sent["uplink", "forward"] / sent["downlink", "forward"] < 1.02, "masks go with the states"
