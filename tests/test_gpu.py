"""Tiers on GPUs: the numbers of the CPU, up to rounding, on one device and across two."""

from pathlib import Path

import pytest
import torch

from tests.runs import Run, Settings, assert_close, initial_adapters, moved, run_apart, run_here, write_data

pytestmark = pytest.mark.slow

NUM_GPUS = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="needs a CUDA GPU")
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two CUDA GPUs, there are {NUM_GPUS}")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return {"strategy.micro_batches": 2, **write_data(tmp_path_factory.mktemp("data"))}


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Run:
    return run_here(tmp_path_factory.mktemp("cpu"), "run", settings)


def assert_like(run: Run, on_cpu: Run, settings: Settings, atol: float) -> None:
    assert moved(run.adapters(), initial_adapters(settings))
    assert_close(run.adapters(), on_cpu.adapters(), atol=atol)
    assert run.metrics()[1]["train_loss"] == pytest.approx(on_cpu.metrics()[1]["train_loss"], rel=atol * 10)


@needs_gpu
@pytest.mark.parametrize(("precision", "atol"), [("32-true", 1e-4), ("bf16-mixed", 5e-3)])
def test_one_gpu(tmp_path: Path, settings: Settings, on_cpu: Run, precision: str, atol: float) -> None:
    devices = {"strategy.client_device": "cuda:0", "strategy.edge_device": "cuda:0"}
    run = run_here(tmp_path, "run", {**settings, **devices, "trainer.precision": precision})
    assert_like(run, on_cpu, settings, atol)
    if precision == "bf16-mixed":
        assert run.metrics()[0]["train_loss"] != on_cpu.metrics()[0]["train_loss"]


@needs_gpu
def test_clients_on_the_cpu_and_edges_on_a_gpu(tmp_path: Path, settings: Settings, on_cpu: Run) -> None:
    run = run_apart(tmp_path, "run", {**settings, "strategy.layout": "tiers", "strategy.edge_device": "cuda:0"})
    assert_like(run, on_cpu, settings, 1e-4)


@needs_two
def test_two_gpus_by_device_maps(tmp_path: Path, settings: Settings, on_cpu: Run) -> None:
    devices = {"strategy.client_device": "cuda:0", "strategy.edge_device": "cuda:1"}
    run = run_apart(tmp_path, "run", {**settings, **devices, "strategy.layout": "tiers"})
    assert_like(run, on_cpu, settings, 1e-4)
