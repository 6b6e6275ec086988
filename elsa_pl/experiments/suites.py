"""A suite file: which methods are compared, on what, and how often.

    title: one line
    data_sets: {trec: ../experiments/trec.yaml}       name: a configuration of train.py
    methods:
      fedavg: {config: ../methods/fedavg.yaml}        what it changes in that
      elsa-without-clustering:
        config: ../methods/elsa.yaml
        without: [BehaviorClustering]                 callbacks that are taken out
        set: {data.batch_size: 4}                     settings, which count last
    cases: {faulty-25: {data.faulty_fraction: 0.25}}  settings, for all methods alike
    seeds: [0, 1, 2]
    settings: {trainer.max_epochs: 10}                for all runs alike
    target_accuracy: {trec: 0.8}                      for rounds, bytes and seconds to it
    sizes: {full: {seeds: [0, 1, 2, 3, 4]}}           what other sizes than ``cpu`` change in all this

Files are found from the suite's folder. A case, a method or a data set may be left out of a combination by
``skip: [{method: central, case: faulty-25}]``.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from elsa_pl.errors import ConfigurationError
from elsa_pl.export import PACKAGES

CPU_SIZE = "cpu"

_KEYS = {"title", "data_sets", "methods", "cases", "seeds", "settings", "target_accuracy", "sizes", "skip"}
_METHOD_KEYS = {"about", "config", "without", "set"}
_SKIP_KEYS = {"method", "data_set", "case"}

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One of the methods that a suite compares."""

    config: Path
    """What it changes in the data set's configuration."""

    about: str = ""
    """What it is, for the report."""

    without: tuple[str, ...] = ()
    """Callbacks that are taken out."""

    settings: Settings = field(default_factory=dict)
    """Settings by their names on the command line."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a suite file says, for one size."""

    name: str
    """Of the file."""

    title: str
    """What is compared."""

    size: str
    """Which of its sizes this is."""

    data_sets: Mapping[str, Path]
    """Configurations of train.py, by name."""

    methods: Mapping[str, Method]
    """By name."""

    cases: Mapping[str, Settings]
    """Settings that all methods are tried under, by name."""

    seeds: Sequence[int]
    """Of all runs."""

    settings: Settings
    """Of all runs."""

    target_accuracy: Mapping[str, float]
    """By data set."""

    skip: Sequence[Mapping[str, str]]
    """Combinations that are left out."""

    def combinations(self) -> list[tuple[str, str, str]]:
        """Case, data set and method of all cells but for their seeds."""
        found = itertools.product(self.cases, self.data_sets, self.methods)
        return [
            (case, data_set, method)
            for case, data_set, method in found
            if not any(
                rule.items() <= {"case": case, "data_set": data_set, "method": method}.items() for rule in self.skip
            )
        ]

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "name": self.name,
            "title": self.title,
            "size": self.size,
            "versions": {package: version(package) for package in ("elsa_pl", *PACKAGES)},
            "methods": {name: method.about for name, method in self.methods.items()},
            "cases": {
                name: ", ".join(f"{key} {value}" for key, value in settings.items())
                for name, settings in self.cases.items()
            },
            "target_accuracy": dict(self.target_accuracy),
        }

    def configuration(self, case: str, data_set: str, method: str) -> dict[str, Any]:
        """The settings of a run, as the contents of one file for train.py; without its seed.

        Raises:
            ConfigurationError: a callback that is to be taken out is not there.
        """
        chosen = self.methods[method]
        merged = OmegaConf.merge(
            *(OmegaConf.create(read_yaml(path)) for path in (self.data_sets[data_set], chosen.config))
        )
        config: dict[str, Any] = OmegaConf.to_container(merged, resolve=False)  # type: ignore[assignment]  # str keys
        for settings in (self.settings, self.cases[case], chosen.settings):
            for name, value in settings.items():
                put(config, name, value)
        if chosen.without:
            callbacks = config.get("trainer", {}).get("callbacks") or []
            names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
            if missing := set(chosen.without) - set(names):
                raise ConfigurationError(
                    f"methods.{method}.without names {sorted(missing)}; {chosen.config} has the callbacks {names}:"
                    " correct the names"
                )
            config["trainer"]["callbacks"] = [
                callback for callback, name in zip(callbacks, names, strict=True) if name not in chosen.without
            ]
        return config


def load_suite(path: Path, size: str = CPU_SIZE) -> Suite:
    """Read a suite file.

    Args:
        path: of the file.
        size: one of its ``sizes``, or ``cpu``.

    Raises:
        ConfigurationError: no such file, keys that it cannot have, or files that are not there.
    """
    content = read_yaml(path)
    _require_keys(str(path), content, _KEYS)
    sizes = content.pop("sizes", {})
    if size != CPU_SIZE and size not in sizes:
        raise ConfigurationError(f"{path} has the sizes {[CPU_SIZE, *sizes]}; got {size!r}: choose one of them")
    for name, value in sizes.get(size, {}).items():
        merges = isinstance(value, dict) and name in ("settings", "target_accuracy")
        content[name] = {**content.get(name, {}), **value} if merges else value
    _require_keys(f"sizes of {path}", content, _KEYS)
    for name in ("data_sets", "methods", "seeds"):
        if not content.get(name):
            raise ConfigurationError(f"{path} needs {name}; got {content.get(name)!r}: see another suite's file")
    data_sets = {name: _file(path, f"data_sets.{name}", given) for name, given in content["data_sets"].items()}
    methods = {}
    for name, given in content["methods"].items():
        where = f"methods.{name}"
        _require_keys(f"{where} of {path}", given, _METHOD_KEYS)
        methods[name] = Method(
            config=_file(path, f"{where}.config", given.get("config")),
            about=given.get("about", ""),
            without=tuple(given.get("without", ())),
            settings=given.get("set", {}),
        )
    suite = Suite(
        name=path.stem if size == CPU_SIZE else f"{path.stem}-{size}",
        title=content.get("title", path.stem),
        size=size,
        data_sets=data_sets,
        methods=methods,
        cases={name: given or {} for name, given in (content.get("cases") or {"all": {}}).items()},
        seeds=content["seeds"],
        settings=content.get("settings", {}),
        target_accuracy=content.get("target_accuracy", {}),
        skip=content.get("skip", []),
    )
    for kind, known, given in (
        ("method", suite.methods, [rule["method"] for rule in suite.skip if "method" in rule]),
        ("data_set", suite.data_sets, [rule["data_set"] for rule in suite.skip if "data_set" in rule]),
        ("case", suite.cases, [rule["case"] for rule in suite.skip if "case" in rule]),
        ("data_set", suite.data_sets, list(suite.target_accuracy)),
    ):
        choose(str(path), kind, given, known)
    for rule in suite.skip:
        _require_keys(f"skip of {path}", rule, _SKIP_KEYS)
    return suite


def choose(where: str, kind: str, given: Sequence[str], known: Mapping[str, object]) -> None:
    """Refuse names that there are not.

    Raises:
        ConfigurationError: with the names that there are.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigurationError(
            f"{where}: unknown {kind} {unknown[0]!r}; there are {', '.join(known)}: choose of these"
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """The contents of a YAML file.

    Raises:
        ConfigurationError: it is not there, does not parse, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"expected a YAML file at {path}; got: {error.strerror}: correct the path") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is no YAML: {error}: repair it") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"expected settings in {path}; got {type(content).__name__}: see another file's form")
    return content


def put(config: dict[str, Any], name: str, value: object) -> None:
    """Set ``a.b.c`` in a configuration; settings of the strategy also go without ``init_args``.

    Raises:
        ConfigurationError: there is a value on the way.
    """
    *path, last = (
        name.replace("trainer.strategy.", "trainer.strategy.init_args.")
        .replace("init_args.init_args.", "init_args.")
        .split(".")
    )
    for key in path:
        inner = config.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigurationError(f"cannot set {name}: {key} is {inner!r}: correct the name")
        config = inner
    config[last] = value


def _file(suite: Path, where: str, given: object) -> Path:
    path = suite.parent / str(given)
    if given is None or not path.is_file():
        raise ConfigurationError(f"{where} of {suite} must be a file; got {given!r}: paths start at the suite's folder")
    return path


def _require_keys(where: str, given: object, known: set[str]) -> None:
    if not isinstance(given, dict):
        raise ConfigurationError(f"expected settings in {where}; got {given!r}")
    if unknown := sorted(set(given) - known):
        raise ConfigurationError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(sorted(known))}")
