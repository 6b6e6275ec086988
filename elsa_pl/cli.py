"""The command line: ``python train.py fit --config ...``.

`main` runs in every process of a run: the first one starts the others with the same arguments. It turns expected
errors into one line, and a signal into an orderly end with an exit code that says so.
"""

import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from elsa_pl.callbacks import RoundProgress
from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.errors import ConfigurationError, ElsaError, RunFailed
from elsa_pl.export import export_adapter, summarise, write_summary
from elsa_pl.strategies import HierarchicalStrategy, launcher
from elsa_pl.strategies.checks import refuse_unsupported
from elsa_pl.tiers import SplitModel

log = logging.getLogger(__name__)

_MOST_CLIENTS_IN_TABLE = 20
_EXPECTED_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.13
    r"Experiment logs directory .* exists and is not empty",  # the other processes' logs lie there already
    r"The ``compute`` method of metric .* was called before the ``update``",  # a process without evaluation data
)


class SaveGivenConfig(SaveConfigCallback):
    """Saves the settings without what was filled in for this one run, so that they can start another.

    Args:
        parser: the command's parser.
        config: the settings as this run uses them.
        given: the settings to save.
        kwargs: see Lightning's callback.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, given: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, given, **kwargs)


class ElsaCLI(LightningCLI):
    """Settings to a run: the folder, checks before anything starts, and test and export after `fit`."""

    trainer: Any
    model: SplitModel
    datamodule: FederatedTextDataModule

    # the strategy of the run under way, for `main` to end whatever happens
    running: HierarchicalStrategy | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own settings, and the callbacks that every run has."""
        parser.add_argument("--name", type=str | None, help="name of the run; default: the config file's")
        parser.add_argument("--output_dir", type=str, default="runs", help="runs lie in OUTPUT_DIR/NAME/TIME")
        parser.add_argument("--data_root", type=str, default="data", help="folder that configs call ${data_root}")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.task", "data.task")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RoundProgress, "progress")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        # here because Lightning reads the file next, and its errors say neither what it is nor what to do
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and Path(path).is_file():
            try:
                found = torch.load(path, weights_only=True, map_location="cpu")
            except Exception:  # whatever the bytes make it raise
                found = None
            if not isinstance(found, dict) or "elsa_totals" not in found:
                raise ConfigurationError(f"ckpt_path must be a checkpoint of an earlier run; {path!r} is none")

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and fill in what follows from other settings."""
        config = self.config[self.subcommand]
        if str(config.trainer.precision) in ("16", "16-mixed"):  # Lightning would make it bf16-mixed on a CPU
            raise ConfigurationError(
                f"trainer.precision={config.trainer.precision} would need one gradient scaler across processes: use"
                " 32-true or bf16-mixed"
            )
        config.name = config.name or _config_name(launcher.arguments or []) or "run"
        self.run_dir = _new_folder(Path(config.output_dir) / config.name)
        self.save_config_kwargs = {**self.save_config_kwargs, "given": config.clone()}
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.model
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(self.run_dir / "checkpoints")
        validates = config.data.validation_fraction > 0 or config.data.validation_file is not None
        if config.checkpoint.monitor is None and validates and config.trainer.limit_val_batches != 0:
            accuracy = config.model.task == "classification"
            config.checkpoint.monitor = "val_accuracy" if accuracy else "val_loss"
            config.checkpoint.mode = "max" if accuracy else "min"
        if config.trainer.logger is None:
            init_args = {"save_dir": str(self.run_dir), "name": "", "version": ""}
            config.trainer.logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": init_args}
        config.trainer.default_root_dir = config.trainer.default_root_dir or str(self.run_dir)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        strategy = self.trainer.strategy
        if not isinstance(strategy, HierarchicalStrategy):
            raise ConfigurationError(
                f"trainer.strategy must be elsa_pl.strategies.HierarchicalStrategy; got {type(strategy).__name__}"
            )
        strategy.log_dir = self.run_dir
        ElsaCLI.running = strategy
        # Not save_last: Lightning writes that only together with a better model, and a run that was stopped would lose
        # the rounds since.
        dirpath = self.config[self.subcommand].checkpoint.dirpath
        self.trainer.callbacks.append(
            ModelCheckpoint(dirpath, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
        )

    @property
    def _checks(self) -> bool:
        """Whether this process checks the settings: the first one of a simulation, and every site for itself."""
        return _is_first() or self.trainer.strategy.layout == "site"

    def before_fit(self) -> None:
        """Check all that can be checked before other processes start and before the first batch."""
        self._started = time.monotonic()
        strategy = self.trainer.strategy
        checkpoint = self.config[self.subcommand].ckpt_path
        if not self._checks:
            return
        if checkpoint is not None and _is_first() and not Path(checkpoint).is_file():
            raise ConfigurationError(f"ckpt_path must be a checkpoint file; there is none at {checkpoint!r}")
        refuse_unsupported(self.trainer)
        data = self.datamodule
        if strategy.holds_data:
            data.load(strategy.own_client)
        if strategy.layout != "site":
            strategy.check(data.client_names)
            _check_names("client_plans", self.model.client_plans, data.client_names)
        self.model.prepare(data.num_labels if self.model.task == "classification" else None)
        if strategy.holds_data:
            self.model.check_vocabulary(data.vocabulary_size)
            print(_describe(strategy, data, self.run_dir), flush=True)

    def after_fit(self) -> None:
        """Test the best global model (the last one without validation), export it, and write the summary."""
        trained = time.monotonic() - self._started
        best = self.trainer.checkpoint_callback.best_model_path if self.trainer.checkpoint_callback else ""
        metrics: dict[str, Any] = {}
        start = time.monotonic()
        if self._has_test():
            results = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)
            metrics = dict(results[0])
        elif best:
            state = self.trainer.strategy.load_checkpoint(best)["state_dict"]
            self.model.load_state_dict(state)
        tested = time.monotonic() - start
        if not self.trainer.is_global_zero:
            return
        adapter = self.run_dir / "adapter"
        export_adapter(self.model, adapter)
        seconds = {"fit": trained, "test": tested, "total": time.monotonic() - self._started}
        summary = summarise(self.model, metrics, seconds=seconds, adapter=adapter)
        write_summary(self.run_dir / "summary.json", summary)
        print(_closing(summary, self.run_dir), flush=True)

    def _has_test(self) -> bool:
        """Whether any process holds test data; all answer alike."""
        held = self.trainer.strategy.holds_data and "test" in self.datamodule.split_sizes
        return not self.trainer.strategy.reduce_boolean_decision(not held, all=True)


def _own_words(error: Exception) -> str:
    """The text of an error without what jsonargparse puts around it.

    Where a setting may have several types, its text lists the error of each, and drops the exceptions themselves.
    """
    text = str(error)
    if not text.startswith("Does not validate against any of the Union subtypes"):
        return text
    found = re.findall(r"^ *- (?!Expected a )(.*(?:\n(?! *- | *Given value).*)*)", text, re.MULTILINE)
    return found[0] if found else text


def _is_first() -> bool:
    """Whether this is the process that the user started, or rank 0 of torchrun: it speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def _check_names(setting: str, given: Iterable[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigurationError(
            f"{setting} names {unknown}, who are not among the clients {list(known[:_MOST_CLIENTS_IN_TABLE])}:"
            " correct the names"
        )


def _config_name(arguments: Sequence[str]) -> str | None:
    """The name of the first config file. The parsed settings forget it where a file refers to ${another key}."""
    for place, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in ("-c", "--config"):
            return Path(value or arguments[place + 1]).stem
    return None


def _new_folder(parent: Path) -> Path:
    """Name a folder for a run that starts now; it is made when something is written to it."""
    time_now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, count = parent / time_now, 1
    while folder.exists():
        count += 1
        folder = parent / f"{time_now}_{count}"
    return folder


def _describe(strategy: HierarchicalStrategy, data: FederatedTextDataModule, run_dir: Path) -> str:
    """The opening lines of a run: what is trained where, and in simulation whose data looks how."""
    sizes = ", ".join(f"{split} {size}" for split, size in data.split_sizes.items())
    lines = [f"data: {sizes}" + (f"; {data.num_labels} labels" if data.num_labels else "")]
    if strategy.layout != "site":
        lines.append(
            f"{len(data.client_names)} clients, {strategy.num_edges} edges, layout {strategy.layout};"
            f" {strategy.edge_rounds} x {strategy.local_steps} local steps a round"
        )
        histogram = data.label_histogram
        for client in data.client_names[:_MOST_CLIENTS_IN_TABLE]:
            lines.append(f"  {client}: {data.client_sizes[client]} examples  {histogram[client] or ''}")
        more = len(data.client_names) - _MOST_CLIENTS_IN_TABLE
        if more > 0:
            lines.append(f"  and {more} more")
        lines.append(f"run folder: {run_dir}")
    return "\n".join(lines)


def _closing(summary: dict[str, Any], run_dir: Path) -> str:
    """The closing lines of a run: figures, and where everything lies."""
    figures = [f"{name} {summary[name]:.4f}" for name in ("test_accuracy", "test_f1", "test_loss") if summary[name]]
    sent = summary["bytes"]
    lines = ["", "  ".join(figures or ["no test data"])]
    for link in ("uplink", "downlink", "adapters"):
        lines.append(f"{link}: " + ", ".join(f"{way} {count / 1e6:.1f} MB" for way, count in sent[link].items()))
    lines.append(
        f"{summary['rounds']} rounds in {summary['seconds']['total']:.0f} s, {sent['total'] / 1e6:.1f} MB sent"
    )
    lines += [f"adapter: {summary['adapter']}", f"summary: {run_dir / 'summary.json'}"]
    return "\n".join(lines)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the run in order, with exit code 128 + number."""

    def end(number: int, frame: FrameType | None) -> None:
        for seen in (signal.SIGINT, signal.SIGTERM):
            signal.signal(seen, signal.SIG_IGN)  # the end is under way
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: the command line without the program's name; default: this process' own.

    Returns:
        Exit code: 0 for success, 1 for a failed run, 130 after Ctrl-C, 143 after SIGTERM; 2, by way of SystemExit, for
        settings that do not parse.
    """
    launcher.arguments = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # Lightning's notices (devices, tips, restored files) would bury the rounds
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # ${data_root} in a file means the file's own key, which lies below "fit" once the file is read
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    ElsaCLI.running = None
    code = 1
    with _ending_on_signals():
        try:
            ElsaCLI(
                SplitModel,
                FederatedTextDataModule,
                args=None if args is None else launcher.arguments,
                seed_everything_default=0,
                parser_kwargs={"parser_mode": "omegaconf+"},
                auto_configure_optimizers=False,  # model.optimizer is made for each tier
                save_config_callback=SaveGivenConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={
                    "accelerator": "cpu",
                    "devices": 1,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "num_sanity_val_steps": 0,
                    "use_distributed_sampler": False,
                    "log_every_n_steps": 1,
                    "strategy": {"class_path": "elsa_pl.strategies.HierarchicalStrategy"},
                },
            )
            code = 0
        except RunFailed as error:  # somebody else's error, told by the cloud; only the first process repeats it
            if _is_first():
                print(f"error: {error}", file=sys.stderr)
        except (ElsaError, ValueError, OSError, MisconfigurationException) as error:
            if not isinstance(error, ElsaError) and ElsaCLI.running is not None and ElsaCLI.running.running:
                log.exception("the run failed")  # not an error of the settings: those are found before RPC starts
            print(f"error: {_own_words(error)}", file=sys.stderr)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if code in (130, 143):
                print("stopped; the last checkpoint is kept", file=sys.stderr)
            else:
                raise
        finally:
            if ElsaCLI.running is not None:
                ElsaCLI.running.shutdown(success=code == 0)
    return code


if __name__ == "__main__":
    sys.exit(main())
