"""Every file in `configs/` runs as its header says, at reduced size, through the public command."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.models import resolve_model
from tests.runs import ROOT, Run, find_run, write_data

REDUCED = ["--trainer.max_epochs", "1", "--trainer.strategy.init_args.local_steps", "2"]
OWN_DATA = ["--data.num_clients", "4"]
TIMEOUT_S = 110


def run_config(config: str, output_dir: Path, *more: str) -> tuple[Run, str]:
    """Run ``python train.py fit --config ...`` from the root; returns the run and what it printed."""
    command = [sys.executable, "train.py", "fit", "--config", f"configs/{config}", "--output_dir", str(output_dir)]
    done = subprocess.run(
        [*command, *REDUCED, *more], cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "Seed set to 0\n" or not done.stderr, "a good run warns of nothing"
    return find_run(output_dir, Path(config).stem), done.stdout


def test_every_config_is_tested_and_says_how_it_is_run() -> None:
    source = Path(__file__).read_text()
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in source, f"add a test of {path.name}"
        header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        assert re.search(rf"python train\.py fit --config configs/{path.name}", header)
        assert "Time:" in header
        assert "Hardware:" in header


def test_quickstart(tmp_path: Path) -> None:
    run, printed = run_config("quickstart.yaml", tmp_path)
    summary = run.summary()
    assert summary["rounds"] == 1
    assert summary["bytes"]["total"] > 0
    for told in ("test_accuracy", "MB", str(run.folder / "adapter"), str(run.folder / "summary.json")):
        assert told in printed
    # the adapter in plain transformers and peft does what the run measured through the pipeline
    data = FederatedTextDataModule(dataset="bundled:helpdesk", tokenizer="bundled:all-MiniLM-L6-v2", max_length=48)
    data.load()
    folder = resolve_model("bundled:all-MiniLM-L6-v2")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=data.num_labels)
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    right = total = 0
    with torch.no_grad():
        for batch in data.eval_batches("test")[:2]:
            labels = batch["labels"]
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
            total += len(labels)
    assert total == 128
    assert 0 < right < total, "something was learnt, and two steps are not enough"


def test_own_csv_files(tmp_path: Path) -> None:
    files = write_data(tmp_path)
    given = [part for name, path in files.items() for part in (f"--{name}", path)]
    run, printed = run_config("text_classification.yaml", tmp_path / "runs", *given, *OWN_DATA)
    assert run.summary()["test_accuracy"] is not None
    assert "4 labels" in printed


def test_saved_settings_start_another_run(tmp_path: Path) -> None:
    """`config.yaml` holds what was given, not the folder of the run that it came from."""
    files = write_data(tmp_path)
    given = [part for name, path in files.items() for part in (f"--{name}", path)]
    extra = ["--trainer.strategy.init_args.layout", "single"]
    first, _ = run_config("text_classification.yaml", tmp_path / "a", *given, *OWN_DATA, *extra)
    command = [sys.executable, "train.py", "fit", "--config", str(first.folder / "config.yaml")]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "b")], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    second = find_run(tmp_path / "b", "text_classification")
    assert second.checkpoint().is_file()
    names = ["train_loss", "val_loss", "test_loss"]
    left, right = (pd.read_csv(run.folder / "metrics.csv")[names].max() for run in (first, second))
    pd.testing.assert_series_equal(left, right, check_exact=True)


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_configs_state_known_settings_only(config: str) -> None:
    command = [sys.executable, "train.py", "fit", "--config", f"configs/{config}", "--print_config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "HierarchicalStrategy" in done.stdout
