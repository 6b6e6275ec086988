"""Runs of the product on data and models so small that a test can afford several of them."""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from elsa_pl import cli
from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.models import uncut
from elsa_pl.tiers import SplitModel

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
    "strategy.startup_timeout_s": 60,
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


def run_here(output_dir: Path, name: str, settings: Settings) -> Run:
    """Run in this process: layouts of one process only.

    A second world in one process numbers RPC's barriers on from the first, which fresh peers do not.
    """
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
