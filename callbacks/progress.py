"""One line per round, and on a terminal a line that is redrawn within the round.

A round takes seconds to minutes, and a terminal that says nothing for so long looks like one that hangs. A log file
would fill with a line that is redrawn, so without a terminal there are the lines per round only, without control
characters. Lightning's own bar counts batches, which here are steps of many clients in processes without a terminal.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

_CLEAR = "\r\x1b[K"  # to the line's beginning, and erase it


class RoundProgress(Callback):
    """Prints a line after each epoch: the metrics asked for, as far as there are any, and the time left.

    Within an epoch, on a terminal, a live line says how far it is, as far as somebody calls ``on_client_progress``.
    It is not drawn where Lightning draws a progress bar.

    Args:
        metrics: names of logged metrics to print, in this order.
        every_n_epochs: print each n-th epoch, and the last one.
        label: what an epoch is called.

    Raises:
        ValueError: ``every_n_epochs`` is below 1.

    Example:
        >>> progress = RoundProgress(metrics=("train_loss", "val_accuracy"), every_n_epochs=5)
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("train_loss", "val_loss", "val_accuracy", "val_perplexity"),
        every_n_epochs: int = 1,
        label: str = "round",
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1; got {every_n_epochs}")
        self._metrics, self._every, self._label = tuple(metrics), every_n_epochs, label
        self._start = 0.0
        self._first = 0
        self._num_bytes = 0.0
        self._clients: str | None = None
        self._done = 0.0  # part of the epoch that is done
        self._score: str | None = None  # of the last validation
        # on_client_progress comes from other threads, and may come late
        self._lock = threading.Lock()
        self._training = self._validating = self._drawn = False

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._start, self._first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        with self._lock:
            self._training, self._clients, self._done = True, None, 0.0
            self._draw(trainer, [])

    def on_client_progress(
        self,
        trainer: "pl.Trainer",
        *,
        steps_done: int,
        steps_total: int,
        clients_done: int,
        num_clients: int,
        loss: float | None,
    ) -> None:
        """Redraw the live line. From any thread; the last call of an epoch is what its own line repeats.

        Args:
            trainer: the Trainer.
            steps_done: steps of all clients in this epoch so far.
            steps_total: steps of all clients in this epoch.
            clients_done: clients that have done all their steps.
            num_clients: clients that take part in this epoch.
            loss: mean training loss of this epoch so far; None if it is not known.
        """
        with self._lock:
            if not self._training or self._validating:
                return
            self._clients = f"clients {clients_done}/{num_clients}"
            self._done = steps_done / max(steps_total, 1)
            parts = [f"steps {steps_done}/{steps_total}", self._clients]
            self._draw(trainer, parts if loss is None else [*parts, f"loss {loss:.4f}"])

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        with self._lock:
            if self._training:  # not in Trainer.validate, nor in the check before training
                self._validating, self._done = True, 1.0
                self._draw(trainer, ["validating"])

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        with self._lock:
            self._validating = False

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        done, total = trainer.current_epoch + 1, trainer.max_epochs
        values = trainer.callback_metrics
        self._num_bytes += sum(float(value) for name, value in values.items() if name.startswith("bytes/"))
        scores = [name for name in self._metrics if name in values and name.startswith("val_")]
        self._score = f"{scores[-1]} {float(values[scores[-1]]):.4f}" if scores else None
        self._end()
        if trainer.is_global_zero and (done % self._every == 0 or done == total):
            print(self.line(trainer, done, total), file=sys.stdout, flush=True)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._end()

    def state_dict(self) -> dict[str, Any]:
        return {"num_bytes": self._num_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_bytes = state_dict["num_bytes"]

    def line(self, trainer: "pl.Trainer", done: int, total: int | None) -> str:
        """The line for the epoch that has just ended."""
        elapsed = time.monotonic() - self._start
        values = trainer.callback_metrics
        parts = [self._title(done, total)]
        parts += [f"{name} {float(values[name]):.4f}" for name in self._metrics if name in values]
        parts += filter(None, [self._clients, self._sent()])
        return "  ".join([*parts, f"{elapsed:.0f} s", *self._left(elapsed, done, total)])

    def _title(self, number: int, total: int | None) -> str:
        return f"{self._label} {number}/{total}" if total and total > 0 else f"{self._label} {number}"

    def _sent(self) -> str | None:
        return f"{self._num_bytes / 1e6:.1f} MB sent" if self._num_bytes else None

    def _left(self, elapsed: float, done: float, total: int | None) -> list[str]:
        """The time left, once there is something to go by."""
        if not total or done >= total or done <= self._first:
            return []
        return [f"{elapsed / (done - self._first) * (total - done):.0f} s left"]

    def _draw(self, trainer: "pl.Trainer", doing: Sequence[str]) -> None:
        """Draw the live line, shortened to the terminal's width. The caller holds the lock."""
        if not trainer.is_global_zero or trainer.progress_bar_callback is not None or not _is_terminal():
            return
        epoch, total = trainer.current_epoch, trainer.max_epochs
        left = self._left(time.monotonic() - self._start, epoch + self._done, total)
        parts = [self._title(epoch + 1, total), *doing, *filter(None, [self._score]), *left]
        parts += filter(None, [self._sent()])
        while len(parts) > 1 and len("  ".join(parts)) >= shutil.get_terminal_size().columns:
            parts.pop()
        # the cursor goes back to the beginning, so that a warning does not start behind the line
        sys.stdout.write(f"{_CLEAR}{'  '.join(parts)}\r")
        sys.stdout.flush()
        self._drawn = True

    def _end(self) -> None:
        """No live line from here on, until the next epoch."""
        with self._lock:
            self._training = False
            if self._drawn:
                sys.stdout.write(_CLEAR)
                sys.stdout.flush()
                self._drawn = False


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
