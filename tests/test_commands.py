"""The other commands on what a fit left behind: the same figures, predictions that agree, and clear errors."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from elsa_pl import cli
from tests.runs import ROOT, TINY_LLAMA, Run, arguments, assert_success, find_run, fork_all, run_here, write_data

FIGURES = ["accuracy", "f1", "loss"]
STRATEGY = "--trainer.strategy.init_args."
SETTINGS = {
    "strategy.num_edges": 2,
    "strategy.local_steps": 10,
    "data.partition": "iid",
    "model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.02}},
    "trainer.max_epochs": 3,
}


@dataclass(frozen=True)
class Fitted:
    """A run, and the folder that holds the data it names by ``${data_root}``."""

    run: Run
    data: Path

    @property
    def args(self) -> list[str]:
        return ["--run", str(self.run.folder)]


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """The settings of a tiny run, as a YAML file whose data files are below ``${data_root}``."""
    content: dict[str, Any] = {}
    words = arguments(path, "x", settings)[5:]
    for key, value in zip(words[::2], words[1::2], strict=True):
        *groups, leaf = key.removeprefix("--").split(".")
        place = content
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = yaml.safe_load(value)
    content["trainer"]["strategy"]["class_path"] = "HierarchicalStrategy"
    content["data"] |= {"train_file": "${data_root}/train.csv", "test_file": "${data_root}/test.csv"}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    data = tmp_path_factory.mktemp("data")
    write_data(data)
    config = write_config(data / "tiny.yaml", SETTINGS)
    output_dir = tmp_path_factory.mktemp("runs")
    assert cli.main(["fit", "--config", str(config), "--data_root", str(data), "--output_dir", str(output_dir)]) == 0
    return Fitted(find_run(output_dir, "tiny"), data)


def command(name: str, fitted: Fitted, output_dir: Path, *more: str) -> Run:
    """Run a command from the fitted run's folder, in this process."""
    assert cli.main([name, *fitted.args, "--output_dir", str(output_dir), *more]) == 0
    return find_run(output_dir, "tiny")


def predicted(run: Run) -> list[dict[str, str]]:
    with (run.folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def content_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def the_error(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    return line


def test_merged_model_equals_the_pipeline(fitted: Fitted) -> None:
    summary = fitted.run.summary()
    assert summary["test_accuracy"] > 0.4, "something was learnt, so that a model without adapters would show"
    for figure in ("accuracy", "f1"):
        assert summary[f"test_merged_{figure}"] == summary[f"test_{figure}"]
    assert summary["test_merged_loss"] == pytest.approx(summary["test_loss"], abs=1e-5)


def test_test_gives_the_figures_of_the_fit(fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = content_of(fitted.run.folder)
    run = command("test", fitted, tmp_path)
    assert run.folder.name.endswith("-test")
    got, expected = run.summary(), fitted.run.summary()
    names = [f"{prefix}_{figure}" for prefix in ("test", "test_merged") for figure in FIGURES]
    assert {name: got[name] for name in names} == {name: expected[name] for name in names}
    assert got["adapter"] is None
    assert 1 <= got["rounds"] <= 3
    assert content_of(fitted.run.folder) == before
    out, err = capfd.readouterr()
    assert f"test_accuracy {got['test_accuracy']:.4f}" in out
    assert "<dt>test accuracy</dt>" in (run.folder / "report.html").read_text()
    assert str(run.folder / "summary.json") in out
    assert not [line for line in err.splitlines() if "Warning" in line or "eprecat" in line]


def test_validate_gives_the_figures_of_the_best_round(fitted: Fitted, tmp_path: Path) -> None:
    run = command("validate", fitted, tmp_path)
    summary = run.summary()
    assert run.folder.name.endswith("-validate")
    validated = [row for row in fitted.run.metrics().values() if "val_accuracy" in row]
    best = max(validated, key=lambda row: row["val_accuracy"])
    for figure in FIGURES:
        assert summary[f"val_{figure}"] == pytest.approx(best[f"val_{figure}"], abs=1e-7)
    assert "test_accuracy" not in summary
    assert "<dt>validation accuracy</dt>" in (run.folder / "report.html").read_text()


def test_predictions_have_the_accuracy_of_the_test(
    fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = command("predict", fitted, tmp_path)
    rows = predicted(run)
    with (fitted.data / "test.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    assert list(rows[0]) == ["text", "label", "prediction", "probability"]
    assert [(row["text"], row["label"]) for row in rows] == [(row["text"], row["label"]) for row in expected]
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert right / len(rows) == pytest.approx(fitted.run.summary()["test_accuracy"], abs=1e-7)
    assert all(0.25 <= float(row["probability"]) <= 1 for row in rows)
    assert f"predictions: {run.folder / 'predictions.csv'}" in capfd.readouterr().out


def test_predict_file_needs_no_labels(fitted: Fitted, tmp_path: Path) -> None:
    texts = ["refund of the invoice, please", 'my "router"\nis broken', "password"]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = command("predict", fitted, tmp_path / "runs", "--data.predict_file", str(tmp_path / "new.jsonl"))
    rows = predicted(run)
    assert [row["text"] for row in rows] == texts
    assert list(rows[0]) == ["text", "prediction", "probability"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_predictions_do_not_depend_on_the_layout(fitted: Fitted, tmp_path: Path) -> None:
    """The second host predicts nothing, and waits; the file is written by another process than the first."""
    here = command("predict", fitted, tmp_path / "here")
    given = ["predict", *fitted.args, "--output_dir", str(tmp_path / "there")]
    given += [f"{STRATEGY}layout", "tiers", f"{STRATEGY}num_hosts", "2"]
    ranks = fork_all([given] * 3, tmp_path / "outputs")
    assert_success(ranks)
    there = find_run(tmp_path / "there", "tiny")
    assert predicted(there) == predicted(here)
    assert str(there.folder / "predictions.csv") in ranks[0].out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_tests_and_gives_the_same_figures(fitted: Fitted, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "train.py"]
    given = ["test", *fitted.args, "--output_dir", str(tmp_path), f"{STRATEGY}layout", "tiers"]
    done = subprocess.run([*launch, *given], cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    run = find_run(tmp_path, "tiny")
    assert {name: run.summary()[name] for name in ("test_accuracy", "test_merged_accuracy")} == {
        name: fitted.run.summary()[name] for name in ("test_accuracy", "test_merged_accuracy")
    }


def test_causal_lm(tmp_path: Path) -> None:
    settings = {"model.model_config": TINY_LLAMA, "model.task": "causal_lm", "data.partition": "iid"}
    run = run_here(tmp_path, "tiny", {**write_data(tmp_path), **settings})
    summary = run.summary()
    assert summary["test_merged_perplexity"] == pytest.approx(summary["test_perplexity"], rel=1e-4)
    rows = predicted(command("predict", Fitted(run, tmp_path), tmp_path / "predicted"))
    assert list(rows[0]) == ["text", "label", "num_tokens", "loss"]
    tokens = [int(row["num_tokens"]) for row in rows]
    loss = sum(count * float(row["loss"]) for count, row in zip(tokens, rows, strict=True)) / sum(tokens)
    assert loss == pytest.approx(summary["test_loss"], rel=1e-5)


def test_fit_goes_on_from_a_run(fitted: Fitted, tmp_path: Path) -> None:
    run = command("fit", fitted, tmp_path, "--trainer.max_epochs", "4")
    assert run.summary()["rounds"] == 4
    assert sorted(run.metrics()) == [3, 4], "the first three rounds were not run again"


def test_data_root_of_the_command_line_counts(fitted: Fitted, tmp_path: Path) -> None:
    """The run's own settings, saved, still follow it."""
    assert "${data_root}/train.csv" in (fitted.run.folder / "config.yaml").read_text()
    moved = tmp_path / "moved"
    fitted.data.rename(moved)
    try:
        summary = command("test", fitted, tmp_path / "runs", "--data_root", str(moved)).summary()
    finally:
        moved.rename(fitted.data)
    assert summary["test_accuracy"] == fitted.run.summary()["test_accuracy"]


def test_print_config_resolves(fitted: Fitted, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(fitted.data / "tiny.yaml"), "--data_root", "/elsewhere", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["data"]["train_file"] == "/elsewhere/train.csv"


# ---- what users get wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--model.plan", "{front: 2, middle: 1, tail: 1}"], ["model.plan", "'front': 1", "'front': 2"]),
        (["--model.lora.rank", "4"], ["model.lora.rank is 8 in the checkpoint and 4 in the settings"]),
        (["--model.lora.target_modules", "[query]"], ["model.lora.target_modules", "['query']"]),
        (["--model.model_config.initializer_range", "0.1"], ["model.model_config", "0.2", "0.1"]),
        (["--data.labels", "[network, billing, account, device]"], ["data.labels", "['account', 'billing'"]),
    ],
    ids=["cut", "rank", "targets", "model", "labels"],
)
def test_checkpoint_of_another_model(
    changed: list[str], words: list[str], fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = [f"{STRATEGY}layout", "tiers"]  # no other process is started
    assert cli.main(["test", *fitted.args, "--output_dir", str(tmp_path / "runs"), *layout, *changed]) == 1
    the_error(capfd, ".ckpt does not fit", "--run FOLDER", *words)
    assert not (tmp_path / "runs").exists()


def test_checkpoint_of_another_task(fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extra = ["--model.task", "causal_lm", "--output_dir", str(tmp_path / "runs"), "--data.partition", "iid"]
    config = {**TINY_LLAMA, "initializer_range": 0.2}
    assert cli.main(["test", *fitted.args, *extra, "--model.model_config", json.dumps(config)]) == 1
    the_error(capfd, "model.task is 'classification' in the checkpoint and 'causal_lm' in the settings")


def test_finished_run(fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", *fitted.args, "--output_dir", str(tmp_path / "runs")]) == 1
    the_error(capfd, "round 3", "max_epochs=3", "raise")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_untrained_model(name: str, fitted: Fitted, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--config", str(fitted.data / "tiny.yaml"), "--data_root", str(fitted.data)]) == 1
    the_error(capfd, name, "--run FOLDER", "--ckpt_path FILE")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("", ["no such folder"]),
        ("config.yaml", ["config.yaml", "found none"]),
        ("checkpoints/last.ckpt", ["last.ckpt", "found none"]),
        ("best", ["best checkpoint", "epoch=", "--ckpt_path"]),
    ],
)
def test_folder_that_is_no_run(
    missing: str, words: list[str], fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    if missing:
        (folder / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "checkpoints/last.ckpt"):
            if name != missing:
                (folder / name).write_bytes((fitted.run.folder / name).read_bytes())
    assert cli.main(["test", "--run", str(folder)]) == 1
    the_error(capfd, str(folder), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["predict_file", "new.csv"]),
        ("", ["empty file", "new.csv"]),
        ("text,label\n", ["expected rows", "predict_file"]),
        ("sentence\nhello there\n", ["'text'", "predict_file", "sentence", "text_column"]),
        ("text\nhello\n' '\n\" \"\n", ["empty cell", "row 3"]),
    ],
    ids=["missing", "empty", "header", "no-text", "gap"],
)
def test_bad_predict_file(
    content: str | None, words: list[str], fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new.csv"
    if content is not None:
        file.write_text(content)
    extra = ["--data.predict_file", str(file), "--output_dir", str(tmp_path / "runs")]
    assert cli.main(["predict", *fitted.args, *extra]) == 1
    the_error(capfd, *words)
    assert not (tmp_path / "runs").exists()


def test_nothing_to_evaluate(fitted: Fitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extra = ["--data.test_file", "null", "--output_dir", str(tmp_path / "runs")]
    for name, words in (("test", ["data.test_file"]), ("predict", ["data.predict_file"])):
        assert cli.main([name, *fitted.args, *extra]) == 1
        the_error(capfd, *words)
    assert cli.main(["validate", *fitted.args, *extra, "--data.validation_fraction", "0"]) == 1
    the_error(capfd, "data.validation_fraction")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--data.bath_size", "3"], "--data.batch_size"),
        (["--batch_size=3"], "--data.batch_size"),
        (["--trainer.max_epoch", "3"], "--trainer.max_epochs"),
        ([f"{STRATEGY}num_egdes", "3"], "num_edges"),
        (["--model.client_plans", "{client-0: {frnt: 1}}"], "front"),
        (["optimzer: {class_path: AdamW}"], "model.optimizer"),
        (["model: {optimzer: {class_path: AdamW}}"], "model.optimizer"),
        (["model: {optimizer: {class_path: AdamW, init_args: {weight_decey: 1}}}"], "weight_decay"),
        (["model: {lora: {rnk: 3}}"], "model.lora.rank"),
        (["trainer: {strategy: {class_path: HierarchicalStrategy, init_args: {num_egdes: 3}}}"], "num_edges"),
        (["trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitr: x}}]}"], "monitor"),
    ],
)
def test_misspelt_setting(given: list[str], meant: str, workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not given[0].startswith("--"):
        (workdir / "x.yaml").write_text(given[0])
        given = ["--config", "x.yaml"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *given])
    assert stop.value.code == 2
    assert the_error(capfd).endswith(f"did you mean {meant}?")


def test_interpolation_that_points_nowhere(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (workdir / "x.yaml").write_text("data: {train_file: '${nowhere}/train.csv'}")
    assert cli.main(["fit", "--config", "x.yaml"]) == 1
    the_error(capfd, "data.train_file", "${nowhere}", "'nowhere' not found")


def test_folder_that_cannot_be_made(fitted: Fitted, workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (workdir / "file").write_text("")
    given = ["fit", "--config", str(fitted.data / "tiny.yaml"), "--data_root", str(fitted.data)]
    assert cli.main([*given, "--output_dir", "file/runs", f"{STRATEGY}layout", "tiers"]) == 1
    the_error(capfd, "file/runs/tiny", "is no folder", "--output_dir")
    assert os.listdir(workdir) == ["file"]


@pytest.mark.parametrize(
    "given",
    [
        ["--trainer.strategy", "HierarchicalStrategy"],
        ["--trainer.strategy", "HierarchicalStrategy", "--trainer.strategy.num_edges", "1"],
        ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.1"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
    ],
)
def test_short_class_names(given: list[str], fitted: Fitted, workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They get as far as the last check before anything starts, of a checkpoint that is not there."""
    config = ["--config", str(fitted.data / "tiny.yaml"), "--data_root", str(fitted.data)]
    assert cli.main(["fit", *config, *given, "--model.lora.rank", "2", "--ckpt_path", "none.ckpt"]) == 1
    the_error(capfd, "none.ckpt")


def test_identity_is_in_every_checkpoint(fitted: Fitted) -> None:
    for path in (fitted.run.folder / "checkpoints").iterdir():
        identity = torch.load(path, weights_only=True)["elsa_identity"]
        assert identity["data.labels"] == ["account", "billing", "device", "network"]
        assert identity["model.plan"] == {"front": 1, "middle": 2, "tail": 1}
