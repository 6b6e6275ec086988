"""The command line: ``python train.py fit --config ...``.

`main` runs in every process of a run: the first one starts the others with the same arguments. It turns expected
errors into one line, and a signal into an orderly end with an exit code that says so.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

# What is imported lives as long as the process: looking for garbage in it takes most of a second here, and at the end,
# where Ctrl-C should have been enough, almost two.
_collecting = gc.isenabled()
gc.disable()

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from elsa_pl.callbacks import RoundProgress
from elsa_pl.console import MOST_CLIENTS_IN_TABLE, closing, describe
from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.errors import ConfigurationError, ElsaError, RunFailed
from elsa_pl.export import check_writable, export_adapter, new_folder, summarise, write_summary
from elsa_pl.functional.profiles import ProfileSettings
from elsa_pl.hooks import hooks
from elsa_pl.identity import check_identity
from elsa_pl.parsing import (
    COMMANDS,
    SaveGivenConfig,
    SettingsParser,
    expand_run,
    own_words,
    parser_kwargs,
    read_checkpoint,
)
from elsa_pl.predictions import PredictionWriter
from elsa_pl.strategies import HierarchicalStrategy, launcher
from elsa_pl.strategies.checks import refuse_unsupported
from elsa_pl.tiers import SplitModel

gc.freeze()
if _collecting:
    gc.enable()

log = logging.getLogger(__name__)

_EXPECTED_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.13
    r"Experiment logs directory .* exists and is not empty",  # the other processes' logs lie there already
    r"The ``compute`` method of metric .* was called before the ``update``",  # a process without evaluation data
)


class ElsaCLI(LightningCLI):
    """Settings to a run: the folder, checks before anything starts, and what is left when it ends."""

    trainer: Any
    parser: SettingsParser
    model: SplitModel
    datamodule: FederatedTextDataModule

    # the strategy of the run under way, for `main` to end whatever happens
    running: HierarchicalStrategy | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, which all take the same settings, so that they all take the file of any other."""
        skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return dict.fromkeys(COMMANDS, skipped | {"verbose", "return_predictions"})

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is not about the model, the data or the trainer; it comes first in the help."""
        parser.add_argument(
            "--run",
            type=str | None,
            help="folder of an earlier run: its settings, and its best checkpoint (fit goes on from the last one);"
            " what else is given overrides them",
        )
        parser.add_argument("--name", type=str | None, help="name of the run; default: the config file's")
        parser.add_argument("--output_dir", type=str, default="runs", help="runs lie in OUTPUT_DIR/NAME/TIME")
        parser.add_argument(
            "--data_root", type=str, default="data", help="folder that config files refer to as ${data_root}"
        )
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="the seed that every random draw is derived from"
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add model and data before the trainer, whose list is long."""
        parser.add_lightning_class_args(SplitModel, "model")
        parser.add_lightning_class_args(FederatedTextDataModule, "data")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_argument(
            "--profile",
            type=ProfileSettings | None,
            help="devices and links of the fleet, for simulated time, assignment and cuts; default: none",
        )
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, and what follows from other settings."""
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("model.task", "data.task")
        parser.link_arguments("profile", "trainer.strategy.init_args.profile")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RoundProgress, "progress")

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        commands = self.parser._subcommands_action
        assert commands is not None
        for command in commands._choices_actions:
            command.help = COMMANDS[command.dest]  # Lightning puts the Trainer's documentation there
        # afterwards, because the commands' own usage begins with that of the whole
        self.parser.usage = "%(prog)s {fit,validate,test,predict} [--config FILE] [--run FOLDER] [--SETTING VALUE ...]"
        for parser in self._subcommand_parsers.values():
            parser.prog = parser.prog.replace(" [options]", "")

    def _prepare_subcommand_parser(self, klass: Any, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Describe the settings of the given command only: the hundreds of all four take a second and a half."""
        if launcher.arguments is None or subcommand in launcher.arguments:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        if config.run is not None:
            raise ConfigurationError(f"run={config.run!r} belongs on the command line: give --run {config.run}")
        # here because Lightning reads the file next, and its errors say neither what it is nor what to do
        path = config.ckpt_path
        if path is None and self.config.subcommand != "fit":
            raise ConfigurationError(
                f"{self.config.subcommand} needs trained adapters: give --run FOLDER, the folder of an earlier run, or"
                " --ckpt_path FILE with the settings that it was made with"
            )
        self._checkpoint = read_checkpoint(Path(path)) if path is not None and Path(path).is_file() else None

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and fill in what follows from other settings."""
        config = self.config[self.subcommand]
        if str(config.trainer.precision) in ("16", "16-mixed"):  # Lightning would make it bf16-mixed on a CPU
            raise ConfigurationError(
                f"trainer.precision={config.trainer.precision} would need one gradient scaler across processes: use"
                " 32-true or bf16-mixed"
            )
        assert self.parser.given is not None
        given = self.parser.given[str(self.subcommand)]
        config.name = config.name or (Path(str(given.config[0])).stem if given.get("config") else "run")
        suffix = "" if self.subcommand == "fit" else f"-{self.subcommand}"
        self.run_dir = new_folder(Path(config.output_dir) / config.name, suffix)
        to_save = config.clone()
        for key, value in given.items():
            if "${" in str(value):
                to_save[key] = value
        self.save_config_kwargs = {"given": to_save, "run_dir": self.run_dir}
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.model
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(self.run_dir / "checkpoints")
        validates = config.data.validation_fraction > 0 or config.data.validation_file is not None
        if config.checkpoint.monitor is None and validates and config.trainer.limit_val_batches != 0:
            accuracy = config.model.task == "classification"
            config.checkpoint.monitor = "val_accuracy" if accuracy else "val_loss"
            config.checkpoint.mode = "max" if accuracy else "min"
        if config.trainer.logger is None:
            config.trainer.logger = [
                {
                    "class_path": f"lightning.pytorch.loggers.{logger}",
                    "init_args": {"save_dir": str(self.run_dir), "name": folder, "version": ""},
                }
                for logger, folder in (("CSVLogger", ""), ("TensorBoardLogger", "tensorboard"))
            ]
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

    # ---- checks before other processes start and before anything is written ------------------------------------------

    def before_fit(self) -> None:
        self._check()

    def before_validate(self) -> None:
        self._check()

    def before_test(self) -> None:
        self._check()

    def before_predict(self) -> None:
        self.predictions = PredictionWriter(self.run_dir)
        self.trainer.callbacks.append(self.predictions)
        self._check()

    def _check(self) -> None:
        """Check all that can be checked: in the first process of a simulation, and in every site for itself."""
        self._started = time.monotonic()
        if self.subcommand != "fit":  # Lightning, about checkpoints that only fit will write
            warnings.filterwarnings("ignore", message="The dirpath has changed")
        strategy, data, model = self.trainer.strategy, self.datamodule, self.model
        site = strategy.layout == "site"
        if not _is_first() and not site:
            return
        if strategy.keeps_checkpoints or self.subcommand == "predict":
            check_writable(self.run_dir)
        path = self.config[self.subcommand].ckpt_path
        if path is not None and strategy.keeps_checkpoints and self._checkpoint is None:
            raise ConfigurationError(f"ckpt_path must be a checkpoint file; there is none at {str(path)!r}")
        refuse_unsupported(self.trainer)
        if not site and "RANK" not in os.environ:
            strategy.start_processes()
        if strategy.holds_data:
            data.load(strategy.own_client)
            self._check_rows()
        if not site:
            _check_names("client_plans", model.client_plans, data.client_names)
            _check_names("client_ranks", model.client_ranks, data.client_names)
        self.check_model(data.num_labels)
        if self.subcommand == "fit":
            strategy.check_probes(self.trainer, model, data)
        if self.subcommand in ("fit", "validate") and strategy.holds_data:
            for check in hooks(self.trainer, "check_public_texts"):
                check(data)
        if not site:
            strategy.check(self.trainer, model, data)
        if strategy.holds_data:
            model.check_vocabulary(data.vocabulary_size)
        if self._checkpoint is not None:
            check_identity(
                self._checkpoint["elsa_identity"],
                model.identity(data.labels if model.task == "classification" else []),
                str(path),
            )
            self._check_rounds()
        if strategy.holds_data:
            print(describe(strategy, data, self.run_dir), flush=True)

    def check_model(self, num_labels: int | None) -> None:
        """Build the model, and check what the strategy and the links ask of it.

        Args:
            num_labels: for classification.

        Raises:
            ConfigurationError: they do not go together.
            ValueError: an unknown model, or a cut that does not fit it.
        """
        strategy, model = self.trainer.strategy, self.model
        model.prepare(num_labels if model.task == "classification" else None)
        model.check_aggregator(strategy.aggregator, strategy.adapter_bits)
        model.check_links(self.trainer)

    def _check_rows(self) -> None:
        """Whether there are rows for the command; in the site layout one site may be without."""
        site = self.trainer.strategy.layout == "site"
        sizes = self.datamodule.split_sizes
        if self.subcommand == "validate" and "validation" not in sizes and not site:
            raise ConfigurationError(
                "expected validation examples, got none: set data.validation_file, or data.validation_fraction above 0"
            )
        if self.subcommand == "test" and "test" not in sizes and not site:
            raise ConfigurationError("expected test examples, got none: set data.test_file")
        if self.subcommand == "predict":
            self.datamodule.predict_batches()

    def _check_rounds(self) -> None:
        """Refuse to go on with a run that has all its rounds: Lightning would do nothing, without a word."""
        assert self._checkpoint is not None
        done, asked = self._checkpoint["elsa_totals"]["num_rounds"], self.trainer.max_epochs
        if self.subcommand == "fit" and asked is not None and 0 <= asked <= done:
            raise ConfigurationError(
                f"the run has finished: its checkpoint is of round {done}, and trainer.max_epochs={asked}; raise"
                " --trainer.max_epochs to train on, or use test or predict"
            )

    # ---- what a command does in the end ------------------------------------------------------------------------------

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
        rounds = read_checkpoint(Path(best))["elsa_totals"]["num_rounds"] if best else self.model.num_rounds
        self._finish(metrics, {"fit": trained, "test": tested}, adapter, rounds)

    def validate(self, **kwargs: Any) -> None:
        """Validate, and write the summary."""
        (metrics,) = self.trainer.validate(verbose=False, **kwargs)
        if self.trainer.is_global_zero:
            self._finish(metrics, {"validate": time.monotonic() - self._started})

    def test(self, **kwargs: Any) -> None:
        """Test, and write the summary."""
        (metrics,) = self.trainer.test(verbose=False, **kwargs)
        if self.trainer.is_global_zero:
            self._finish(metrics, {"test": time.monotonic() - self._started})

    def predict(self, **kwargs: Any) -> None:
        """Predict; the process that computes the predictions also writes them."""
        self.trainer.predict(return_predictions=False, **kwargs)
        strategy = self.trainer.strategy
        if strategy.own_client is not None or (_is_first() and strategy.layout != "site"):
            print(f"predictions: {self.predictions.path}", flush=True)

    def _finish(
        self,
        metrics: Mapping[str, Any],
        seconds: dict[str, float],
        adapter: Path | None = None,
        tested_round: int | None = None,
    ) -> None:
        seconds["total"] = time.monotonic() - self._started
        stage: Literal["val", "test"] = "val" if self.subcommand == "validate" else "test"
        summary = summarise(
            self.model, metrics, seconds=seconds, adapter=adapter, stage=stage, tested_round=tested_round
        )
        write_summary(self.run_dir / "summary.json", summary)
        # here, because a run that has begun need not have waited for what draws
        from elsa_pl.report.clients import write_clients
        from elsa_pl.report.runs import write_run_report

        if adapter is not None:
            write_clients(self.run_dir / "clients.csv", self.trainer)
        write_run_report(self.run_dir)
        print(closing(summary, self.run_dir, self.model), flush=True)

    def _has_test(self) -> bool:
        """Whether any process holds test data; all answer alike."""
        held = self.trainer.strategy.holds_data and "test" in self.datamodule.split_sizes
        return not self.trainer.strategy.reduce_boolean_decision(not held, all=True)


def _is_first() -> bool:
    """Whether this is the process that the user started, or rank 0 of torchrun: it speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def _check_names(setting: str, given: Iterable[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigurationError(
            f"{setting} names {unknown}, who are not among the clients {list(known[:MOST_CLIENTS_IN_TABLE])}:"
            " correct the names"
        )


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


def main(args: Sequence[str] | None = None, command_line: type[ElsaCLI] = ElsaCLI) -> int:
    """Run a command.

    Args:
        args: the command line without the program's name; default: this process' own.
        command_line: what reads it and acts on it.

    Returns:
        Exit code: 0 for success, 1 for a failed run, 130 after Ctrl-C, 143 after SIGTERM; 2, by way of SystemExit, for
        settings that do not parse.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # Lightning's notices (devices, tips, restored files) would bury the rounds
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # Lightning 2.6 calls jsonargparse 4.53 by names that go in its version 5
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
    ElsaCLI.running = None
    code = 1
    with _ending_on_signals():
        try:
            launcher.arguments = expand_run(sys.argv[1:] if args is None else args)
            command_line(
                SplitModel,
                FederatedTextDataModule,
                args=launcher.arguments,
                parser_class=SettingsParser,
                parser_kwargs=parser_kwargs(),
                auto_configure_optimizers=False,  # model.optimizer is made for each tier
                save_config_callback=SaveGivenConfig,
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
            print(f"error: {own_words(error)}", file=sys.stderr)
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
