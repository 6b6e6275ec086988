"""What a run leaves behind: the adapter as a PEFT folder, and the summary."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from elsa_pl.tiers import SplitModel

_PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "datasets", "numpy")
_LINKS = ("uplink/forward", "uplink/backward", "downlink/forward", "downlink/backward", "adapters/up", "adapters/down")


def export_adapter(module: "SplitModel", folder: Path) -> None:
    """Write the global adapters and the head as a PEFT folder.

    ``PeftModel.from_pretrained(base, folder)`` on the plain base model then computes what the merged model does.

    Args:
        module: after training; it knows how to build the uncut model.
        folder: made if it is not there.
    """
    model = module.build()
    parameters = {name: value for name, value in model.get_base_model().named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in module.global_adapters().items():
            parameters[name].copy_(value)
    # without this, peft looks a hub up for the base model's embeddings
    model.save_pretrained(str(folder), save_embedding_layers=False)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary` as JSON."""
    path.write_text(json.dumps(summary, indent=2) + "\n")


def summarise(
    module: "SplitModel",
    metrics: Mapping[str, Any],
    *,
    seconds: Mapping[str, float],
    adapter: Path | None,
) -> dict[str, Any]:
    """The contents of ``summary.json``; its keys are stable.

    Args:
        module: after training.
        metrics: what the test logged, by name.
        seconds: wall seconds of further phases.
        adapter: where the adapter lies.

    Returns:
        - ``test_accuracy``, ``test_f1`` (macro), ``test_loss``, ``test_perplexity``: None where there is no test or
          the task has no such figure;
        - ``rounds``: global rounds trained;
        - ``bytes``: payload bytes by link and direction, over all clients and rounds, and ``total``;
        - ``seconds``: wall seconds by phase;
        - ``versions``, ``seed``, ``adapter``.
    """
    names = ("test_accuracy", "test_f1", "test_loss", "test_perplexity")
    num_bytes: dict[str, Any] = {}
    for name in _LINKS:
        link, direction = name.split("/")
        num_bytes.setdefault(link, {})[direction] = module.num_bytes[name]
    num_bytes["total"] = sum(module.num_bytes.values())
    return {
        **{name: float(metrics[name]) if name in metrics else None for name in names},
        "rounds": module.num_rounds,
        "bytes": num_bytes,
        "seconds": {name: round(value, 3) for name, value in {**module.seconds, **seconds}.items()},
        "versions": {"elsa_pl": version("elsa_pl"), **{package: version(package) for package in _PACKAGES}},
        "seed": module.seed,
        "adapter": str(adapter) if adapter else None,
    }
