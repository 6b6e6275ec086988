"""Several torchruns on loopback: two nodes of a simulation, and sites that bring their own files."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
from lightning.pytorch.callbacks import Callback

from elsa_pl.rpc.lifecycle import free_port
from tests.runs import (
    ROOT,
    Settings,
    arguments,
    assert_equal,
    assert_success,
    find_run,
    fork_all,
    run_here,
    write_data,
    write_tickets,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TIMEOUT_S = 250
LABELS = ["account", "billing", "device", "network"]


def torchrun(node: int, num_nodes: int, port: int, arguments: list[str]) -> subprocess.Popen[str]:
    """One torchrun with one process."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={num_nodes}", f"--node_rank={node}"]
    launch += ["--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}", "train.py"]
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        [*launch, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Outputs of processes that all must succeed within a time for all; none is left behind."""
    deadline = time.monotonic() + TIMEOUT_S
    outputs = []
    try:
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                for late in processes:
                    late.terminate()  # torchrun passes it on; killed, it would leave its own process behind
                outputs.append(process.communicate(timeout=35)[0] + f"\nended after {TIMEOUT_S} s")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n--- ".join(outputs)
    return outputs


def test_two_torchruns_give_the_same_numbers(tmp_path: Path) -> None:
    """``--nnodes=2``: the cloud and its edges on one node, the clients on the other."""
    settings = {**write_data(tmp_path), "strategy.num_edges": 2}
    here = run_here(tmp_path / "here", "run", {**settings, "strategy.layout": "single"})
    port = free_port()
    settings = {**settings, "strategy.layout": "tiers"}
    command = arguments(tmp_path / "nodes", "run", settings)
    wait_for([torchrun(node, 2, port, command) for node in (0, 1)])
    run = find_run(tmp_path / "nodes", "run")
    assert_equal(run.adapters(), here.adapters())
    assert run.summary()["test_accuracy"] == here.summary()["test_accuracy"]
    assert run.summary()["bytes"] == here.summary()["bytes"]


def test_sites_train_on_their_own_files(tmp_path: Path) -> None:
    """Each process names its role; data stays where it is; the cloud is not rank 0 and has no data.

    The edge judges the sites on a file of probes, and the links between them are measured.
    """
    test_file = write_tickets(tmp_path / "test.csv", 40, seed=9)
    write_tickets(tmp_path / "tickets.csv", 24, seed=8)
    pd.read_csv(tmp_path / "tickets.csv")[["text"]].to_csv(tmp_path / "probes.csv", index=False)
    names = ("BehaviorClustering", "TrustScoring", "LatencyAwareAssignment", "ResourceAwareSplitting")
    common = {
        "strategy.layout": "site",
        "data.labels": LABELS,
        "data.train_file": str(tmp_path / "none.csv"),
        "data.probe_file": str(tmp_path / "probes.csv"),
        "profile": {"distribution": "uniform"},
        "trainer.callbacks": [{"class_path": name} for name in names],
    }
    sites: list[Settings] = [
        {**common, "strategy.role": "edge", "strategy.name": "edge-north"},
        {**common, "strategy.role": "cloud"},
    ]
    for index, size in enumerate((60, 90)):
        train_file = write_tickets(tmp_path / f"site-{index}.csv", size, seed=index)
        mine = {"data.train_file": train_file, "strategy.role": "host", "strategy.name": f"hospital-{index}"}
        # only one of them has test data
        sites.append({**common, **mine, **({"data.test_file": test_file} if index == 0 else {})})
    fit = [arguments(tmp_path / "runs", "run", site) for site in sites]
    assert_success(fork_all(fit, tmp_path / "fit"))
    run = find_run(tmp_path / "runs", "run")
    summary = run.summary()
    assert summary["rounds"] == 2
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["test_accuracy"] * 40 == pytest.approx(round(summary["test_accuracy"] * 40), abs=1e-4)
    assert summary["test_merged_accuracy"] is None, "no site holds the whole model"
    metrics = pd.read_csv(run.folder / "metrics.csv")
    assert metrics["train_loss"].notna().sum() == 2
    assert (metrics["simulated/round_s"].dropna() > 0).sum() == 2
    assert {"trust/hospital-0", "trust/hospital-1"} <= set(metrics.columns)
    # each host predicts the rows of its own file, beside its own name; only the cloud (index 1) has the checkpoint, and
    # nobody needs probes
    predicted = tmp_path / "predicted"
    sites = [
        {
            **site,
            "data.test_file": test_file,
            "data.probe_file": None,
            "ckpt_path": str(run.checkpoint()) if index == 1 else "of_the_cloud.ckpt",
        }
        for index, site in enumerate(sites)
    ]
    predict = [["predict", *arguments(predicted, "run", site)[1:]] for site in sites]
    assert_success(fork_all(predict, tmp_path / "predict"))
    files = list(predicted.glob("run/*-predict/*/predictions.csv"))
    assert {file.parent.name for file in files} == {"hospital-0", "hospital-1"}
    assert [len(pd.read_csv(file)) for file in files] == [40, 40]


class Quitter(Callback):
    """Ends a site once the others are about to measure the links to it.

    Args:
        worker: which.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        strategy: Any = trainer.strategy

        def quit_late(_: object) -> None:
            time.sleep(3)
            os._exit(7)

        if strategy.world.worker == self._worker:
            strategy._make_rounds = quit_late


def test_a_site_that_ends_before_links_are_measured_is_named(tmp_path: Path) -> None:
    quitter = {"class_path": "tests.test_sites.Quitter", "init_args": {"worker": "hospital-1"}}
    common = {
        "strategy.layout": "site",
        "data.labels": LABELS,
        "data.train_file": write_tickets(tmp_path / "train.csv", 60, seed=0),
        "profile": {"distribution": "uniform"},
        "trainer.callbacks": [quitter],
    }
    sites: list[Settings] = [{**common, "strategy.role": "cloud"}]
    for role, name in (("edge", "edge-north"), ("host", "hospital-0"), ("host", "hospital-1")):
        sites.append({**common, "strategy.role": role, "strategy.name": name})
    commands = [arguments(tmp_path / "runs", "run", site) for site in sites]
    cloud, *others = fork_all(commands, tmp_path / "fit")
    assert [site.returncode for site in (cloud, *others)] == [1, 1, 1, 7]
    assert "error: hospital-1 ended before the links to the edges were measured" in cloud.err
    assert "Traceback" not in cloud.err


def test_the_config_of_sites(tmp_path: Path) -> None:
    """`configs/site.yaml`, and on the command line what its header says: roles, names, and where each file lies."""
    fit = ["fit", "--config", "configs/site.yaml", "--output_dir", str(tmp_path / "runs")]
    fit += ["--trainer.max_epochs", "1", "--trainer.strategy.local_steps", "2"]
    processes = [[*fit, "--trainer.strategy.role", "cloud"]]
    processes += [[*fit, "--trainer.strategy.role", "edge", "--trainer.strategy.name", "edge-north"]]
    for index in range(2):
        (tmp_path / f"site-{index}").mkdir()
        write_tickets(tmp_path / f"site-{index}" / "train.csv", 60, seed=index)
        own = ["--trainer.strategy.role", "host", "--trainer.strategy.name", f"hospital-{index}"]
        processes.append([*fit, *own, "--data_root", str(tmp_path / f"site-{index}")])
    port = free_port()
    cloud, *_ = wait_for([torchrun(node, 4, port, process) for node, process in enumerate(processes)])
    assert "round 1/1  train_loss" in cloud
    run = find_run(tmp_path / "runs", "site")
    assert run.summary()["rounds"] == 1
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()
