"""The benchmark against Flower compares what it says: both systems take the same steps, and nothing is left running."""

import importlib.util
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import torch
from torch import Tensor

from benchmarks.flower import __main__ as command
from benchmarks.flower import processes
from benchmarks.flower.outcome import run_flower
from benchmarks.flower.recorder import RoundRecorder
from benchmarks.flower.task import MODEL, PLAN, LocalTraining, Task, local_training
from tests.runs import assert_close, assert_equal, moved, run_here, write_tickets

INSTALLED = importlib.util.find_spec("flwr") is not None
if INSTALLED:  # here and not in a test, since it is slow and sets environment variables
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from benchmarks.flower.client import app
    from benchmarks.flower.simulation import MeasuredFedAvg

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # messages name who sent them

needs_flower = pytest.mark.skipif(not INSTALLED, reason="flwr is not installed: pip install -e '.[flower]'")

SLEEPER = "import time; time.sleep(300)"
PARENT = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}], start_new_session=True)
print(child.pid, flush=True)
"""


@pytest.fixture(autouse=True)
def _forget_models() -> Iterator[None]:
    yield
    local_training.cache_clear()


def make_task(folder: Path, **settings: Any) -> Task:
    (folder / "trec").mkdir()
    write_tickets(folder / "trec" / "train.csv", 120, seed=0)
    write_tickets(folder / "trec" / "test.csv", 30, seed=1)
    return Task(data_root=str(folder), batch_size=8, max_length=24, local_steps=2, num_rounds=2, **settings)


def train_ours(task: Task, folder: Path) -> list[dict[str, Tensor]]:
    """The global adapters after each round of a run of this project."""
    recorder = f"{RoundRecorder.__module__}.{RoundRecorder.__name__}"
    settings = {
        "seed_everything": task.seed,
        "model.model": MODEL,
        "model.model_config": None,
        "model.plan": PLAN,
        "model.optimizer": {"class_path": "AdamW", "init_args": {"lr": task.lr}},
        **{f"data.{name}": value for name, value in task.data_settings.items()},
        "trainer.max_epochs": task.num_rounds,
        "trainer.callbacks": [{"class_path": recorder, "init_args": {"folder": str(folder)}}],
        "strategy.local_steps": task.local_steps,
    }
    run_here(folder, "ours", settings)
    return [torch.load(folder / f"round-{n + 1}.pt", weights_only=True) for n in range(task.num_rounds)]


def train_in_flower(task: Task, client: int, round: int, adapters: dict[str, Tensor]) -> Any:
    """What Flower's client answers in a round, counted from 1."""
    config = ConfigRecord({**asdict(task), "server-round": round})
    content = RecordDict({"arrays": ArrayRecord(adapters), "config": config})
    context = Context(0, 0, node_config={"partition-id": client}, state=RecordDict(), run_config={})
    return app(Message(content, dst_node_id=1, message_type="train"), context)


@pytest.mark.slow
@needs_flower
@pytest.mark.parametrize("model_per_message", [False, True])
def test_local_steps_are_equal(workdir: Path, monkeypatch: pytest.MonkeyPatch, model_per_message: bool) -> None:
    made = []
    renew = LocalTraining.renew

    def counted(training: LocalTraining) -> None:
        made.append(training)
        renew(training)

    monkeypatch.setattr(LocalTraining, "renew", counted)
    # With one client the global adapters are its own.
    task = make_task(workdir, num_clients=1, seed=3, model_per_message=model_per_message)
    first, second = train_ours(task, workdir)
    before = local_training(task).adapters()
    answers = [
        train_in_flower(task, 0, 1 + n, start).content["arrays"].to_torch_state_dict()
        for n, start in enumerate((before, first))
    ]
    assert moved(first, before)
    assert_equal(answers[0], first)
    assert_equal(answers[1], second)
    assert len(made) == (3 if model_per_message else 1)


@pytest.mark.slow
@needs_flower
def test_rounds_are_equal_but_for_the_order_of_sums(workdir: Path) -> None:
    task = make_task(workdir, num_clients=3)
    ours = train_ours(task, workdir)
    adapters = local_training(task).adapters()
    strategy = MeasuredFedAvg(task.num_clients)
    for round, expected in enumerate(ours, start=1):
        answers = [train_in_flower(task, client, round, adapters) for client in range(task.num_clients)]
        mean, _ = strategy.aggregate_train(round, answers)
        assert mean is not None
        assert_close(mean.to_torch_state_dict(), expected, atol=1e-6)
        adapters = expected
    assert strategy.up_bytes[0] > sum(4 * value.numel() for value in adapters.values()) * task.num_clients


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_flower
def test_a_simulation_leaves_nothing_running(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid4()
    monkeypatch.setattr(processes, "uuid4", lambda: mark)
    task = make_task(workdir, num_clients=3)
    outcome = run_flower(task, workdir)
    assert len(outcome.round_s) == len(outcome.val_accuracy) == task.num_rounds
    assert min(outcome.cpu_s) > 0
    assert not processes.marked(mark.hex)
    first = outcome.adapters(1)  # before the other run writes the same file
    expected = train_ours(task, workdir)[0]
    assert_close(first, expected, atol=1e-6)


@needs_flower
def test_a_client_that_fails_ends_the_run(workdir: Path) -> None:
    strategy = MeasuredFedAvg(2)
    with pytest.raises(RuntimeError, match="1 clients answered"):
        strategy.aggregate_train(1, [Message(RecordDict(), dst_node_id=1, message_type="train")])


def test_nothing_else_imports_flower() -> None:
    own = processes.ROOT / "benchmarks" / "flower"
    folders = ("elsa_pl", "callbacks", "datamodules", "rpc", "benchmarks", "examples")
    files = [file for folder in folders for file in (processes.ROOT / folder).rglob("*.py")]
    assert own / "client.py" in files
    found = [file for file in files if re.search(r"^\s*(import|from) (flwr|ray)\b", file.read_text(), re.MULTILINE)]
    assert {file.parent for file in found} == {own}


def test_without_flower_there_is_a_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.missing(["torch", "no_such_module"]) == ["no_such_module"]
    monkeypatch.setattr(command, "missing", lambda: ["flwr"])
    monkeypatch.setattr(sys, "argv", ["benchmarks.flower", "--data_root", "data"])
    with pytest.raises(SystemExit, match=r"flwr not installed: pip install -e '\.\[flower\]'"):
        command.main()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--num_clients", "0"], "expected --num_clients >= 1, got 0"),
        (["--rounds", "2"], "expected --rounds >= 3, got 2"),
        (["--seeds", "1", "1"], r"expected seeds that differ, got \[1, 1\]"),
    ],
)
def test_sizes_that_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    monkeypatch.setattr(command, "missing", list)
    monkeypatch.setattr(sys, "argv", ["benchmarks.flower", "--data_root", "data", *arguments])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert re.search(error, capsys.readouterr().err)


def still_runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("ending", ["", "sys.exit(3)"])
def test_detached_processes_end_with_their_command(tmp_path: Path, ending: str) -> None:
    log = tmp_path / "log.txt"
    if ending:
        with pytest.raises(SystemExit, match="failed"):
            processes.run(["-c", PARENT + ending], log)
    else:
        assert processes.run(["-c", PARENT], log) <= time.time()
    assert not still_runs(int(log.read_text()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, -2)])
def test_detached_processes_end_when_the_benchmark_is_stopped(tmp_path: Path, number: int, code: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from benchmarks.flower import processes\n"
        f"code = {PARENT + 'child.wait()'!r}\n"
        "with processes.ending_on_signals():\n"
        "    processes.run(['-c', code], Path(__file__).with_name('log.txt'))\n"
    )
    environment = {"PYTHONPATH": str(processes.ROOT)}
    benchmark = psutil.Popen([sys.executable, str(script)], env=environment)
    log = tmp_path / "log.txt"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert benchmark.poll() is None
        time.sleep(0.1)
    for _ in range(2):  # also from who is impatient
        benchmark.send_signal(number)
        time.sleep(0.2)
    assert benchmark.wait(60) == code
    assert not still_runs(int(log.read_text()))
