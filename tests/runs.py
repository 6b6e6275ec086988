"""Runs of the product on data and models so small that a test can afford several of them."""

import functools
import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import docstring_parser
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from elsa_pl import cli
from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.models import uncut
from elsa_pl.rpc.lifecycle import free_port
from elsa_pl.tiers import SplitModel

# The command line reads the docstrings of the Trainer and of our classes, which takes most of the time until it starts
# anything. They are the same for each of the hundreds of commands here.
docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)

ROOT = Path(__file__).resolve().parent.parent
TINY_BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 30522,
    # wider than usual, so that a few steps change what the model says
    "initializer_range": 0.2,
}
TINY_LLAMA = {**TINY_BERT, "model_type": "llama", "num_key_value_heads": 2}
TOKENIZER = "bundled:all-MiniLM-L6-v2"
DEFAULTS: dict[str, Any] = {
    "model.model": None,
    "model.model_config": TINY_BERT,
    "model.plan": {"front": 1, "middle": 2, "tail": 1},
    "data.tokenizer": TOKENIZER,
    "data.num_clients": 4,
    "data.batch_size": 8,
    "data.max_length": 24,
    "trainer.max_epochs": 2,
    "strategy.local_steps": 2,
    "strategy.startup_timeout_s": 120,
    "strategy.call_timeout_s": 60,
    "strategy.round_timeout_s": 60,
}
_TOPICS = {
    "network": "router wifi cable signal tower connection",
    "billing": "invoice refund charge card payment receipt",
    "account": "password login email username profile locked",
    "device": "screen battery keyboard printer charger broken",
}
_FILLERS = ["my", "the", "is", "again", "since", "yesterday", "please", "help", "with", "it", "does", "not", "work"]

Settings = Mapping[str, Any]


def write_tickets(path: Path, count: int, seed: int) -> str:
    """Write short texts of different lengths with one of four labels; returns the path."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label = list(_TOPICS)[index % len(_TOPICS)]
        words = draw.choices(_FILLERS, k=draw.randint(1, 12)) + draw.choices(_TOPICS[label].split(), k=2)
        rows.append({"text": " ".join(draw.sample(words, len(words))), "label": label})
    pd.DataFrame(rows).to_csv(path, index=False)
    return str(path)


def write_data(folder: Path) -> dict[str, str]:
    """Write 120 training and 30 test texts; returns the settings that name them."""
    return {
        "data.train_file": write_tickets(folder / "train.csv", 120, seed=0),
        "data.test_file": write_tickets(folder / "test.csv", 30, seed=1),
    }


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    folder: Path

    def checkpoint(self, epoch: int | None = None) -> Path:
        """The last checkpoint, or that of an epoch."""
        if epoch is None:
            return self.folder / "checkpoints" / "last.ckpt"
        (path,) = (self.folder / "checkpoints").glob(f"epoch={epoch}-*.ckpt")
        return path

    def content(self, epoch: int | None = None) -> dict[str, Any]:
        """Everything in a checkpoint."""
        content: dict[str, Any] = torch.load(self.checkpoint(epoch), weights_only=True)
        return content

    def adapters(self, epoch: int | None = None) -> dict[str, Tensor]:
        """The global adapters of a checkpoint, by global layer name."""
        state = self.content(epoch)["state_dict"]
        assert all(name.startswith("adapters.") for name in state), "a checkpoint holds adapters, nothing else"
        return {name.removeprefix("adapters."): value for name, value in state.items()}

    def metrics(self) -> dict[int, dict[str, float]]:
        """What was logged, by epoch; the test's figures stand under the number of epochs."""
        rows = pd.read_csv(self.folder / "metrics.csv")
        merged = rows.drop(columns="step").groupby("epoch").max()
        return {
            int(epoch): {str(name): float(value) for name, value in row.dropna().items()}
            for epoch, row in merged.iterrows()
        }

    def summary(self) -> dict[str, Any]:
        """The contents of summary.json."""
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary


def arguments(output_dir: Path, name: str, settings: Settings) -> list[str]:
    """The command line of a run; ``strategy.x`` stands for a setting of the strategy."""
    merged = {**DEFAULTS, **settings}
    args = ["fit", "--name", name, "--output_dir", str(output_dir)]
    for key, value in merged.items():
        key = key.replace("strategy.", "trainer.strategy.init_args.", 1) if key.startswith("strategy.") else key
        args += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return args


@contextmanager
def without_pictures() -> Iterator[None]:
    """Let figures be made, but no pixels: those take half of the time of a run here, and few tests look at them."""

    def save(figure: Figure, target: Any, **settings: Any) -> None:
        if not isinstance(target, io.IOBase):
            Path(target).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


def run_here(output_dir: Path, name: str, settings: Settings, *, pictures: bool = False) -> Run:
    """Run in this process: layouts of one process only.

    A second world in one process numbers RPC's barriers on from the first, which fresh peers do not.
    """
    with nullcontext() if pictures else without_pictures():
        assert cli.main(arguments(output_dir, name, settings)) == 0
    return find_run(output_dir, name)


def run_command(prefix: Sequence[str], output_dir: Path, name: str, settings: Settings) -> Run:
    """Run ``python <prefix> <settings>`` from the root of the repository."""
    command = [sys.executable, *prefix, *arguments(output_dir, name, settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return find_run(output_dir, name)


def run_apart(output_dir: Path, name: str, settings: Settings) -> Run:
    """Run in a process of its own, which starts the others of the layout."""
    return run_command(["-m", "elsa_pl.cli"], output_dir, name, settings)


_FORKS = multiprocessing.get_context("forkserver")
# as everybody starts it: train.py sets what must be set before torch is loaded
_FORKS.set_forkserver_preload(["train", __name__])
# starting a process looks for the ends of all, and an exit code can be read once
_ONE_AT_A_TIME = threading.Lock()


def _main(arguments: Sequence[str], environment: Mapping[str, str], outputs: Sequence[Path], folder: Path) -> None:
    """What ``python train.py`` does."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["train.py", *arguments]
    with without_pictures():
        sys.exit(cli.main())


class Forked:
    """A command in a process that is forked from one that has imported everything; for the rest, a `subprocess.Popen`.

    Imports take longer than most of the runs here. What starts processes anew, our launcher and torchrun, has tests of
    its own.

    Args:
        arguments: the command line, beginning with the command.
        outputs: where stdout and stderr go, but for the ends ``.out`` and ``.err``.
        environment: variables beside those of the tests.
        folder: working directory.
    """

    def __init__(
        self, arguments: Sequence[str], outputs: Path, environment: Mapping[str, str], folder: Path = ROOT
    ) -> None:
        self._arguments = arguments
        self._outputs = [outputs.with_suffix(end) for end in (".out", ".err")]
        target = (arguments, environment, self._outputs, folder)
        self._process: ForkServerProcess = _FORKS.Process(target=_main, args=target)
        with _ONE_AT_A_TIME, chdir(ROOT):  # the first one starts the server, which imports from here
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the number of the signal that it died of; None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """The same."""
        with _ONE_AT_A_TIME:
            return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        connection.wait([self._process.sentinel], timeout_s)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(list(self._arguments), timeout_s or 0.0)
        return code

    def kill(self) -> None:
        """Send SIGKILL, if it is still there."""
        self._process.kill()

    @property
    def out(self) -> str:
        return self._outputs[0].read_text()

    @property
    def err(self) -> str:
        return self._outputs[1].read_text()


def fork_all(
    commands: Sequence[Sequence[str]], folder: Path, *, timeout_s: float = 250.0, workdir: Path = ROOT
) -> list[Forked]:
    """Run the processes of one run, each with a command line of its own, and wait for them; none is left behind.

    Args:
        commands: a command line for each rank.
        folder: where their outputs go, as ``rank-<number>.out`` and ``.err``.
        timeout_s: seconds for all of them.
        workdir: their working directory.

    Raises:
        subprocess.TimeoutExpired: one does not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks: list[Forked] = []
    deadline = time.monotonic() + timeout_s
    try:
        for rank, command in enumerate(commands):
            ranks.append(Forked(command, folder / f"rank-{rank}", {**here, "RANK": str(rank)}, workdir))
        for forked in ranks:
            forked.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for forked in ranks:
            forked.kill()
            forked.wait()
    return ranks


def run_forked(output_dir: Path, name: str, settings: Settings, num_processes: int) -> Run:
    """Run in so many processes, which somebody else than our launcher starts."""
    command = arguments(output_dir, name, settings)
    ranks = fork_all([command] * num_processes, output_dir.with_suffix(".outputs"))
    assert_success(ranks)
    return find_run(output_dir, name)


def assert_success(ranks: Sequence[Forked]) -> None:
    """Every process ended with success."""
    outputs = "".join(f"--- rank {rank}\n{forked.out}{forked.err}" for rank, forked in enumerate(ranks))
    assert [forked.returncode for forked in ranks] == [0] * len(ranks), outputs


def find_run(output_dir: Path, name: str) -> Run:
    """The one run of a name."""
    (folder,) = (output_dir / name).iterdir()
    return Run(folder)


def make_data(settings: Settings, task: Any = "classification") -> FederatedTextDataModule:
    """The data module that a run of these settings has, loaded."""
    fields = {k.removeprefix("data."): v for k, v in {**DEFAULTS, **settings}.items() if k.startswith("data.")}
    data = FederatedTextDataModule(**fields, task=task, seed=0)
    data.load()
    return data


def make_module(settings: Settings, num_labels: int | None = 4) -> SplitModel:
    """The module that a run of these settings has, with its model built; plans and optimizer are the defaults."""
    merged = {**DEFAULTS, **settings}
    module = SplitModel(
        merged["model.model"], merged["model.model_config"], task=merged.get("model.task", "classification"), seed=0
    )
    module.num_labels = num_labels
    return module


def initial_adapters(settings: Settings) -> dict[str, Tensor]:
    """The global adapters before the first round."""
    model = uncut(make_module(settings).build())
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors under the same names, bit for bit."""
    assert got.keys() == expected.keys()
    different = {
        name: (got[name] - value).abs().max().item()
        for name, value in expected.items()
        if not torch.equal(got[name], value)
    }
    assert not different, different


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float) -> None:
    """The same tensors under the same names, up to an absolute difference."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        difference = (got[name].float() - value.float()).abs().max().item()
        assert difference <= atol, f"{name}: {difference:.2e} > {atol:.0e}"


def moved(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    """Whether every tensor changed; without this, equality could mean that nothing was trained."""
    return all(not torch.equal(after[name], value) for name, value in before.items())
