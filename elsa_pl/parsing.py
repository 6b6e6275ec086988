"""From the command line to settings: what LightningCLI's parser leaves to be wished for.

A misspelt setting is answered with the one that was probably meant, ``${...}`` in a YAML file may name any other
setting and follows what the command line makes of that, and ``--run FOLDER`` stands for the settings and the
checkpoint of an earlier run.
"""

import argparse
import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import DefaultHelpFormatter, Namespace, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from omegaconf.errors import OmegaConfBaseException

from elsa_pl.errors import ConfigurationError
from elsa_pl.strategies import HierarchicalStrategy

COMMANDS = {
    "fit": "Train adapters in rounds, test the best of them, and export it.",
    "validate": "Compute the validation figures of trained adapters.",
    "test": "Compute the test figures of trained adapters, in parts and merged into the model.",
    "predict": "Write what the model with trained adapters says about each row of a file, as a CSV file.",
}
_EXAMPLES = """examples:
  %(prog)s fit --config configs/quickstart.yaml
  %(prog)s fit --config configs/text_classification.yaml --data.train_file A.csv --data.test_file B.csv
  %(prog)s test --run runs/quickstart/<time>
  %(prog)s predict --run runs/quickstart/<time> --data.predict_file C.csv

The settings of a command, with types and defaults: %(prog)s fit --help"""
_HINTS = """Settings come from YAML files and from the command line; what comes later counts.
What a run would use: --print_config
The settings of the strategy (layout, edges, rounds): --trainer.strategy.help=HierarchicalStrategy"""

# Fields of dataclasses, such as the LoRA settings, have their documentation below them.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

_STRATEGY_KEYS = [f"trainer.strategy.init_args.{name}" for name in inspect.signature(HierarchicalStrategy).parameters]
_BASES: tuple[type[Any], ...] = (Callback, Logger, Strategy, torch.optim.Optimizer)
"""Of the classes that settings name."""
_REFERENCE = re.compile(r"\$\{([a-zA-Z_][\w.\[\]]*)\}")
# how jsonargparse tells of a setting that there is not
_UNKNOWN_ARGUMENTS = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_UNKNOWN_OPTION = re.compile(r"does not accept option '([^']+)'")
_UNKNOWN_OF_CLASS = re.compile(r"given class_path '([^']+)':\s+Option '([^']+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r'Parser key "([^"]+)".*Expected a dot import path string: (\w+)', re.DOTALL)
_UNKNOWN_OF_CALLABLE = re.compile(r"Option '([^']+)' is not accepted.*class_path='([^']+)'", re.DOTALL)


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the examples."""


def parser_kwargs() -> dict[str, Any]:
    """What the parsers say about themselves; the default usage of a command lists 100 settings."""
    common = {"parser_mode": "omegaconf+", "formatter_class": _Formatter, "allow_abbrev": False}
    commands = {
        name: {
            **common,
            "description": description,
            "epilog": _HINTS,
            "usage": "%(prog)s [--config FILE] [--run FOLDER] [--SETTING VALUE ...]",
        }
        for name, description in COMMANDS.items()
    }
    main_parser = {
        "description": "Split, hierarchical, federated LoRA fine-tuning of language models.",
        "epilog": _EXAMPLES,
    }
    return {**common, **main_parser, **commands}


class SettingsParser(LightningArgumentParser):
    """The parser of the command line, and of each command.

    Attributes:
        given: the settings before ``${...}`` was resolved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: Namespace | None = None

    def _parse_common(self, cfg: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        self.given = cfg.clone()  # the last place at which jsonargparse has them
        command = cfg.get("subcommand")
        for group in self.groups or {}:  # such as data and model.lora: jsonargparse ignores what has no names there
            if (value := cfg.get(group)) is not None and not isinstance(value, Namespace | dict):
                raise ConfigurationError(f"expected settings in {group}; got {value!r}: give them names, {group}.NAME")
        if command is not None and "${" in str(cfg):
            cfg[command] = _refer_below(cfg[command], command)
        try:
            return super()._parse_common(cfg, *args, **kwargs)
        except OmegaConfBaseException as error:
            raise ConfigurationError(_explain_interpolation(error, self.given)) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        super().error(_explain(message, sorted(_known_keys(parser))), ex)


def _refer_below(value: Any, command: str) -> Any:
    """``${name}`` becomes ``${command.name}``: below the command is where the settings stand when they are resolved."""
    if isinstance(value, str):
        return _REFERENCE.sub(rf"${{{command}.\1}}", value)
    if isinstance(value, list | tuple):
        return type(value)(_refer_below(item, command) for item in value)
    if isinstance(value, dict):
        return {key: _refer_below(item, command) for key, item in value.items()}
    if isinstance(value, Namespace):
        referring = value.clone()
        for key, item in value.items():
            referring[key] = _refer_below(item, command)
        return referring
    return value


def _explain_interpolation(error: OmegaConfBaseException, given: Namespace) -> str:
    """One line with the setting, its value, and what is wrong with it."""
    command, _, key = str(error.full_key).partition(".")
    value = f"={given[f'{command}.{key}']!r}" if f"{command}.{key}" in given else ""
    reason = str(error).splitlines()[0].replace(f"{command}.", "")
    return f"{key}{value}: {reason}: ${{...}} must name another setting, such as ${{data_root}}"


def _known_keys(parser: LightningArgumentParser) -> set[str]:
    """All settings of a command, and the groups that they are in."""
    keys = {action.dest for action in parser._actions if "." in action.dest or action.option_strings}
    if any(key.startswith("trainer.") for key in keys):
        keys.update(_STRATEGY_KEYS)
    return keys | {key.rpartition(".")[0] for key in keys if "." in key}


def _explain(message: str, known: Sequence[str]) -> str:
    """An error of jsonargparse, with the nearest known setting where one is unknown."""
    if found := _UNKNOWN_OF_CLASS.search(message):
        return _explain_class(found[1], found[2])
    if found := _UNKNOWN_OF_CALLABLE.search(message):
        return _explain_class(found[2], found[1])
    if (found := _UNKNOWN_CLASS.search(message)) and not get_close_matches(found[2], ("true", "false", "null")):
        names = {name.lower(): name for base in _BASES for name in _subclasses(base)}
        near = get_close_matches(found[2].lower(), names, n=1)
        otherwise = f": one of your own needs its module, my_module.{found[2]}"
        advice = _did_you_mean(names[near[0]]) if near else otherwise
        return f"{found[1]}: there is no class {found[2]}{advice}"
    if found := _UNKNOWN_OPTION.search(message):
        return message + _did_you_mean(nearest(found[1], known))
    if found := _UNKNOWN_ARGUMENTS.search(message):
        keys = [re.split(r"[=+]", word.removeprefix("--"))[0] for word in found[1].split() if word.startswith("--")]
        meant = [nearest(key, known) for key in keys]
        return message + _did_you_mean(", ".join(f"--{key}" for key in meant if key))
    return message


def _subclasses(base: type[Any]) -> set[str]:
    """The names of all classes that there are below one."""
    below: list[type[Any]] = base.__subclasses__()
    return {name for found in below for name in {found.__name__, *_subclasses(found)}}


def _explain_class(path: str, option: str) -> str:
    module, _, name = path.rpartition(".")
    names = list(inspect.signature(getattr(import_module(module), name)).parameters)
    meant = get_close_matches(option, names, n=1)
    return f"{path} does not accept {option!r}" + _did_you_mean(meant[0] if meant else "")


def _did_you_mean(meant: str | None) -> str:
    return f": did you mean {meant}?" if meant else ""


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known setting that is most like a misspelt one: as a whole, cut at the end, or in its last part.

    Example:
        >>> nearest("data.bath_size", ["data.batch_size", "data.seed"])
        'data.batch_size'
        >>> nearest("model.optimzer.class_path", ["model.optimizer", "model.task"])
        'model.optimizer'
        >>> nearest("optimzer.class_path", ["model.optimizer", "model.task"])
        'model.optimizer'
    """
    known = list(known)
    parts = re.split(r"\.(?:class_path|init_args)\b", key)[0].split(".")
    for length in range(len(parts), 0, -1):
        found = get_close_matches(".".join(parts[:length]), known, n=1, cutoff=0.8)
        if found and found[0] != ".".join(parts[:length]):
            return found[0]
    leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
    found = get_close_matches(parts[-1], list(leaves), n=1, cutoff=0.7)
    return leaves[found[0]] if found else None


def own_words(error: Exception) -> str:
    """The text of an error without what jsonargparse puts around it.

    Where a setting may have several types, its text lists the error of each, and drops the exceptions themselves.
    """
    text = str(error)
    if not text.startswith("Does not validate against any of the Union subtypes"):
        return text
    found = re.findall(r"^ *- (?!Expected a )(.*(?:\n(?! *- | *Given value).*)*)", text, re.MULTILINE)
    return found[0] if found else text


class SaveGivenConfig(SaveConfigCallback):
    """Saves the settings without what was filled in for this one run, so that they can start another.

    Args:
        parser: the command's parser.
        config: the settings as this run uses them.
        given: the settings to save.
        run_dir: where.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *, given: Namespace, run_dir: Path) -> None:
        super().__init__(parser, given, save_to_log_dir=False)
        self._run_dir = run_dir

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_validation=True, skip_unset=False)  # ``${...}`` fits no type
        (self._run_dir / "config.yaml").write_text(text)


def expand_run(arguments: Sequence[str]) -> list[str]:
    """Put the settings and the checkpoint of an earlier run in the place of ``--run FOLDER``.

    They come first, so that everything else on the command line overrides them. `fit` goes on from the last
    checkpoint; the other commands take the best.

    Raises:
        ConfigurationError: there is no such folder, or something is missing in it.
    """
    rest: list[str] = []
    folders: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--run":
            folders.append(next(words, ""))
        elif word.startswith("--run="):
            folders.append(word.removeprefix("--run="))
        else:
            rest.append(word)
    place = next((index for index, word in enumerate(rest) if word in COMMANDS), None)
    if not folders or place is None:
        return list(arguments)
    if len(folders) > 1:
        raise ConfigurationError(f"expected one --run, got {folders}: give one of them")
    folder = Path(folders[0])
    if not folders[0] or not folder.is_dir():
        raise ConfigurationError(
            f"expected --run to be the folder of an earlier run, such as runs/quickstart/<time>; got {folders[0]!r},"
            " and there is no such folder"
        )
    config, last = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    for path, what in ((config, "settings"), (last, "checkpoint")):
        if not path.is_file():
            raise ConfigurationError(
                f"expected {path} in the folder of a run, found none: give a folder that a fit has made, with its"
                f" {what}"
            )
    checkpoint = last if rest[place] == "fit" else _best(last)
    return [*rest[: place + 1], "--config", str(config), "--ckpt_path", str(checkpoint), *rest[place + 1 :]]


def _best(last: Path) -> Path:
    """The best checkpoint beside the last one, by what the last one knows; itself if nothing was monitored."""
    for name, state in read_checkpoint(last).get("callbacks", {}).items():
        if name.startswith("ModelCheckpoint") and state.get("monitor") and state.get("best_model_path"):
            best = last.with_name(Path(state["best_model_path"]).name)
            if not best.is_file():
                raise ConfigurationError(
                    f"expected the best checkpoint at {best}, found none: put it back, or choose one with --ckpt_path"
                )
            return best
    return last


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of an earlier run.

    Raises:
        ConfigurationError: the file is something else.
    """
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # whatever the bytes make it raise
        found = None
    if not isinstance(found, dict) or not {"elsa_totals", "elsa_identity"} <= found.keys():
        raise ConfigurationError(f"ckpt_path must be a checkpoint of an earlier run; {str(path)!r} is none")
    return found
