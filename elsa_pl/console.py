"""What a command prints when it starts and when it ends."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsa_pl.datamodules import FederatedTextDataModule
    from elsa_pl.models import Task
    from elsa_pl.strategies import HierarchicalStrategy
    from elsa_pl.tiers import SplitModel

MOST_CLIENTS_IN_TABLE = 20
_MOST_LABELS_IN_TABLE = 20
_LEFT_BEHIND = {
    "report.html": "all of it to look at, in one file",
    "adapter": "the averaged LoRA adapter, in the form that peft reads",
    "checkpoints": "the best round, and last.ckpt to go on from",
    "predictions.csv": "what the model says about each row",
    "metrics.csv": "figures of every round",
    "tensorboard": "the same, for TensorBoard",
    "summary.json": "the outcome",
    "config.yaml": "all settings",
}


def describe(strategy: "HierarchicalStrategy", data: "FederatedTextDataModule", run_dir: Path) -> str:
    """The opening lines of a run: what is trained where, and in simulation whose data looks how."""
    sizes = ", ".join(f"{split} {size}" for split, size in data.split_sizes.items())
    lines = [f"data: {sizes}" + (f"; {data.num_labels} labels" if data.num_labels else "")]
    if strategy.layout != "site":
        lines.append(
            f"{len(data.client_names)} clients, {strategy.num_edges} edges, layout {strategy.layout};"
            f" {strategy.edge_rounds} x {strategy.local_steps} local steps a round"
        )
        histogram = data.label_histogram
        for client in data.client_names[:MOST_CLIENTS_IN_TABLE]:
            counts = histogram[client]
            shown = f"of {sum(map(bool, counts))} labels" if len(counts) > _MOST_LABELS_IN_TABLE else str(counts or "")
            lines.append(f"  {client}: {data.client_sizes[client]} examples  {shown}")
        more = len(data.client_names) - MOST_CLIENTS_IN_TABLE
        if more > 0:
            lines.append(f"  and {more} more")
        lines.append(f"run folder: {run_dir}")
    return "\n".join(lines)


def figures(summary: dict[str, Any], prefix: str) -> str:
    """The figures of one evaluation that there are, on one line.

    Example:
        >>> figures({"test_accuracy": 0.5, "test_f1": None, "test_merged_accuracy": 0.5}, "test")
        'test_accuracy 0.5000'
    """
    names = [f"{prefix}_{figure}" for figure in ("accuracy", "f1", "loss", "perplexity")]
    return "  ".join(f"{name} {summary[name]:.4f}" for name in names if summary.get(name) is not None)


def closing(summary: dict[str, Any], run_dir: Path, model: "SplitModel") -> str:
    """The closing lines of a run: figures, where everything lies, and how the adapter is loaded.

    Args:
        summary: see `elsa_pl.export.summarise`.
        run_dir: where everything lies.
        model: what was trained or evaluated.
    """
    lines = ["", *filter(None, (figures(summary, prefix) for prefix in ("val", "test", "test_merged")))]
    if len(lines) == 1:
        lines.append("no test data")
    adapter = summary["adapter"]
    if adapter is not None:
        sent = summary["bytes"]
        lines.append(
            f"{summary['rounds']} rounds in {summary['seconds']['total']:.0f} s; {sent['total'] / 1e6:.1f} MB sent,"
            " validation included"
        )
        for link in (link for link, ways in sent.items() if link != "total" and any(ways.values())):
            lines.append(f"  {link}: " + ", ".join(f"{way} {count / 1e6:.1f} MB" for way, count in sent[link].items()))
    found = {str(run_dir / name): what for name, what in _LEFT_BEHIND.items() if (run_dir / name).exists()}
    lines += ["", *(f"{path:<{max(map(len, found))}}  {what}" for path, what in found.items())]
    if adapter is not None and model.model_name is not None:  # random weights have no name to load them by
        lines += ["", *loading_lines(model.model_name, model.task, model.num_labels, Path(adapter).resolve())]
    return "\n".join(lines)


def loading_lines(model: str, task: "Task", num_labels: int | None, adapter: Path) -> list[str]:
    """Lines of Python that load a base model and an adapter; they run as they stand.

    Example:
        >>> loading_lines("gpt2", "causal_lm", None, Path("/tmp/adapter"))[1]
        'base = AutoModelForCausalLM.from_pretrained("gpt2")'
    """
    auto = "AutoModelForSequenceClassification" if task == "classification" else "AutoModelForCausalLM"
    imports, base = f"from peft import PeftModel; from transformers import {auto}", f'"{model}"'
    if model.startswith("bundled:"):
        imports, base = f"{imports}; from elsa_pl.models import resolve_model", f"resolve_model({base})"
    labels = f", num_labels={num_labels}" if task == "classification" else ""
    return [
        imports,
        f"base = {auto}.from_pretrained({base}{labels})",
        f'model = PeftModel.from_pretrained(base, "{adapter}")',
    ]
