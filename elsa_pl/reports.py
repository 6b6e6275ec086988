"""What a command prints when it starts and when it ends."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsa_pl.datamodules import FederatedTextDataModule
    from elsa_pl.strategies import HierarchicalStrategy

MOST_CLIENTS_IN_TABLE = 20


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
            lines.append(f"  {client}: {data.client_sizes[client]} examples  {histogram[client] or ''}")
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


def closing(summary: dict[str, Any], run_dir: Path, *, trained: bool) -> str:
    """The closing lines of a run: figures, and where everything lies.

    Args:
        summary: see `elsa_pl.export.summarise`.
        run_dir: where it lies.
        trained: whether this run also trained and sent something.
    """
    lines = ["", *filter(None, (figures(summary, prefix) for prefix in ("val", "test", "test_merged")))]
    if len(lines) == 1:
        lines.append("no test data")
    if trained:
        sent = summary["bytes"]
        for link in ("uplink", "downlink", "adapters"):
            lines.append(f"{link}: " + ", ".join(f"{way} {count / 1e6:.1f} MB" for way, count in sent[link].items()))
        lines.append(
            f"{summary['rounds']} rounds in {summary['seconds']['total']:.0f} s, {sent['total'] / 1e6:.1f} MB sent"
        )
        lines.append(f"adapter: {summary['adapter']}")
    lines.append(f"summary: {run_dir / 'summary.json'}")
    return "\n".join(lines)
