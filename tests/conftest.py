"""What every test shares: one thread per process, no network, and nothing left behind.

A thread, an environment variable, a file or torch without gradients that one test leaves behind changes the next
one, far from its cause. So the test that leaves it fails.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and passed on to the processes that tests start. More threads than cores make runs
# of several processes slow, and sums depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent

# Set by pytest, by Lightning's seeding, by libraries when first imported: put back, but no fault of the test.
_TOLERATED_VARIABLES = (
    "CRC32C_SW_MODE",  # tensorboardX
    "CUBLAS_WORKSPACE_CONFIG",
    "KMP_",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PYTEST_",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
)
_THREAD_GRACE_S = 3.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, or at the end one worker is busy with one of them and the others idle.

    The order within a module stays: its tests share runs.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def _threads() -> set[threading.Thread]:
    """Threads that would keep the process alive. Those of libraries are daemons."""
    return {thread for thread in threading.enumerate() if thread.is_alive() and not thread.daemon}


def _files() -> set[str]:
    return {name for name in os.listdir(ROOT) if not name.startswith(".") and name != "__pycache__"}


def _restore_environment(before: dict[str, str]) -> list[str]:
    """Put every variable back; return the changes that a test answers for."""
    after = dict(os.environ)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed:
        if name.startswith("PYTEST_"):
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return [f"{name}={after.get(name)!r}" for name in changed if not name.startswith(_TOLERATED_VARIABLES)]


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail the test that leaves a thread, an environment variable, a file in the root or gradients off behind."""
    threads, environment, files = _threads(), dict(os.environ), _files()
    yield
    faults = [f"environment: {change}" for change in _restore_environment(environment)]
    deadline = time.monotonic() + _THREAD_GRACE_S
    for thread in _threads() - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    faults += sorted(f"thread: {thread.name}" for thread in _threads() - threads)
    faults += sorted(f"file: {name}" for name in _files() - files)
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        faults.append("gradients are off")
    if faults:
        pytest.fail("left behind by the test: " + "; ".join(faults), pytrace=False)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that a run leaves its `runs/` there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
