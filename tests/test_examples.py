"""The examples run as their first lines say, in projects that have nothing else of elsa_pl."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

pytestmark = pytest.mark.slow


def test_local_training_on_two_ranks(tmp_path: Path) -> None:
    script = ROOT / "examples" / "local_training.py"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clusters: {'rank-0': 0, 'rank-1': 1}" in done.stdout
    apart = float(re.search(r"divergence of the two ranks: ([\d.]+)", done.stdout)[1])  # type: ignore[index]
    assert apart > 1, "the ranks trained on different digits, so they behave differently"
    trust = re.search(r"trust: {'rank-0': ([\d.]+), 'rank-1': ([\d.]+)}", done.stdout)
    assert trust is not None
    assert min(map(float, trust.groups())) > 0.9
    assert {"clients.png", "divergences.png", "trust.png"} == {
        path.name for path in (tmp_path / "runs" / "local_training").iterdir()
    }


def test_compressed_links(tmp_path: Path) -> None:
    script = ROOT / "examples" / "compressed_links.py"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(r"accuracy: plain ([\d.]+), compressed ([\d.]+)", done.stdout)
    assert accuracy is not None
    assert min(map(float, accuracy.groups())) > 0.8
    assert "numbers sent for each state: 96 plain, 48 compressed" in done.stdout


def test_examples_use_callbacks_only() -> None:
    for script in (ROOT / "examples").glob("*.py"):
        if "nothing else of elsa_pl" not in script.read_text():
            continue  # it extends a run
        used = set(re.findall(r"^(?:from|import) (elsa_pl[\w.]*)", script.read_text(), re.MULTILINE))
        assert used == {"elsa_pl.callbacks"}
        assert script.name in Path(__file__).read_text(), f"add a test of {script.name}"
