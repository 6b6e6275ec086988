"""The folders at the top are linked into the package; each way of installing must see the same modules."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import elsa_pl

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("callbacks", "datamodules", "rpc")


def source_files() -> list[Path]:
    """Every Python file of the package, as seen through the links, relative to the root."""
    return sorted(
        Path(folder, name).relative_to(ROOT)
        for folder, _, names in os.walk(ROOT / "elsa_pl", followlinks=True)
        for name in names
        if name.endswith(".py")
    )


def run_python(code: str, folder: Path) -> str:
    """Run code in a process of its own, started in a folder; return what it printed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_resolve(name: str) -> None:
    link = ROOT / "elsa_pl" / name
    assert link.is_symlink(), f"{link} must be a link: a checkout without links cannot work"
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (ROOT / name / "__init__.py").is_file()


def test_every_package_on_disk_is_listed(pyproject: dict[str, Any]) -> None:
    # A folder of modules without an __init__.py would be left out of wheels without a word.
    on_disk = {".".join(path.parent.parts) for path in source_files()}
    settings = pyproject["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(on_disk)
    for package in on_disk:
        assert ROOT.joinpath(*package.split("."), "__init__.py").is_file(), package
    assert settings["package-dir"] == {"elsa_pl": "elsa_pl"} | {f"elsa_pl.{name}": name for name in LINKED}


def test_versions_agree(pyproject: dict[str, Any]) -> None:
    assert elsa_pl.__version__ == pyproject["project"]["version"]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, elsa_pl; print(*{'torch', 'lightning', 'transformers'} & set(sys.modules))"
    assert run_python(code, ROOT).split() == []


def test_no_bare_twins() -> None:
    # From the root the bare names can be imported, so a module that does so is found out here.
    code = f"""
import importlib, pkgutil, sys
import elsa_pl
for module in pkgutil.walk_packages(elsa_pl.__path__, "elsa_pl."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*(name for name in sys.modules if name.split(".")[0] in {LINKED!r}))
"""
    assert run_python(code, ROOT).split() == []


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    # Built from a copy, because a build writes into the folder that it builds.
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("elsa_pl", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    run_python(code, source)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {path.as_posix() for path in source_files()} <= names
    assert "elsa_pl/py.typed" in names
