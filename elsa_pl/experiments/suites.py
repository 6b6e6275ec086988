"""A suite file: which methods are compared, on what, and how often.

    title: one line
    data_sets: {trec: ../experiments/trec.yaml}       name: a configuration of train.py
    methods:
      fedavg: {config: ../methods/fedavg.yaml}        what it changes in that
      elsa-otherwise:
        config: ../methods/elsa.yaml
        without: [LinkProjection]                     callbacks that are taken out
        add: [{class_path: TrustScoring}]             callbacks that come before the others
        set:                                          settings, which count last
          data.batch_size: 4
          trainer.callbacks.TrustScoring.min_trust: 0.2     of a callback that the method has
    cases: {faulty-25: {data.faulty_fraction: 0.25}}  settings, for all methods alike
    seeds: [0, 1, 2]
    settings: {trainer.max_epochs: 10}                for all runs alike
    target_accuracy: {trec: 0.8}                      for rounds, bytes and seconds to it
    budgets_mb: [10, 50]                              for the accuracy that so many MB give
    sizes: {full: {seeds: [0, 1, 2, 3, 4]}}           what other sizes than ``cpu`` change in all this

Files are found from the suite's folder. A case, a method or a data set may be left out of a combination by
``skip: [{method: [central, local], case: faulty-25}]``.
"""

import copy
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elsa_pl.errors import ConfigurationError
from elsa_pl.export import PACKAGES

CPU_SIZE = "cpu"

CELLS_FOLDER = "cells"
"""Beside the folders of suites: where their runs lie."""

_KEYS: dict[str, type] = {
    "title": str,
    "data_sets": dict,
    "methods": dict,
    "cases": dict,
    "seeds": list,
    "settings": dict,
    "target_accuracy": dict,
    "budgets_mb": list,
    "sizes": dict,
    "skip": list,
}
_METHOD_KEYS: dict[str, type] = {"about": str, "config": str, "without": list, "add": list, "set": dict}
_SKIP_KEYS: dict[str, type] = {"method": list, "data_set": list, "case": list}
_FORMS: dict[type, str] = {str: "a text", list: "a list", dict: "names with values"}
_OWN = {
    "seed_everything": "what the suite's seeds say",
    "data_root": "what --data_root says",
    "output_dir": "what --output says",
    "name": "the suite's to choose",
}
"""Settings of train.py that a suite cannot have."""
_NAME = re.compile(r"[\w.+-]+")

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

    add: tuple[Settings, ...] = ()
    """Callbacks that come before the others, each with its ``class_path``."""

    settings: Settings = field(default_factory=dict)
    """Settings by their names on the command line."""

    def describe(self) -> dict[str, Any]:
        """What a suite's file says of it, without what it leaves out."""
        found = {"without": list(self.without), "add": list(self.add), "set": dict(self.settings)}
        return {"config": os.path.normpath(self.config), **{name: value for name, value in found.items() if value}}


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

    budgets_mb: Sequence[float]
    """Bytes of training, in units of 10^6."""

    skip: Sequence[Mapping[str, Sequence[str]]]
    """Combinations that are left out."""

    def combinations(self) -> list[tuple[str, str, str]]:
        """Case, data set and method of all cells but for their seeds."""
        found = itertools.product(self.cases, self.data_sets, self.methods)
        return [
            (case, data_set, method)
            for case, data_set, method in found
            if not any(_matches(rule, {"case": case, "data_set": data_set, "method": method}) for rule in self.skip)
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
            "budgets_mb": list(self.budgets_mb),
            "configuration": {
                "data_sets": {name: os.path.normpath(path) for name, path in self.data_sets.items()},
                "methods": {name: method.describe() for name, method in self.methods.items()},
                "settings": dict(self.settings),
            },
        }

    def configuration(self, case: str, data_set: str, method: str) -> dict[str, Any]:
        """The settings of a run, as the contents of one file for train.py; without its seed.

        Raises:
            ConfigurationError: a callback that is to be taken out is not there, or the files do not go together.
        """
        chosen = self.methods[method]
        files = (self.data_sets[data_set], chosen.config)
        try:
            merged = OmegaConf.merge(*(OmegaConf.create(read_yaml(path)) for path in files))
            config: dict[str, Any] = OmegaConf.to_container(merged, resolve=False)  # type: ignore[assignment]  # str keys
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{files[0]} and {files[1]} make no configuration: {error}: correct them"
            ) from error
        if chosen.without or chosen.add:
            callbacks = _callbacks_of(config, f"trainer.callbacks of methods.{method}")
            names = [_class_of(callback) for callback in callbacks]
            if missing := set(chosen.without) - set(names):
                raise ConfigurationError(
                    f"methods.{method}.without names {sorted(missing)}; {chosen.config} has the callbacks {names}:"
                    " correct the names"
                )
            kept = [callback for callback, name in zip(callbacks, names, strict=True) if name not in chosen.without]
            config.setdefault("trainer", {})["callbacks"] = [*copy.deepcopy(chosen.add), *kept]
        for settings in (self.settings, self.cases[case], chosen.settings):
            for name, value in settings.items():
                put(config, name, value)
        return config


def load_suite(path: Path, size: str = CPU_SIZE) -> Suite:
    """Read a suite file.

    Args:
        path: of the file.
        size: one of its ``sizes``, or ``cpu``.

    Raises:
        ConfigurationError: no such file, keys that it cannot have, or files that are not there.
    """
    if path.stem == CELLS_FOLDER:
        raise ConfigurationError(f"a suite's file cannot be called {path.name}: its runs lie in a folder of that name")
    content = _require(str(path), read_yaml(path), _KEYS)
    sizes = content.pop("sizes", {})
    if size != CPU_SIZE and size not in sizes:
        raise ConfigurationError(f"{path} has the sizes {[CPU_SIZE, *sizes]}; got {size!r}: choose one of them")
    for name, value in _require(f"sizes.{size} of {path}", sizes.get(size, {}), _KEYS).items():
        merges = name in ("settings", "target_accuracy")
        content[name] = {**content.get(name, {}), **value} if merges else value
    for name in ("data_sets", "methods", "seeds"):
        if not content.get(name):
            raise ConfigurationError(f"{path} needs {name}; got {content.get(name)!r}: see another suite's file")
    cases = content.get("cases") or {"all": {}}
    for kind in (content["data_sets"], content["methods"], cases):
        for name in kind:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ConfigurationError(
                    f"{path}: expected a name of letters, digits and any of -_+.; got {name!r}: call it otherwise"
                )
    data_sets = {name: _file(path, f"data_sets.{name}", given) for name, given in content["data_sets"].items()}
    methods = {}
    for name, value in content["methods"].items():
        where = f"methods.{name}"
        given = _require(f"{where} of {path}", value, _METHOD_KEYS)
        methods[name] = Method(
            config=_file(path, f"{where}.config", given.get("config")),
            about=given.get("about", ""),
            without=_texts(f"{where}.without of {path}", given.get("without", [])),
            add=_callbacks(f"{where}.add of {path}", given.get("add", [])),
            settings=_settings(f"{where}.set of {path}", given.get("set", {})),
        )
    suite = Suite(
        name=path.stem if size == CPU_SIZE else f"{path.stem}-{size}",
        title=content.get("title", path.stem),
        size=size,
        data_sets=data_sets,
        methods=methods,
        cases={name: _settings(f"cases.{name} of {path}", given or {}) for name, given in cases.items()},
        seeds=content["seeds"],
        settings=_settings(f"settings of {path}", content.get("settings", {})),
        target_accuracy=content.get("target_accuracy", {}),
        budgets_mb=content.get("budgets_mb", []),
        skip=[_rule(f"skip of {path}", given) for given in content.get("skip", [])],
    )
    if not all(isinstance(seed, int) for seed in suite.seeds) or len(set(suite.seeds)) < len(suite.seeds):
        raise ConfigurationError(f"{path}: seeds must be whole numbers that differ; got {suite.seeds}: correct them")
    for name, target in suite.target_accuracy.items():
        if not isinstance(target, int | float) or not 0 <= target <= 1:
            raise ConfigurationError(
                f"{path}: target_accuracy.{name} must be a number from 0 to 1; got {target!r}: 80% is 0.8"
            )
    for budget in suite.budgets_mb:
        if not isinstance(budget, int | float) or not budget > 0:
            raise ConfigurationError(f"{path}: budgets_mb must be numbers above 0; got {budget!r}: correct it")
    if not all(suite.skip):
        raise ConfigurationError(f"{path}: a rule of skip is empty, which would skip all: name a method or a case")
    for kind, known, names in (
        ("method", suite.methods, [name for rule in suite.skip for name in rule.get("method", ())]),
        ("data_set", suite.data_sets, [name for rule in suite.skip for name in rule.get("data_set", ())]),
        ("case", suite.cases, [name for rule in suite.skip for name in rule.get("case", ())]),
        ("data_set", suite.data_sets, list(suite.target_accuracy)),
    ):
        choose(str(path), kind, names, known)
    return suite


def choose(where: str, kind: str, given: Iterable[object], known: Iterable[object]) -> None:
    """Refuse names that there are not.

    Raises:
        ConfigurationError: with the names that there are.
    """
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigurationError(
            f"{where}: unknown {kind} {unknown[0]!r}; there are {', '.join(map(str, known))}: choose of these"
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no YAML: {error}: repair it") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"expected settings in {path}; got {type(content).__name__}: see another file's form")
    return content


def put(config: dict[str, Any], name: str, value: object) -> None:
    """Set ``a.b.c`` in a configuration; settings of the strategy also go without ``init_args``.

    An argument of all callbacks of a class is set as ``trainer.callbacks.TrustScoring.min_trust``.

    Raises:
        ConfigurationError: there is a value on the way, or no such callback.
    """
    parts = (
        name.replace("trainer.strategy.", "trainer.strategy.init_args.")
        .replace("init_args.init_args.", "init_args.")
        .split(".")
    )
    holders = [config]
    if parts[:2] == ["trainer", "callbacks"] and len(parts) > 3:
        holders = _arguments(config, name, parts[2])
        parts = parts[3:]
    for holder in holders:
        for key in parts[:-1]:
            inner = holder.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigurationError(f"cannot set {name}: {key} is {inner!r}: correct the name")
            holder = inner
        holder[parts[-1]] = copy.deepcopy(value)


def _arguments(config: Mapping[str, Any], name: str, wanted: str) -> list[dict[str, Any]]:
    """Those of all callbacks of a class, to be changed."""
    callbacks: Any = _callbacks_of(config, "trainer.callbacks")
    chosen = [callback for callback in callbacks if _class_of(callback) == wanted]
    if not chosen:
        names = [_class_of(callback) for callback in callbacks]
        raise ConfigurationError(f"cannot set {name}: there are the callbacks {names}: correct the name")
    for callback in chosen:
        callback["init_args"] = callback.get("init_args") or {}  # which may stand there without anything
    return [callback["init_args"] for callback in chosen]


def _class_of(callback: Settings) -> str:
    return str(callback["class_path"]).rpartition(".")[2]


def _callbacks_of(config: Mapping[str, Any], where: str) -> tuple[Settings, ...]:
    trainer = config.get("trainer") or {}
    if not isinstance(trainer, dict):
        raise ConfigurationError(f"expected settings in trainer; got {trainer!r}: give them names, trainer.NAME")
    return _callbacks(where, trainer.get("callbacks") or [])


def _file(suite: Path, where: str, given: object) -> Path:
    path = suite.parent / str(given)
    if given is None or not path.is_file():
        raise ConfigurationError(f"{where} of {suite} must be a file; got {given!r}: paths start at the suite's folder")
    return path


def _callbacks(where: str, given: object) -> tuple[Settings, ...]:
    if isinstance(given, list) and all(
        isinstance(callback, dict) and isinstance(callback.get("class_path"), str) for callback in given
    ):
        _plain(where, given)
        return tuple(given)
    raise ConfigurationError(
        f"{where}: expected a list of callbacks such as {{class_path: TrustScoring}}; got {given!r}: see the top of"
        " elsa_pl/experiments/suites.py"
    )


def _rule(where: str, given: object) -> dict[str, tuple[str, ...]]:
    """What is skipped: of each kind one name or several."""
    listed = {kind: [names] if isinstance(names, str) else names for kind, names in _require(where, given).items()}
    return {kind: _texts(f"{kind} in {where}", names) for kind, names in _require(where, listed, _SKIP_KEYS).items()}


def _matches(rule: Mapping[str, Sequence[str]], place: Mapping[str, str]) -> bool:
    return all(place[kind] in names for kind, names in rule.items())


def _texts(where: str, given: list[object]) -> tuple[str, ...]:
    if all(isinstance(name, str) for name in given):
        return tuple(map(str, given))
    raise ConfigurationError(f"{where}: expected names such as TrustScoring; got {given!r}: correct them")


def _settings(where: str, given: object) -> dict[str, Any]:
    """Settings by their names on the command line, but for those that are the suite's own."""
    found = _require(where, given)
    for name, value in found.items():
        if not isinstance(name, str):
            raise ConfigurationError(f"{where}: expected names such as data.alpha; got {name!r}: correct it")
        if name in _OWN:
            raise ConfigurationError(f"{where}: {name} is {_OWN[name]}: leave it out")
        _plain(f"{where}: {name}", value)
    return found


def _plain(where: str, value: object) -> None:
    """Refuse what a table cannot hold."""
    try:
        json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise ConfigurationError(
            f"{where} must be a text, number, list or names with values; got {value!r}: a date needs quotes"
        ) from error


def _require(where: str, given: object, known: Mapping[str, type] | None = None) -> dict[str, Any]:
    """What is given, without keys that have no value; any keys where none are named."""
    if not isinstance(given, dict):
        raise ConfigurationError(f"expected names with values in {where}; got {given!r}: see another suite's file")
    found = {name: value for name, value in given.items() if value is not None or known is None}
    if known is None:
        return found
    if unknown := sorted(set(given) - set(known), key=str):
        raise ConfigurationError(
            f"{where}: unknown key {unknown[0]!r}; there are {', '.join(sorted(known))}: correct it"
        )
    for name, value in found.items():
        if not isinstance(value, known[name]):
            raise ConfigurationError(
                f"{where}: {name} must be {_FORMS[known[name]]}; got {value!r}: see another suite's file"
            )
    return found
