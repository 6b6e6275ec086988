"""What a run leaves behind: a folder, the adapter in it as a PEFT folder, and the summary."""

import json
import os
import resource
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elsa_pl.errors import ConfigurationError

if TYPE_CHECKING:
    from elsa_pl.tiers import SplitModel

# whose versions a run and a suite say
PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "datasets", "numpy")
_LINKS = (
    "uplink/forward",
    "uplink/backward",
    "downlink/forward",
    "downlink/backward",
    "adapters/up",
    "adapters/down",
    "behaviour/up",
    "calibration/up",
    "calibration/down",
)


def new_folder(parent: Path, suffix: str) -> Path:
    """Name a folder for a run that starts now; it is made when something is written to it."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S") + suffix
    folder, count = parent / name, 1
    while folder.exists():
        count += 1
        folder = parent / f"{name}_{count}"
    return folder


def check_writable(folder: Path) -> None:
    """Refuse a run folder that cannot be made, without making it.

    Raises:
        ConfigurationError: naming what is in the way.
    """
    there = next(path for path in folder.absolute().parents if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is no folder"
        raise ConfigurationError(
            f"expected a run folder that can be made, got {folder}, where {there} {reason}: give another --output_dir"
        )


def export_adapter(module: "SplitModel", folder: Path) -> None:
    """Write the global adapters and the head as a PEFT folder.

    ``PeftModel.from_pretrained(base, folder)`` on the plain base model then computes what the merged model does.

    Args:
        module: after training; it knows how to build the uncut model.
        folder: made if it is not there.
    """
    model = module.build_exported()
    # without this, peft looks a hub up for the base model's embeddings
    model.save_pretrained(str(folder), save_embedding_layers=False)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary` as JSON, whole or not at all: a run that has it has ended well."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    partial.replace(path)


def summarise(
    module: "SplitModel",
    metrics: Mapping[str, Any],
    *,
    seconds: Mapping[str, float],
    adapter: Path | None,
    stage: Literal["test", "val"] = "test",
    tested_round: int | None = None,
) -> dict[str, Any]:
    """The contents of ``summary.json``; its keys are stable.

    Args:
        module: after training.
        metrics: what the test, or the validation, logged, by name.
        seconds: wall seconds of further phases.
        adapter: where the adapter lies.
        stage: which of the two it was.
        tested_round: number of rounds, from 1, behind the adapters that were tested.

    Returns:
        - ``test_accuracy``, ``test_f1`` (macro), ``test_loss``, ``test_perplexity`` of the model in parts, and with
          ``test_merged_`` in front of the merged model; after a validation ``val_accuracy`` and so on. None where
          there is no test or the task has no such figure;
        - ``rounds``: global rounds trained; ``tested_round``: the one whose adapters were tested and exported;
        - ``bytes``: payload bytes by link and direction, over all clients and rounds, and ``total``;
        - ``seconds``: wall seconds by phase;
        - ``peak_bytes``: the most memory that this process has held;
        - ``versions``, ``seed``, ``adapter``.
    """
    prefixes = ("test", "test_merged") if stage == "test" else ("val",)
    names = [f"{prefix}_{figure}" for prefix in prefixes for figure in ("accuracy", "f1", "loss", "perplexity")]
    num_bytes: dict[str, Any] = {}
    for name in _LINKS:
        link, direction = name.split("/")
        num_bytes.setdefault(link, {})[direction] = module.num_bytes[name]
    num_bytes["total"] = sum(module.num_bytes.values())
    return {
        **{name: float(metrics[name]) if name in metrics else None for name in names},
        "rounds": module.num_rounds,
        "tested_round": tested_round,
        "bytes": num_bytes,
        "seconds": {name: round(value, 3) for name, value in {**module.seconds, **seconds}.items()},
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # which Linux counts in KiB
        "versions": {"elsa_pl": version("elsa_pl"), **{package: version(package) for package in PACKAGES}},
        "seed": module.seed,
        "adapter": str(adapter) if adapter else None,
    }
