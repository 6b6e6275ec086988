"""Suites of runs: what they check, what they run again, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from elsa_pl import cli
from elsa_pl.errors import ConfigurationError
from elsa_pl.experiments import COLUMNS, Cell, load_suite, read_results, results
from elsa_pl.experiments.__main__ import alone_in, cells_of, main
from elsa_pl.experiments.cells import Outcome, error_of
from elsa_pl.experiments.results import write_results
from elsa_pl.experiments.suites import put
from tests.runs import ROOT

SUITES = ROOT / "configs" / "suites"
COMMAND = [sys.executable, "-m", "elsa_pl.experiments"]


FEDAVG = {"config": str(ROOT / "configs" / "methods" / "fedavg.yaml")}


def write_suite(folder: Path, **changes: Any) -> Path:
    """A suite of two methods on the smallest data set; its paths start at its own folder."""
    suite = {
        "title": "two",
        "data_sets": {"helpdesk": str(ROOT / "configs" / "experiments" / "smoke.yaml")},
        "methods": {
            "fedavg": FEDAVG,
            "sfl": {"config": str(ROOT / "configs" / "methods" / "sfl.yaml")},
        },
        "settings": {"trainer.strategy.local_steps": 2},
        "seeds": [0],
        **changes,
    }
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(suite))
    return path


def run(suite: Path, output: Path, *more: str) -> int:
    return main(["run", str(suite), "--output", str(output), *more])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_smoke(tmp_path: Path) -> None:
    """Every method, through the command as a user types it."""
    done = subprocess.run(
        [*COMMAND, "run", "configs/suites/smoke.yaml", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=390,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "smoke"
    methods = yaml.safe_load((SUITES / "smoke.yaml").read_text())["methods"]
    for path in (ROOT / "configs" / "methods").glob("*.yaml"):
        assert any(Path(method["config"]).name == path.name for method in methods.values()), path
    table = read_results(folder)
    assert set(table.method) == set(methods)
    assert set(table.status) == {"done"}
    assert table.groupby("method")["round"].max().eq(2).all()
    assert table.groupby("method").test_accuracy.count().eq(1).all()
    sent = table.groupby("method").bytes.max()
    assert sent["local"] == 0
    assert 0 < sent["fedavg"] < sent["hfl"]
    assert sent["splitlora"] < sent["sfl"]
    assert table.groupby("method").simulated_s.max().gt(0).all()
    assert table.groupby("method").peak_bytes.max().gt(1e8).all()
    assert all((folder / run / "summary.json").is_file() for run in table.run)
    assert (folder / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_has_ended_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a suite of another name; a cell that failed is tried again, and the others go on without it."""
    broken = {
        "config": str(ROOT / "configs" / "methods" / "fedavg.yaml"),
        "set": {"model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e30}}},
    }
    first = write_suite(
        tmp_path, methods={"broken": {**broken}, "sfl": {"config": str(ROOT / "configs/methods/sfl.yaml")}}
    )
    assert run(first, tmp_path / "out") == 1
    table = read_results(tmp_path / "out" / "two").set_index("method")
    assert table.loc["broken", "status"] == "failed"
    assert "diverged" in table.loc["broken", "error"] or "nan" in table.loc["broken", "error"]
    assert set(table.loc["sfl", "status"]) == {"done"}
    assert "failed" in (tmp_path / "out" / "two" / "report.html").read_text()
    capsys.readouterr()
    (runs,) = (tmp_path / "out" / "cells").glob("*sfl*/*/summary.json")
    before = runs.stat().st_mtime_ns
    second = tmp_path / "other.yaml"
    write_suite(tmp_path).rename(second)
    assert run(second, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "fedavg" in printed
    assert "sfl" not in printed
    assert runs.stat().st_mtime_ns == before
    assert set(read_results(tmp_path / "out" / "other").method) == {"fedavg", "sfl"}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, settings={"trainer.max_epochs": 1000})
    process = subprocess.Popen(
        [*COMMAND, "run", str(suite), "--output", str(tmp_path / "out")], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("cells/*/output.log")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # from who is impatient
    _, said = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "stopped; what has ended is kept" in said
    assert "Traceback" not in said
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "out")], capture_output=True, text=True, check=False).stdout
    assert not left


def write_run(cells: Path, cell: Cell) -> None:
    """What a run of two rounds leaves that has ended well."""
    folder = cells / cell.folder / "time"
    folder.mkdir(parents=True)
    rounds = [{"epoch": number, "step": number, "train_loss": 1.0, "val_accuracy": 0.5} for number in range(2)]
    pd.DataFrame([*rounds, {"epoch": 2, "step": 2, "test_accuracy": 0.75}]).to_csv(folder / "metrics.csv", index=False)
    (folder / "summary.json").write_text(json.dumps({"tested_round": 2, "peak_bytes": 1e9}))


def test_the_table_keeps_what_is_not_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is chosen is run; what has ended stays in the table, and the report says what there is not yet."""
    path = write_suite(tmp_path, seeds=[0, 1])
    cells = cells_of(load_suite(path), Path("data").resolve())
    for cell in cells[:3]:
        write_run(tmp_path / "out" / "cells", cell)
    assert run(path, tmp_path / "out", "--methods", "fedavg", "--seeds", "1") == 0
    assert "1 of them have ended well before" in capsys.readouterr().out
    table = read_results(tmp_path / "out" / "two")
    rows = table[table["round"] == 1][["method", "seed"]].to_numpy().tolist()
    assert rows == [["fedavg", 0], ["fedavg", 1], ["sfl", 0]]
    assert json.loads((tmp_path / "out" / "two" / "suite.json").read_text())["num_runs"] == 4
    assert os.listdir(tmp_path / "out" / "two" / "pictures")


def test_one_call_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second one with the same --output would leave what the first one runs out of its table."""
    path, out = write_suite(tmp_path), tmp_path / "out"
    for cell in cells_of(load_suite(path), Path("data").resolve()):
        write_run(out / "cells", cell)
    with alone_in(out):
        assert run(path, out) == 1
    assert f"another call runs suites into {out}" in capsys.readouterr().err
    assert not (out / "two" / "results.csv").exists()
    assert run(path, out) == 0


def test_no_table_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs that the suite no longer has, as it or elsa_pl changed, stay in a table of their own."""
    out = tmp_path / "out"
    for alpha in (0.1, 0.2):
        path = write_suite(tmp_path, methods={"fedavg": FEDAVG}, settings={"data.alpha": alpha})
        for cell in cells_of(load_suite(path), Path("data").resolve()):
            write_run(out / "cells", cell)
        assert run(path, out) == 0
    (old,) = out.glob("two/results-*.csv")
    said = capsys.readouterr().out
    assert f"kept as {old}" in said
    assert said.count("kept as") == 1
    assert not set(pd.read_csv(old).run) & set(read_results(out / "two").run)
    assert len(list(out.glob("two/suite-*.json"))) == 1
    (out / "two" / "suite.json").unlink()
    assert run(path, out) == 0, "the table is made again from the runs"


def test_failures_stay_in_the_table(tmp_path: Path) -> None:
    """Until their runs have ended well: with their errors, whatever is chosen to run now."""
    path, out = write_suite(tmp_path), tmp_path / "out"
    good, bad = cells_of(load_suite(path), Path("data").resolve())
    write_run(out / "cells", good)
    (out / "two").mkdir(parents=True)
    write_results(out / "two", {}, [Outcome(bad, error="error: too large")])
    assert run(path, out, "--methods", "fedavg") == 0, "sfl was not chosen"
    table = read_results(out / "two").drop_duplicates("method")
    assert table[["method", "status", "error"]].to_numpy().tolist() == [
        ["fedavg", "done", ""],
        ["sfl", "failed", "error: too large"],
    ]
    log = f"../cells/{bad.folder}/output.log"
    page = (out / "two" / "report.html").read_text()
    assert "too large" in page
    assert log not in page, "it is not there"
    (out / "cells" / bad.folder).mkdir()
    (out / "two" / log).touch()
    assert main(["report", str(out / "two")]) == 0
    assert log in (out / "two" / "report.html").read_text()
    write_run(out / "cells", bad)
    assert run(path, out) == 0
    assert set(read_results(out / "two").status) == {"done"}


@pytest.mark.parametrize("metrics", ["", "epoch,step,val_accuracy\n0,0,1\n", None])
def test_a_run_without_figures_has_failed(
    metrics: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the others count."""
    path, out = write_suite(tmp_path), tmp_path / "out"
    for cell in cells_of(load_suite(path), Path("data").resolve()):
        write_run(out / "cells", cell)
    assert run(path, out) == 0
    (broken,) = out.glob("cells/*sfl*/time/metrics.csv")
    results._figures.cache_clear()  # as in a process of its own
    broken.unlink() if metrics is None else broken.write_text(metrics)
    assert run(path, out) == 1
    assert "1 of 2 runs ended well" in capsys.readouterr().out
    table = read_results(out / "two").drop_duplicates("method").set_index("method")
    assert dict(table.status) == {"fedavg": "done", "sfl": "failed"}
    assert str(broken.parent) in table.error["sfl"]
    assert "CSVLogger" in table.error["sfl"]
    (old,) = out.glob("two/results-*.csv")
    assert set(pd.read_csv(old).status) == {"done"}, "its figures are kept"


def test_settings_are_checked_for_any_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also without the suite's first one: of that there would be no cell to check."""
    path = write_suite(tmp_path, seeds=[0, 1], settings={"model.lora.rnk": 4})
    assert run(path, tmp_path / "out", "--seeds", "1") == 1
    assert "rnk" in capsys.readouterr().err


def test_ctrl_c_while_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.py's parser says 130 then, which is no setting that it refuses."""
    monkeypatch.setattr(cli, "main", lambda *arguments: 130)
    assert run(write_suite(tmp_path), tmp_path / "out") == 130


@pytest.mark.parametrize(
    ("log", "code", "error", "short"),
    [
        ("round 1\nerror: a:\n  b\n", 1, "error: a:\n  b", "error: a:"),
        ("Traceback\n\nKeyError: 1\n", 1, "exit code 1\nTraceback\nKeyError: 1", "exit code 1: KeyError: 1"),
        ("round 1\n", -9, "ended by SIGKILL\nround 1", "ended by SIGKILL: round 1"),
        ("", 3, "exit code 3", "exit code 3"),
    ],
)
def test_error_of_a_cell(log: str, code: int, error: str, short: str) -> None:
    assert error_of(log, code) == error
    assert Outcome(Cell("x", {}, {}), error=error).short_error == short


def test_names_stay_names(tmp_path: Path) -> None:
    """In a table, where pandas would read numbers, and nothing at all."""
    outcomes = [
        Outcome(Cell("x", {}, {"case": "0.10", "data_set": "20", "method": name, "seed": 0}), error="x")
        for name in ("NA", "None")
    ]
    write_results(tmp_path, {}, outcomes)
    table = read_results(tmp_path)
    assert list(table.method) == ["NA", "None"]
    assert set(table.case) == {"0.10"}
    assert set(table.data_set) == {"20"}


def test_settings_of_a_cell(tmp_path: Path) -> None:
    """The case counts over the suite, and the method's own settings over both."""
    path = write_suite(
        tmp_path,
        methods={
            "elsa": {
                "config": str(ROOT / "configs/methods/elsa.yaml"),
                "without": ["LinkQuantization"],
                "add": [{"class_path": "TrustScoring", "init_args": {"min_trust": 0.2}}],
                "set": {"data.alpha": 0.3, "trainer.callbacks.TrustScoring.min_trust": 0.4},
            }
        },
        cases={
            "few": {"data.alpha": 0.2, "data.batch_size": 2, "trainer.callbacks.LinkProjection.ratio": 8},
            "less": {"trainer.callbacks.TrustScoring.smoothing": 0.25},
        },
        settings={"data.batch_size": 16, "trainer.strategy.local_steps": 2},
    )
    suite = load_suite(path)
    config = suite.configuration("few", "helpdesk", "elsa")
    assert config["data"]["alpha"] == 0.3
    assert config["data"]["batch_size"] == 2
    assert config["trainer"]["strategy"]["init_args"]["local_steps"] == 2
    assert config["trainer"]["strategy"]["init_args"]["edge_rounds"] == 10
    names = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert names == ["TrustScoring", "BehaviorClustering", "LatencyAwareAssignment", "LinkProjection"]
    assert config["trainer"]["callbacks"][0]["init_args"] == {"min_trust": 0.4}
    assert config["trainer"]["callbacks"][3]["init_args"] == {"ratio": 8}
    added = suite.configuration("less", "helpdesk", "elsa")["trainer"]["callbacks"][0]
    assert added["init_args"] == {"min_trust": 0.4, "smoothing": 0.25}, "nothing of the cell before"


def test_what_is_skipped(tmp_path: Path) -> None:
    """Of each kind one name or several; all kinds of a rule must be met."""
    cases: dict[str, Any] = {"a": {}, "b": {}, "c": {}}
    path = write_suite(tmp_path, cases=cases, skip=[{"method": "sfl", "case": ["a", "b"]}, {"case": "c"}])
    assert load_suite(path).combinations() == [("a", "helpdesk", "fedavg"), ("b", "helpdesk", "fedavg")]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("trainer: {callbacks: SSOP}", r"trainer\.callbacks of methods\.x: .*got 'SSOP'"),
        ("trainer: x", "expected settings in trainer; got 'x'"),
    ],
)
def test_callbacks_that_are_none(content: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    (tmp_path / "method.yaml").write_text("model: {}")
    methods = {"x": {"config": "method.yaml", "without": ["SSOP"]}}
    suite = load_suite(write_suite(tmp_path, data_sets={"x": "bad.yaml"}, methods=methods, settings={}))
    with pytest.raises(ConfigurationError, match=error):
        suite.configuration("all", "x", "x")


def test_a_case_says_nothing_of_the_next(tmp_path: Path) -> None:
    cases = {"deep": {"model.plan.front": 2}, "as-is": {}}
    suite = load_suite(write_suite(tmp_path, settings={"model.plan": {"front": 1}}, cases=cases))
    fronts = [suite.configuration(case, "helpdesk", "sfl")["model"]["plan"]["front"] for case in cases]
    assert fronts == [2, 1]


def test_cells_are_known_by_their_settings() -> None:
    cells = [Cell(name, config, {}) for name, config in (("a", {"x": 1}), ("b", {"x": 1}), ("a", {"x": 2}))]
    assert cells[0].digest == cells[1].digest != cells[2].digest


def test_sizes(tmp_path: Path) -> None:
    path = write_suite(tmp_path, sizes={"full": {"seeds": [3, 4], "settings": {"trainer.max_epochs": 50}}})
    small, full = load_suite(path), load_suite(path, "full")
    assert (list(small.seeds), list(full.seeds)) == ([0], [3, 4])
    assert full.settings == {"trainer.strategy.local_steps": 2, "trainer.max_epochs": 50}
    assert full.name != small.name, "they share no table"


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_of_the_project_parse(path: Path, tmp_path: Path) -> None:
    for size in ["cpu", *yaml.safe_load(path.read_text()).get("sizes", {})]:
        suite = load_suite(path, size)
        assert suite.combinations()
        for combination in suite.combinations():
            assert suite.configuration(*combination)
    assert f"python -m elsa_pl.experiments run configs/suites/{path.name}" in path.read_text()


ELSA = str(ROOT / "configs/methods/elsa.yaml")

BAD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("key", {"metods": {}}, ["unknown key 'metods'", "methods"]),
    ("method-file", {"methods": {"x": {"config": "none.yaml"}}}, ["methods.x.config", "none.yaml", "suite's folder"]),
    ("method-key", {"methods": {"x": {"confg": "a"}}}, ["methods.x", "unknown key 'confg'"]),
    ("no-seeds", {"seeds": []}, ["needs seeds"]),
    ("data-set", {"data_sets": {"x": "none.yaml"}}, ["data_sets.x", "none.yaml"]),
    ("target", {"target_accuracy": {"trek": 0.5}}, ["unknown data_set 'trek'", "helpdesk"]),
    ("skip", {"skip": [{"method": "sfll"}]}, ["unknown method 'sfll'", "fedavg, sfl"]),
    ("skip-two", {"skip": [{"method": ["sfl", "sfll"]}]}, ["unknown method 'sfll'", "fedavg, sfl"]),
    ("skip-number", {"skip": [{"case": 3}]}, ["skip of", "case must be a list; got 3"]),
    (
        "without",
        {"methods": {"x": {"config": str(ROOT / "configs/methods/elsa.yaml"), "without": ["Trust"]}}},
        ["methods.x.without", "'Trust'", "LinkProjection"],
    ),
    (
        "add",
        {"methods": {"x": {"config": str(ROOT / "configs/methods/elsa.yaml"), "add": ["TrustScoring"]}}},
        ["methods.x.add", "{class_path: TrustScoring}", "'TrustScoring'"],
    ),
    ("setting", {"settings": {"model.lora.rnk": 4}}, ["rnk"]),
    (
        "data",
        {"settings": {"data.dataset": None, "data.train_file": "${data_root}/none.csv"}},
        ["needs data.train_file", "none.csv", "--data_root"],
    ),
    ("value", {"settings": {"data.batch_size": "many"}}, ["batch_size", "many"]),
    ("class", {"settings": {"trainer.strategy.aggregator": "maen"}}, ["aggregator must be one of", "'maen'"]),
    (
        "together",
        {"methods": {"x": {"config": ELSA, "set": {"trainer.strategy.aggregator": "stacked"}}}},
        ["helpdesk-x-all-0", "strategy.adapter_bits=32 with aggregator=stacked"],
    ),
    ("model", {"settings": {"model.plan.front": 7}}, ["helpdesk-fedavg-all-0", "front=7"]),
    ("trainer", {"cases": {"x": {"trainer.max_steps": 5}}}, ["helpdesk-fedavg-x-0", "max_steps", "set max_epochs"]),
    (
        "callback",
        {"methods": {"x": {"config": ELSA, "set": {"trainer.callbacks.SSOP.rank": 3}}}},
        ["trainer.callbacks.SSOP.rank", "'BehaviorClustering', 'LatencyAwareAssignment'"],
    ),
    ("no-list", {"seeds": 3}, ["seeds must be a list", "got 3"]),
    ("seed", {"seeds": [0, "a"]}, ["seeds must be whole numbers", "'a'"]),
    ("seed-twice", {"seeds": [0, 0]}, ["seeds must be whole numbers that differ"]),
    ("no-mapping", {"data_sets": ["a.yaml"]}, ["data_sets must be names with values", "a.yaml"]),
    ("case", {"cases": {"x": "y"}}, ["cases.x", "'y'"]),
    ("target-number", {"target_accuracy": 0.8}, ["target_accuracy must be names with values"]),
    ("target-percent", {"target_accuracy": {"helpdesk": 80}}, ["target_accuracy.helpdesk", "0 to 1", "80"]),
    ("budget", {"budgets_mb": [0]}, ["budgets_mb must be numbers above 0", "got 0"]),
    ("skip-one", {"skip": {"method": "sfl"}}, ["skip must be a list"]),
    ("skip-all", {"skip": [{}]}, ["rule of skip is empty"]),
    ("without-one", {"methods": {"x": {"config": "a", "without": "SSOP"}}}, ["methods.x", "without must be a list"]),
    ("name", {"cases": {"a/b": {}}}, ["name of letters", "'a/b'"]),
    ("name-number", {"cases": {0.1: {}}}, ["name of letters", "0.1"]),
    ("without-text", {"methods": {"x": {"config": ELSA, "without": [{"a": 1}]}}}, ["without", "{'a': 1}"]),
    ("setting-number", {"settings": {3: 4}}, ["settings", "expected names such as data.alpha; got 3"]),
    ("setting-date", {"settings": {"name_": date(2026, 1, 2)}}, ["name_", "a date needs quotes"]),
    (
        "add-date",
        {"methods": {"x": {"config": ELSA, "add": [{"class_path": "SSOP", "init_args": {"rank": date(2026, 1, 2)}}]}}},
        ["methods.x.add", "a date needs quotes"],
    ),
    ("setting-seed", {"cases": {"x": {"seed_everything": 3}}}, ["cases.x", "the suite's seeds"]),
    (
        "callbacks",
        {"methods": {"x": FEDAVG}, "settings": {"trainer.callbacks": "SSOP", "trainer.callbacks.SSOP.rank": 3}},
        ["trainer.callbacks: expected a list of callbacks", "got 'SSOP'"],
    ),
]

ELSE: list[tuple[str, bytes, list[str]]] = [
    ("no-text", b"\xff\xfe", ["is no YAML"]),
    ("interpolation", b"data: {alpha: '${nope'}", ["make no configuration", "${nope"]),
    ("list", b"trainer: [1]", ["make no configuration"]),
    ("no-data", b"data: [1]", ["expected settings in data; got [1]"]),
]


@pytest.mark.parametrize(("changes", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_suites(
    changes: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing has run when they are refused."""
    assert run(write_suite(tmp_path, **changes), tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert "Traceback" not in printed
    for word in words:
        assert word in printed
    assert not list((tmp_path / "out").glob("cells/*"))


def test_a_callback_with_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = "    def check_links(self, links: list[str]) -> None:\n        raise RuntimeError('mine')\n"
    (tmp_path / "mine.py").write_text(f"from lightning import Callback\n\n\nclass Mine(Callback):\n{hook}")
    monkeypatch.syspath_prepend(str(tmp_path))
    suite = write_suite(tmp_path, methods={"x": {**FEDAVG, "add": [{"class_path": "mine.Mine"}]}})
    assert run(suite, tmp_path / "out") == 1
    assert "error: helpdesk-x-all-0: RuntimeError: mine" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in ELSE], ids=[case[0] for case in ELSE])
def test_bad_files_of_data_sets(
    content: bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert run(write_suite(tmp_path, data_sets={"x": "bad.yaml"}), tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    for word in words:
        assert word in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "elza"], ["--methods", "'elza'", "fedavg, sfl"]),
        (["--data_sets", "trec"], ["'trec'", "helpdesk"]),
        (["--seeds", "0", "7"], ["--seeds", "unknown seed 7", "there are 0"]),
        (["--size", "huge"], ["'cpu'", "'huge'"]),
        (["--output", __file__], ["cannot make", "give another --output"]),
    ],
)
def test_bad_choices(more: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write_suite(tmp_path), tmp_path / "out", *more) == 1
    printed = capsys.readouterr().err
    for word in words:
        assert word in printed


def test_results_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "two"
    folder.mkdir(parents=True)
    (folder / "suite.json").write_text(json.dumps({"format": 0}))
    assert run(write_suite(tmp_path), tmp_path / "out") == 1
    assert "format 0" in (printed := capsys.readouterr().err)
    assert "--output" in printed
    assert main(["report", str(folder)]) == 1
    assert os.listdir(folder) == ["suite.json"]
    (folder / "suite.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ConfigurationError, match="run the suite first"):
        read_results(folder)
    pd.DataFrame(columns=list(COLUMNS[:-1])).to_csv(folder / "results.csv", index=False)
    with pytest.raises(ConfigurationError, match="lacks the columns peak_bytes"):
        read_results(folder)


def test_settings_by_their_names() -> None:
    places = {"class_path": "elsa_pl.callbacks.LatencyAwareAssignment", "init_args": {"behaviour_weight": 1.0}}
    callbacks: list[dict[str, Any]] = [{"class_path": "SSOP"}, places]
    config: dict[str, Any] = {"data": {"alpha": 1}}
    put(config, "data.alpha", 2)
    put(config, "trainer.strategy.num_edges", 3)
    put(config, "trainer.strategy.init_args.layout", "single")
    assert config == {
        "data": {"alpha": 2},
        "trainer": {"strategy": {"init_args": {"num_edges": 3, "layout": "single"}}},
    }
    for name in ("data.alpha.x", "trainer.callbacks.SSOP", "trainer.callbacks.SSOP.rank.x"):
        config["trainer"]["callbacks"] = [{"class_path": "SSOP", "init_args": {"rank": 2}}]
        with pytest.raises(ConfigurationError, match=rf"cannot set {name}\b.*: correct the name"):
            put(config, name, 1)
    config["trainer"]["callbacks"] = callbacks
    put(config, "trainer.callbacks.LatencyAwareAssignment.latency_weight", 0.0)
    put(config, "trainer.callbacks.SSOP.rank", 4)
    assert callbacks == [
        {"class_path": "SSOP", "init_args": {"rank": 4}},
        {**places, "init_args": {"behaviour_weight": 1.0, "latency_weight": 0.0}},
    ]
