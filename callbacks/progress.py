"""One line per round on the terminal: works in a log file as well, since it uses no control characters."""

import sys
import time
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class RoundProgress(Callback):
    """Prints a line after each epoch: the metrics asked for, as far as there are any, and the time left.

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

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._start, self._first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        done, total = trainer.current_epoch + 1, trainer.max_epochs
        if not trainer.is_global_zero or (done % self._every and done != total):
            return
        print(self.line(trainer, done, total), file=sys.stdout, flush=True)

    def line(self, trainer: "pl.Trainer", done: int, total: int | None) -> str:
        """The line for the epoch that has just ended."""
        elapsed = time.monotonic() - self._start
        known = bool(total and total > 0)
        parts = [f"{self._label} {done}/{total}" if known else f"{self._label} {done}"]
        values = trainer.callback_metrics
        parts += [f"{name} {float(values[name]):.4f}" for name in self._metrics if name in values]
        sent = sum(float(value) for name, value in values.items() if name.startswith("bytes/"))
        if sent:
            parts.append(f"{sent / 1e6:.1f} MB sent")
        parts.append(f"{elapsed:.0f} s")
        if known and total is not None and total > done:
            parts.append(f"{elapsed / (done - self._first) * (total - done):.0f} s left")
        return "  ".join(parts)
