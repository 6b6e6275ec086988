"""The documentation says what is there: every callback and every module of functions, in files that parse."""

import importlib
import importlib.util
import pkgutil
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from elsa_pl import callbacks, cli, functional
from elsa_pl.strategies import launcher
from tests.runs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
SHELL = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*(?:\w+=\S+ |torchrun .*? )*(?:python )?train\.py (fit .*)$", re.MULTILINE)
MODULE = re.compile(r"python -m ((?:benchmarks|elsa_pl)[\w.]*)")
OWN = re.compile(r"\b(?:configs|examples|benchmarks)/[\w/.]*\w\.(?:yaml|py)\b")


def blocks(language: str) -> list[Any]:
    """The blocks of code in a language, with the page and the line that each begins in as its name."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in BLOCK.finditer(text):
            if block[1] == language:
                name = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, block.start()) + 2}"
                found.append(pytest.param(block[2], id=name))
    return found


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(BLOCK, "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_callback_has_a_section(name: str) -> None:
    text = (ROOT / "docs" / "callbacks.md").read_text()
    (section,) = re.findall(rf"^### {name}$(.*?)(?=^##)", text + "\n##", re.MULTILINE | re.DOTALL)
    assert f"::: elsa_pl.callbacks.{name}\n" in section, "its docstring and settings"
    assert f"[`{name}`](#{name.lower()})" in text, "the table at the top"
    (example,) = [yaml.safe_load(block[2]) for block in BLOCK.finditer(section) if block[1] == "yaml"]
    shown = [callback["class_path"] for callback in example.get("trainer", {}).get("callbacks", [])]
    assert name in shown or "progress" in example


def test_every_module_of_functions_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    modules = {module.name for module in pkgutil.iter_modules(functional.__path__, "elsa_pl.functional.")}
    assert set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)) == modules


def test_every_method_and_suite_is_listed() -> None:
    text = (ROOT / "docs" / "runs.md").read_text()
    for path in (ROOT / "configs" / "methods").glob("*.yaml"):
        assert f"`{path.name}`" in text, path
    for path in (ROOT / "configs" / "suites").glob("*.yaml"):
        assert f"| `{path.stem}` |" in text, path


def test_every_page_is_in_the_navigation() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs')}\n" in settings, page


@pytest.fixture(scope="module")
def parser() -> Any:
    """That of the command line, which takes a second to make."""
    found = []

    def keep(self: cli.ElsaCLI, parser: Any, args: Any) -> None:
        found.append(parser)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Lightning, when the own process has a command line too, as pytest has
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        patch.setattr(launcher, "arguments", None)  # main leaves those of the run
        patch.setattr(cli.ElsaCLI, "parse_arguments", keep)
        with pytest.raises(SystemExit):
            cli.main(["fit"])
    return found[0]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_examples_of_settings_are_accepted(
    text: str, parser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    (tmp_path / "run.yaml").write_text(text)
    try:
        parser.parse_args(["fit", "--config", str(tmp_path / "run.yaml")])
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    for given in yaml.safe_load(text).get("trainer", {}).get("callbacks", []):
        module, _, name = given["class_path"].rpartition(".")
        getattr(importlib.import_module(module or "elsa_pl.callbacks"), name)(**given.get("init_args", {}))


def commands() -> list[Any]:
    """What ``train.py`` is told on the pages, but for earlier runs."""
    found = []
    for page in PAGES:
        for block in SHELL.finditer(page.read_text()):
            lines = re.sub(r"\s*\\\n\s*", " ", block[1])
            found += [pytest.param(told, id=f"{page.name}:{told}") for told in COMMAND.findall(lines)]
    return [parameter for parameter in found if "<" not in str(parameter.values[0])]


@pytest.mark.parametrize("told", commands())
def test_commands_are_accepted(
    told: str, parser: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    try:
        parser.parse_args(shlex.split(told, comments=True))
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


def test_modules_that_commands_name_are_there() -> None:
    for page in PAGES:
        for name in MODULE.findall(page.read_text()):
            assert importlib.util.find_spec(name) is not None, f"{name} on {page.name}"


@pytest.mark.parametrize("text", blocks("python"))
def test_examples_of_code_compile(text: str) -> None:
    compile(text.replace(", ...)", ")"), "example", "exec")


def test_pages_show_the_examples_that_extend_a_run() -> None:
    shown = re.findall(r'^--8<-- "(.*)"$', (ROOT / "docs" / "extending.md").read_text(), re.MULTILINE)
    tested = (ROOT / "tests" / "test_extensions.py").read_text()
    assert shown == ["examples/keep_largest.py", "examples/centred_clipping.py", "examples/unequal_sizes.py"]
    for path in shown:
        assert (ROOT / path).is_file()
        assert f'"{Path(path).stem}"' in tested


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_and_files_are_there(page: Path) -> None:
    text = page.read_text()
    for picture, target in LINK.findall(re.sub(BLOCK, "", text)):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", path):
            assert not picture, f"{target}: pages load nothing from elsewhere"
            continue
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
    for path in OWN.findall(text):
        assert (ROOT / path).exists(), path
