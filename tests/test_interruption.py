"""Runs that are interrupted, and processes that die: what is promised then holds, and nothing is left running.

The runs take seconds each, mostly for imports, so two go on side by side from the first test on; each test looks at
its own. Every fault is shown to have struck: the process is gone, by that signal, at that moment of the run.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.runs import ROOT, Forked, arguments, write_data

pytestmark = pytest.mark.slow

VARIABLE = "ELSA_TEST_INTERRUPTION"
SIDE_BY_SIDE = 2
START_S = 60.0


def fair(seconds: float) -> float:
    """A limit for an idle machine, made longer in proportion where other work shares the cores."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Signpost(Callback):
    """Shows from outside where a run is: a file per stage, round and process, with the process' id in it.

    Args:
        folder: where the files lie.
        pause_s: seconds to stay in each batch of validation and test.
    """

    def __init__(self, folder: str, pause_s: float = 0.0) -> None:
        self._folder, self._pause_s = Path(folder), pause_s

    def _show(self, stage: str, trainer: "pl.Trainer") -> None:
        worker = trainer.strategy.world.worker  # type: ignore[attr-defined]  # ours
        sign = self._folder / f"{stage}-{trainer.current_epoch}-{worker}"
        partial = sign.with_suffix(".partial")
        partial.write_text(str(os.getpid()))
        partial.rename(sign)

    def on_train_batch_start(self, trainer: "pl.Trainer", *_: object) -> None:
        self._show("train", trainer)

    def on_validation_batch_start(self, trainer: "pl.Trainer", *_: object) -> None:
        self._show("validation", trainer)
        time.sleep(self._pause_s)

    def on_test_batch_start(self, trainer: "pl.Trainer", *_: object) -> None:
        self._show("test", trainer)
        time.sleep(self._pause_s)


def processes(mark: str) -> dict[int, str]:
    """Command lines of the processes whose environment has the mark, without zombies."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"{VARIABLE}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    return found


@dataclass
class Interrupted:
    """A run in processes of its own, for a test to strike at.

    Args:
        folder: where it writes.
        settings: in addition to DATA.
        pause_s: see `Signpost`.
        forked: its first process is forked, where the test is about the others, which are started anew in any case.
    """

    folder: Path
    settings: Mapping[str, object]
    pause_s: float = 0.0
    forked: bool = False
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> "Interrupted":
        self.signs = self.folder / "signs"
        self.signs.mkdir(parents=True, exist_ok=True)
        callbacks = [
            {
                "class_path": "tests.test_interruption.Signpost",
                "init_args": {"folder": str(self.signs), "pause_s": self.pause_s},
            }
        ]
        settings = {**DATA, "strategy.layout": "tiers", "trainer.callbacks": callbacks, **self.settings}
        command = arguments(self.folder / "runs", "run", settings)
        environment = {VARIABLE: self.mark, "PYTHONPATH": str(ROOT)}
        self.first: subprocess.Popen[bytes] | Forked
        if self.forked:
            self.first = Forked(command, self.folder / "first", environment, self.folder)
            return self
        with (self.folder / "first.out").open("w") as out, (self.folder / "first.err").open("w") as err:
            self.first = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *command],
                stdout=out,
                stderr=err,
                env={**os.environ, **environment},
                cwd=self.folder,
            )
        return self

    def __exit__(self, *_: object) -> None:
        for pid in processes(self.mark):
            os.kill(pid, signal.SIGKILL)
        self.first.kill()
        self.first.wait()

    @property
    def out(self) -> str:
        return (self.folder / "first.out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "first.err").read_text()

    def logs(self) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("runs/run/*/logs/*")))

    def until(self, reached: Callable[[], object], what: str) -> None:
        """Wait for a moment of the run."""
        deadline = time.monotonic() + fair(START_S)
        while not reached():
            assert self.first.poll() is None, f"ended before {what}:\n{self.out}{self.err}{self.logs()}"
            assert time.monotonic() < deadline, f"no {what} in {START_S} s:\n{self.out}{self.err}{self.logs()}"
            time.sleep(0.005)

    def sign(self, stage: str, worker: str, least_round: int = 0) -> int:
        """The process id of a worker that has reached a stage and round; 0 if it has not."""
        for path in self.signs.glob(f"{stage}-*-{worker}"):
            if int(path.name.split("-")[1]) >= least_round:
                return int(path.read_text())
        return 0

    def strike(self, stage: str, worker: str, number: signal.Signals, least_round: int = 0) -> None:
        """Send a signal to a worker once it has reached a stage and round, and see it die of it."""
        self.until(lambda: self.sign(stage, worker, least_round), f"{stage} in {worker}")
        pid = self.sign(stage, worker, least_round)
        assert pid != self.first.pid
        os.kill(pid, number)
        deadline = time.monotonic() + fair(10)
        while is_running(pid):
            assert time.monotonic() < deadline, f"{worker} does not end on {number.name}"
            time.sleep(0.005)
        assert self.first.poll() is None, "the run was over before the fault"

    def ends(self, within_s: float) -> int:
        """Wait for the end of the first process; returns its exit code."""
        try:
            return self.first.wait(fair(within_s))
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within_s} s:\n{self.out}{self.err}{self.logs()}")

    def leaves_nothing(self, within_s: float) -> None:
        """All of the run's processes end."""
        deadline = time.monotonic() + fair(within_s)
        while left := processes(self.mark):
            assert time.monotonic() < deadline, f"left after {within_s} s: {left}\n{self.err}{self.logs()}"
            time.sleep(0.05)

    def last_checkpoint(self) -> Path:
        (path,) = self.folder.glob("runs/run/*/checkpoints/last.ckpt")
        return path

    def rounds_in_checkpoint(self) -> int:
        content = torch.load(self.last_checkpoint(), weights_only=True)
        assert all(torch.is_tensor(value) for value in content["state_dict"].values())
        rounds: int = content["elsa_totals"]["num_rounds"]
        return rounds


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


DATA: dict[str, str] = {}
LONG = {"trainer.max_epochs": 500}

# ---- Ctrl-C and SIGTERM at the first process -----------------------------------------------------------------------


def interrupt(run: Interrupted, number: signal.Signals) -> None:
    os.kill(run.first.pid, number)
    code = run.ends(8)
    run.leaves_nothing(2)
    # before our handlers are in place Python's own end the process, which a shell shows as the same code
    assert code in (128 + number, -number), run.err


def while_importing(folder: Path) -> None:
    with Interrupted(folder, LONG) as run:
        maps = Path(f"/proc/{run.first.pid}/maps")  # earlier, it would be Python that is interrupted while it starts
        run.until(lambda: "libtorch_cpu" in maps.read_text(), "torch is being loaded")
        interrupt(run, signal.SIGINT)
        assert not list(folder.glob("runs/run/*")), "nothing had begun"


def while_meeting(folder: Path) -> None:
    with Interrupted(folder, LONG) as run:
        # an import runs ldconfig, so only a child with this command is the run's own
        run.until(lambda: any("elsa_pl.cli" in command for command in processes(run.mark).values()), "child")
        time.sleep(0.5)
        assert not list(run.signs.iterdir()), "they have met already"
        interrupt(run, signal.SIGTERM)
        assert "Traceback" not in run.err
        assert "stopped" in run.err


def while_training(folder: Path) -> None:
    with Interrupted(folder, LONG) as run:
        run.until(lambda: run.sign("train", "cloud", 2), "round 2")
        interrupt(run, signal.SIGINT)
        assert run.first.returncode == 130
        assert "Traceback" not in run.err
        assert "stopped; the last checkpoint is kept" in run.err
        rounds = run.rounds_in_checkpoint()
        assert rounds >= 2
        resumed = {
            "trainer.max_epochs": rounds + 1,
            "ckpt_path": str(run.last_checkpoint()),
            "strategy.layout": "tiers",
        }
    with Interrupted(folder / "resumed", resumed, forked=True) as again:
        assert again.ends(START_S) == 0, again.err + again.logs()
        assert f"round {rounds + 1}/{rounds + 1}" in again.out
        assert f"round {rounds}/" not in again.out


def while_validating(folder: Path) -> None:
    with Interrupted(folder, LONG, pause_s=0.5) as run:
        run.until(lambda: run.sign("validation", "cloud", 1), "validation of round 1")
        interrupt(run, signal.SIGTERM)
        assert run.first.returncode == 143
        assert "Traceback" not in run.err
        assert "stopped; the last checkpoint is kept" in run.err
        assert run.rounds_in_checkpoint() == 1


def while_testing(folder: Path) -> None:
    with Interrupted(folder, {"trainer.max_epochs": 1}, pause_s=0.5) as run:
        run.until(lambda: run.sign("test", "cloud"), "test")
        interrupt(run, signal.SIGINT)
        assert run.first.returncode == 130
        assert "Traceback" not in run.err
        assert run.rounds_in_checkpoint() == 1


def killed_first(folder: Path) -> None:
    # in the middle of a long round nobody has anything to ask of the cloud, so they must notice by themselves
    long = {"strategy.layout": "full", "strategy.local_steps": 5000, "strategy.round_timeout_s": 600}
    with Interrupted(folder, {**LONG, **long}) as run:
        run.until(lambda: run.sign("train", "host-0"), "steps")
        assert len(processes(run.mark)) == 3
        run.first.kill()
        assert run.ends(5) == -signal.SIGKILL
        run.leaves_nothing(15)


# ---- other processes die ---------------------------------------------------------------------------------------------


def killed_and_terminated_hosts(folder: Path) -> None:
    with Interrupted(folder, {"trainer.max_epochs": 9, "strategy.num_hosts": 3}, forked=True) as run:
        run.strike("train", "host-1", signal.SIGKILL, least_round=1)
        run.strike("train", "host-2", signal.SIGTERM, least_round=4)
        assert run.ends(START_S) == 0, run.err + run.logs()
        run.leaves_nothing(10)
        assert not run.sign("train", "host-1", 4), "the fault came too late to matter"
        assert not run.sign("train", "host-2", 8), "the fault came too late to matter"
        for lost in ("host-1", "client-2", "host-2", "client-3"):
            assert lost in run.err
        assert "Traceback" not in run.err
        assert "round 9/9" in run.out
        assert "test_accuracy" in run.out
        assert run.rounds_in_checkpoint() == 9


def killed_host_in_validation(folder: Path) -> None:
    with Interrupted(folder, {"trainer.max_epochs": 3, "strategy.num_hosts": 2}, pause_s=0.3, forked=True) as run:
        run.strike("validation", "host-0", signal.SIGKILL, least_round=1)
        assert run.ends(START_S) == 0, run.err + run.logs()
        run.leaves_nothing(10)
        assert not run.sign("validation", "host-0", 2), "the fault came too late to matter"
        assert "host-0" in run.err
        assert "round 3/3" in run.out


def killed_only_host(folder: Path) -> None:
    with Interrupted(folder, LONG, forked=True) as run:
        run.strike("train", "host-0", signal.SIGKILL, least_round=1)
        assert run.ends(20) == 1
        run.leaves_nothing(10)
        (line,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
        assert "no edge answered" in line or "host-0" in line
        assert "Traceback" not in run.err
        assert run.rounds_in_checkpoint() >= 1


def killed_edge(folder: Path) -> None:
    edges = {"strategy.layout": "full", "strategy.num_edges": 2, "strategy.edge_rounds": 2, "strategy.local_steps": 8}
    with Interrupted(folder, {**edges, "trainer.max_epochs": 6}, forked=True) as run:
        run.strike("train", "edge-0", signal.SIGKILL, 1)
        code = run.ends(START_S)
        run.leaves_nothing(10)
        assert not run.sign("train", "edge-0", 5), "the fault came too late to matter"
        assert code == 0, run.err + run.logs()
        assert "edge-0" in run.err
        assert "client-0" in run.err
        assert "client-2" in run.err
        assert "round 6/6" in run.out


def diverged(folder: Path) -> None:
    # the rate rises from 0, so that round 0 leaves a good checkpoint
    settings = {
        **LONG,
        "strategy.local_steps": 1,
        "model.warmup_fraction": 1.0,
        "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e38}},
    }
    with Interrupted(folder, settings, forked=True) as run:
        assert run.ends(START_S) == 1, run.err + run.logs()
        run.leaves_nothing(10)
        assert "round 1/500" in run.out
        (line,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
        for word in ("the loss of client-", "in round ", "step 0", "lower the learning rate"):
            assert word in line
        assert "Traceback" not in run.err
        assert "Traceback" not in run.logs()
        assert run.rounds_in_checkpoint() >= 1


SCENARIOS: dict[str, Callable[[Path], None]] = {
    scenario.__name__: scenario
    for scenario in (
        while_importing,
        while_meeting,
        while_training,
        while_validating,
        while_testing,
        killed_first,
        killed_and_terminated_hosts,
        killed_host_in_validation,
        killed_only_host,
        killed_edge,
        diverged,
    )
}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[None]"]]:
    """The scenarios of the selected tests, under way."""
    DATA.update(write_data(tmp_path_factory.mktemp("data")))
    items: Iterable[Any] = request.session.items
    chosen = [item.callspec.params["name"] for item in items if "outcomes" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {name: pool.submit(SCENARIOS[name], tmp_path_factory.mktemp(name)) for name in chosen}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SCENARIOS)
def test_interruption(name: str, outcomes: dict[str, "Future[None]"]) -> None:
    outcomes[name].result()
