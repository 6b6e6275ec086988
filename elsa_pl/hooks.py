"""The hooks of ours that callbacks may have beside Lightning's."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl


def hooks(trainer: "pl.Trainer", name: str) -> Iterator[Any]:
    """The callbacks' hooks of a name, in the order of the callbacks; most callbacks have none of ours."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it in a connector
        hook = getattr(callback, name, None)
        if hook is not None:
            yield hook


def asks(trainer: "pl.Trainer", *names: str) -> bool:
    """Whether a callback has one of the hooks."""
    return any(True for name in names for _ in hooks(trainer, name))
