"""Reports: one file each, which a browser opens offline, on a phone as well, without a complaint."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from elsa_pl.callbacks import drawing
from elsa_pl.errors import ConfigurationError
from elsa_pl.experiments.__main__ import main
from elsa_pl.experiments.report import write_suite_report
from elsa_pl.experiments.results import COLUMNS
from elsa_pl.report.curves import draw_lines, of_one
from elsa_pl.report.page import Page, Section, Table, number, text
from elsa_pl.report.runs import write_run_report
from tests.runs import ROOT, run_here, write_data

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
TINY = "<script>window.broken = true</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium, which logs what is written to the console and every request."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here (Debian packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a report shows."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = ["BehaviorClustering", "TrustScoring", "LatencyAwareAssignment", "CommunicationMonitor"]
    audit = {"class_path": "PrivacyAudit", "init_args": {"num_texts": 12, "num_known": 2}}
    settings = {
        **write_data(folder),
        "data.num_probes": 40,
        "data.faulty_fraction": 0.25,
        "data.fault": "flipped_labels",
        "strategy.num_edges": 2,
        "profile.distribution": "mixed",
        "trainer.callbacks": [*({"class_path": name} for name in callbacks), audit],
    }
    return run_here(folder, "run", settings, pictures=True).folder


def rows_of(case: str, method: str, seed: int, height: float) -> list[dict[str, Any]]:
    """What a cell of five rounds leaves in a suite's table."""
    place = {"case": case, "data_set": "trec", "method": method, "seed": seed, "status": "done", "run": "../cells/x"}
    rows: list[dict[str, Any]] = [
        {
            **place,
            "round": number,
            "train_loss": 2 / number,
            "val_accuracy": height - 0.3 / number + 0.01 * seed,
            "bytes": 1e6 * number,
            "seconds": 3.0 * number,
            "simulated_s": 11.0 * number,
        }
        for number in range(1, 6)
    ]
    rows[3]["test_accuracy"] = height + 0.01 * seed
    rows[4]["peak_bytes"] = 1e9
    return rows


def write_table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(folder / "results.csv", index=False)
    methods = dict.fromkeys(["fedavg", "elsa", "<b>bold</b>"], "what it is & does")
    suite = {
        "format": 1,
        "name": "suite",
        "title": f"A suite {TINY}",
        "size": "cpu",
        "versions": {"elsa_pl": "0"},
        "methods": methods,
        "cases": {"faulty-0": "", "faulty-25": "data.faulty_fraction 0.25"},
        "target_accuracy": {"trec": 0.7},
        "budgets_mb": [0.5, 2],
        "configuration": {"methods": {"elsa": {"config": "elsa.yaml", "set": {"data.alpha": 0.25}}}},
    }
    (folder / "suite.json").write_text(json.dumps(suite))
    return folder


@pytest.fixture(scope="module")
def suite_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for case, loss in (("faulty-0", 0.0), ("faulty-25", 0.2)):
        for seed in (0, 1, 2):
            rows += rows_of(case, "fedavg", seed, 0.75 - loss)
            rows += rows_of(case, "elsa", seed, 0.85 - loss / 4)
    failed = {"case": "faulty-25", "data_set": "trec", "method": "<b>bold</b>", "seed": 0, "status": "failed"}
    rows.append({**failed, "error": f"error: {TINY} lower the learning rate"})
    return write_table(tmp_path_factory.mktemp("suite"), rows)


def logs(browser: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    """What was logged since the last time."""
    found: list[dict[str, Any]] = browser.get_log(kind)  # type: ignore[no-untyped-call]  # selenium does not say
    return found


def open_page(browser: webdriver.Chrome, page: Path, size: str) -> None:
    """Open a page, and check what must hold of every one."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    logs(browser, "browser")
    logs(browser, "performance")
    browser.get(page.as_uri())
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "it overflows"
    pictures = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert pictures
    assert all(pictures), "a picture is broken"
    assert browser.execute_script("return window.broken") is None, "text was run as a script"
    for button in browser.find_elements(By.CSS_SELECTOR, "th button")[:3]:
        button.click()
    assert not logs(browser, "browser")
    events = [json.loads(entry["message"])["message"] for entry in logs(browser, "performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked, "requests are seen"
    assert all(url.startswith(("data:", page.as_uri())) for url in asked)


def column(browser: webdriver.Chrome, index: int, table: int = 0) -> list[str]:
    rows = "document.querySelectorAll('table')[arguments[0]].tBodies[0].rows"
    script = f"return [...{rows}].map(row => row.cells[arguments[1]].innerText)"
    found: list[str] = browser.execute_script(script, table, index)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_run_in_a_browser(browser: webdriver.Chrome, run_dir: Path, size: str) -> None:
    open_page(browser, run_dir / "report.html", size)
    titles = [head.text for head in browser.find_elements(By.TAG_NAME, "h2")]
    assert titles == ["Training", "Clients", "Trust", "Traffic", "Privacy", "Settings and versions"]


@pytest.mark.parametrize("size", SIZES)
def test_suite_in_a_browser(browser: webdriver.Chrome, suite_dir: Path, size: str) -> None:
    open_page(browser, write_suite_report(suite_dir), size)
    assert browser.find_element(By.TAG_NAME, "h1").text == f"A suite {TINY}"
    error = browser.find_element(By.CSS_SELECTOR, ".error").text
    assert "faulty-25, trec, <b>bold</b>, seed 0" in error
    assert "lower the learning rate" in error


def test_tables_sort_both_ways(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Numbers as numbers, nothing last, and texts with numbers by these."""
    rows = [[text(f"client-{index}"), number(value)] for index, value in enumerate([10, 9, None, -2, 1000, 9.5], 8)]
    figure = Section("table", tables=[Table(["client", "value"], rows)])
    page = Page("sorting", "", sections=[figure]).write(tmp_path / "page.html")
    browser.get(page.as_uri())
    names, values = browser.find_elements(By.CSS_SELECTOR, "th button")
    values.click()
    assert column(browser, 1) == ["-2.0", "9.0", "9.5", "10.0", "1,000.0", ""]
    assert values.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    values.click()
    assert column(browser, 1) == ["1,000.0", "10.0", "9.5", "9.0", "-2.0", ""]
    names.send_keys("\n")  # by keyboard
    assert column(browser, 0) == [f"client-{index}" for index in range(8, 14)]
    assert values.find_element(By.XPATH, "..").get_attribute("aria-sort") is None


def test_what_a_run_leaves(run_dir: Path) -> None:
    page = (run_dir / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", ""), "nothing is loaded from elsewhere"
    clients = pd.read_csv(run_dir / "clients.csv")
    assert list(clients.client) == [f"client-{index}" for index in range(4)]
    assert clients.fault.notna().sum() == 1
    assert clients.trust.between(0, 1).all()
    assert (clients.plan == "1|2|1").all()
    assert ">nan<" not in page, "three clients have no fault"
    assert "4 clients, dirichlet; 2 edges; BehaviorClustering, TrustScoring" in page, "what was run"
    logged = pd.read_csv(run_dir / "metrics.csv").sum(numeric_only=True)
    links = logged["bytes/uplink/forward"] + logged["bytes/downlink/backward"]
    # the edges' own adapters to the cloud are no client's
    assert links < clients.up_bytes.sum() < links + logged["bytes/adapters/up"]
    audit = pd.read_csv(run_dir / "privacy.csv")
    best = audit[(audit["round"] == audit["round"].max()) & (audit.reader != "labels")].share.max()
    assert f"<dt>of tokens read by the best attacker</dt><dd>{100 * best:.1f}%</dd>" in page
    for name in ("accuracy-rounds", "accuracy-bytes", "accuracy-simulated", "loss", "traffic"):
        for ending in ("png", "svg"):
            assert (run_dir / "pictures" / f"{name}.{ending}").stat().st_size > 1000


def test_figures_of_a_suite(suite_dir: Path) -> None:
    """By hand: heights of 0.85 and 0.75 at seeds 0 to 2, and a difference that is the same for all seeds."""
    page = write_suite_report(suite_dir).read_text()
    best = re.findall(r"<dt>best test accuracy in (.*?)</dt><dd>(.*?)</dd>", page)
    assert best == [("faulty-0, trec: elsa", "86.0%"), ("faulty-25, trec: elsa", "81.0%")]
    assert "data.alpha: 0.25" in page
    assert "86.0, 87.0" in page
    assert "+10.0 [+10.0, +10.0]" in page
    # 0.85 - 0.3 / r + 0.01 s >= 0.7 from round 2 on; 0.75 - ... never at seed 0 and 1 before round 6
    assert "3 of 3" in page
    # 2 MB pay for two rounds: 0.85 - 0.3 / 2 + 0.01 s; half of one for none
    assert "validation accuracy with 0.5 MB" in page
    assert ">71.0<" in page
    assert "By faulty" in page
    assert "<h2>Runs</h2>" in page
    assert "<a href" not in page, "these runs are not there"


def test_what_a_summary_holds_is_documented(run_dir: Path) -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    for key in [*summary, *summary["bytes"], *summary["seconds"]]:
        assert f"`{key}`" in text, key


def test_pictures_of_a_suite(suite_dir: Path, tmp_path: Path) -> None:
    """One file each, whatever dots there are in names; what does not change with a case's number is not drawn."""
    shutil.copytree(suite_dir, tmp_path / "suite", ignore=shutil.ignore_patterns("pictures"))
    table = pd.read_csv(tmp_path / "suite" / "results.csv")
    table["case"] = table.case.str.replace("-25", "-0.5")
    table.loc[table.case == "faulty-0.5", "seconds"] *= 2
    table.to_csv(tmp_path / "suite" / "results.csv", index=False)
    description = json.loads((tmp_path / "suite" / "suite.json").read_text())
    description |= {"cases": {"faulty-0": "", "faulty-0.5": ""}, "num_runs": 20}
    (tmp_path / "suite" / "suite.json").write_text(json.dumps(description))
    page = write_suite_report(tmp_path / "suite").read_text()
    expected = {f"{case}-trec-{kind}" for case in description["cases"] for kind in ("rounds", "bytes", "simulated")}
    expected |= {f"faulty-trec-{kind}" for kind in ("test_accuracy", "seconds")}
    names = [f"{name}.{ending}" for name in expected for ending in ("png", "svg")]
    assert sorted(os.listdir(tmp_path / "suite" / "pictures")) == sorted(names)
    assert page.count("<img ") == len(expected)
    assert "<dt>runs are still to come: means may be over different seeds</dt><dd>7</dd>" in page


def test_a_method_has_one_colour(tmp_path: Path) -> None:
    """Also where one before it has no line, as one that sends nothing has none against bytes."""
    lines = {name: of_one([1, 2], [3, 4]) for name in ("fedavg", "local", "elsa")}
    colours = []
    for shown in (["fedavg", "local", "elsa"], ["elsa"]):
        figure = draw_lines({name: lines[name] for name in shown}, x="x", y="y", title="", order=list(lines))
        colours.append(figure.axes[0].lines[-1].get_color())
    assert colours[0] == colours[1]
    rows = [
        *rows_of("faulty-0", "fedavg", 0, 0.7),
        *({**row, "bytes": 0} for row in rows_of("faulty-0", "elsa", 0, 0.6)),
    ]
    write_suite_report(write_table(tmp_path, rows))
    bytes_sent, rounds = (
        (tmp_path / "pictures" / f"faulty-0-trec-{kind}.svg").read_text() for kind in ("bytes", "rounds")
    )
    assert drawing.PALETTE[1].lower() in rounds
    assert drawing.PALETTE[1].lower() not in bytes_sent


def test_a_metric_that_is_missing_is_left_out(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "name" / "time"
    folder.mkdir(parents=True)
    shutil.copy(run_dir / "summary.json", folder)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["peak_bytes"]  # as in runs of earlier versions
    (folder / "summary.json").write_text(json.dumps(summary))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "<h2>Traffic</h2>" in page
    assert "<h2>Training</h2>" not in page


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no summary\.json"):
        write_run_report(tmp_path)


def test_a_suite_leads_to_the_pages_of_its_runs(run_dir: Path, tmp_path: Path) -> None:
    folder = write_table(tmp_path / "suite", rows_of("faulty-0", "fedavg", 0, 0.7))
    (tmp_path / "cells" / "x").mkdir(parents=True)
    shutil.copy(run_dir / "report.html", tmp_path / "cells" / "x")
    assert '<a href="../cells/x/report.html">report</a>' in write_suite_report(folder).read_text()


def test_a_suite_in_which_all_failed(tmp_path: Path) -> None:
    failed = {"case": "faulty-0", "data_set": "trec", "method": "elsa", "seed": 0, "status": "failed", "error": "x"}
    page = write_suite_report(write_table(tmp_path, [failed])).read_text()
    assert "Failed runs" in page


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("suite.json", None, "no suite.json: run the suite first"),
        ("suite.json", '{"format": 1, "title": 3}', "expected title to be of type str; got 3"),
        ("results.csv", None, "expected a suite's table"),
        ("suite.json", ("elsa", "other"), "has the method 'elsa', and suite.json has not"),
        ("results.csv", ("1000000.0", "many"), "is no suite's table: .*many.*: move it away"),
    ],
)
def test_a_folder_that_is_no_suite(
    suite_dir: Path, tmp_path: Path, name: str, content: str | tuple[str, str] | None, error: str
) -> None:
    shutil.copytree(suite_dir, tmp_path / "suite")
    path = tmp_path / "suite" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content if isinstance(content, str) else path.read_text().replace(*content))
    with pytest.raises(ConfigurationError, match=error):
        write_suite_report(tmp_path / "suite")


@pytest.mark.parametrize(("summary", "error"), [("{", "is no summary of a run"), ("{}", "lacks rounds, seed, seconds")])
def test_a_summary_that_is_none(tmp_path: Path, summary: str, error: str) -> None:
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ConfigurationError, match=error):
        write_run_report(tmp_path)


def test_a_table_of_another_format(suite_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(suite_dir, tmp_path / "suite")
    (tmp_path / "suite" / "suite.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ConfigurationError, match="format 2, and this version of elsa_pl writes format 1"):
        write_suite_report(tmp_path / "suite")
