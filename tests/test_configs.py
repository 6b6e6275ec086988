"""Every file in `configs/` runs as its header says, at reduced size, through the public command."""

import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from elsa_pl import cli
from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.models import resolve_model
from tests.runs import ROOT, Run, assert_success, find_run, fork_all, write_data

CONFIGS = ROOT / "configs"
REDUCED = ["--trainer.max_epochs", "1", "--trainer.strategy.init_args.local_steps", "2"]
OWN_DATA = ["--data.num_clients", "4"]
TIMEOUT_S = 250
# folder, columns, rows and labels of the data sets that configs refer to as ${data_root}/FOLDER/train.csv and test.csv
DATA: dict[str, tuple[str, list[str], tuple[int, int], int]] = {
    "trec.yaml": ("trec", ["text", "label"], (5452, 500), 6),
    "banking77.yaml": ("banking77", ["text", "label"], (10_003, 3_080), 77),
    "agnews.yaml": ("agnews_small", ["text", "label"], (6_600, 1_000), 4),
    "pairs.yaml": ("rte", ["text", "text_pair", "label"], (2_490, 277), 2),
}
DATA_ROOT = os.environ.get("ELSA_DATA_ROOT")


def run_config(config: str, output_dir: Path, *more: str) -> tuple[Run, str]:
    """Run ``python train.py fit --config ...`` from the root; returns the run and what it printed."""
    command = [sys.executable, "train.py", "fit", "--config", f"configs/{config}", "--output_dir", str(output_dir)]
    done = subprocess.run(
        [*command, *REDUCED, *more], cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "Seed set to 0\n" or not done.stderr, "a good run warns of nothing"
    return find_run(output_dir, Path(config).stem), done.stdout


def run_here(config: Path, output_dir: Path, *more: str) -> Run:
    """Run in this process, with every role in it: what a config states is tried at the price of a few steps."""
    command = ["fit", "--config", str(config), "--output_dir", str(output_dir)]
    with warnings.catch_warnings():
        # Lightning, when the own process has a command line too, as pytest has
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        assert cli.main([*command, "--trainer.strategy.layout", "single", *more]) == 0
    (name,) = output_dir.iterdir()
    return find_run(output_dir, name.name)


def write_stand_in(folder: Path, columns: list[str], num_labels: int) -> None:
    """Write few rows in the form of a data set: words of no meaning, and all of its labels."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = ["card", "bank", "game", "team", "river", "which", "who", "what", "where", "stock", "moon", "said"]
    for split, count in (("train", 4 * num_labels + 60), ("test", 2 * num_labels + 10)):
        rows = [{name: " ".join(draw.choices(words, k=draw.randint(3, 20))) for name in columns} for _ in range(count)]
        for index, row in enumerate(rows):
            row["label"] = f"label {index % num_labels}"
        pd.DataFrame(rows).to_csv(folder / f"{split}.csv", index=False)


def test_every_config_is_tested_and_says_how_it_is_run() -> None:
    source = Path(__file__).read_text()
    for path in CONFIGS.glob("*.yaml"):
        assert path.name in source, f"add a test of {path.name}"
        header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
        launch = r"torchrun.*\n(?:#.*\n)*?#   \$LAUNCH .* " if path.name == "site.yaml" else "python "
        assert re.search(rf"{launch}train\.py fit --config configs/{path.name}", header)
        assert "Time:" in header
        assert "Hardware:" in header


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quickstart(tmp_path: Path) -> None:
    limits = ["--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"]
    run, printed = run_config("quickstart.yaml", tmp_path, *limits)
    summary = run.summary()
    assert summary["rounds"] == 1
    assert summary["bytes"]["total"] > 0
    assert summary["seconds"]["simulated"] > 0
    pictures = {"divergences.png", "clients.png", "trust.png", "assignment.png"}
    assert pictures <= {path.name for path in run.folder.iterdir()}
    assert {f"trust/client-{index}" for index in range(8)} <= run.metrics()[0].keys()
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
    assert summary["test_accuracy"] == pytest.approx(right / total, abs=1e-7)


@pytest.fixture(scope="module")
def own_csv(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run of `text_classification.yaml` on files of the user's own, and what it printed."""
    folder = tmp_path_factory.mktemp("own_csv")
    given = [part for name, path in write_data(folder).items() for part in (f"--{name}", path)]
    command = ["fit", "--config", "configs/text_classification.yaml", "--output_dir", str(folder / "runs")]
    ranks = fork_all([[*command, *REDUCED, *OWN_DATA, *given]] * 2, folder / "outputs")
    assert_success(ranks)
    assert ranks[0].err in ("", "Seed set to 0\n"), "a good run warns of nothing"
    return find_run(folder / "runs", "text_classification"), ranks[0].out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_own_csv_files(own_csv: tuple[Run, str]) -> None:
    run, printed = own_csv
    assert run.summary()["test_accuracy"] is not None
    assert "4 labels" in printed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_saved_settings_start_another_run(own_csv: tuple[Run, str], tmp_path: Path) -> None:
    """`config.yaml` holds what was given, not the folder of the run that it came from."""
    first, _ = own_csv
    second = run_here(first.folder / "config.yaml", tmp_path)
    assert second.folder.parent == tmp_path / "text_classification"
    assert second.checkpoint().is_file()
    names = ["train_loss", "val_loss", "test_loss"]
    left, right = (pd.read_csv(run.folder / "metrics.csv")[names].max() for run in (first, second))
    pd.testing.assert_series_equal(left, right, check_exact=True)


@pytest.mark.parametrize("config", DATA)
def test_data_sets(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, columns, _, num_labels = DATA[config]
    write_stand_in(tmp_path / "data" / folder, columns, num_labels)
    run = run_here(
        CONFIGS / config, tmp_path / "runs", "--data_root", str(tmp_path / "data"), *REDUCED, "--data.num_clients", "3"
    )
    printed = capsys.readouterr().out
    assert f"; {num_labels} labels\n" in printed
    assert "3 clients, 2 edges" in printed
    assert run.summary()["rounds"] == 1
    assert 0 <= run.summary()["test_accuracy"] <= 1


@pytest.mark.skipif(DATA_ROOT is None, reason="the data sets are not here: set ELSA_DATA_ROOT to their folder")
@pytest.mark.parametrize("config", DATA)
def test_real_data_is_what_the_config_says(config: str) -> None:
    assert DATA_ROOT is not None
    _, _, sizes, num_labels = DATA[config]
    text = (CONFIGS / config).read_text().replace("${data_root}", DATA_ROOT)
    data = FederatedTextDataModule(**yaml.safe_load(text)["data"])
    data.load()
    found = data.split_sizes
    assert (found["train"] + found["validation"], found["test"]) == sizes
    assert data.num_labels == num_labels
    assert min(data.client_sizes.values()) > 16, "no client is all but empty"


def test_causal_lm_learns(tmp_path: Path) -> None:
    """Each round lowers the perplexity of the validation texts."""
    more = ["--trainer.max_epochs", "3", "--trainer.strategy.local_steps", "3", "--data.num_clients", "2"]
    limits = ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--data.eval_batch_size", "32"]
    run = run_here(CONFIGS / "causal_lm.yaml", tmp_path, *more, *limits)
    first, second, third = (run.metrics()[epoch]["val_perplexity"] for epoch in range(3))
    assert first < 30_522, "better than a guess among all tokens"
    assert third < second < first
    assert run.summary()["test_perplexity"] < first


def test_debug(tmp_path: Path) -> None:
    run = run_here(CONFIGS / "debug.yaml", tmp_path)
    assert run.summary()["rounds"] == 2
    assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_configs_state_known_settings_only(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(CONFIGS / config), "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "elsa_pl.strategies.HierarchicalStrategy" in printed
    assert "torch.optim.AdamW" in printed or config == "debug.yaml"
    assert "${" not in printed
