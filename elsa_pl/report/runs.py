"""The report of one run, from what lies in its folder and nothing else: it can be made again years later."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from elsa_pl.errors import ConfigurationError
from elsa_pl.report.curves import AXES, draw_bars, draw_lines, of_one
from elsa_pl.report.page import Cell, Page, Picture, Section, Table, draw, embed, number, text

_CLIENTS = {
    "clients.png": "Clients that behave alike lie close together",
    "divergences.png": "Divergence of each pair of clients, ordered by cluster",
    "assignment.png": "Latency against behaviour of the assignments to edges",
}


def write_run_report(run_dir: Path) -> Path:
    """Write ``report.html`` into the folder of a run, and its pictures into ``pictures/``; returns the page's path.

    Args:
        run_dir: with ``summary.json``; what else is there is shown.

    Raises:
        ConfigurationError: no summary, or what is none.
    """
    path = run_dir / "summary.json"
    if not path.is_file():
        raise ConfigurationError(f"expected a run that has ended in {run_dir}; got no summary.json: name its folder")
    try:
        summary = json.loads(path.read_text())
        missing = [name for name in ("rounds", "seed", "seconds", "bytes", "versions") if name not in summary]
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is no summary of a run: {error}: run it again") from error
    if missing:
        raise ConfigurationError(f"{path} lacks {', '.join(missing)}: run it again")
    metrics = _metrics(run_dir / "metrics.csv")
    page = Page(
        title=f"{run_dir.parent.name}, {run_dir.name}", subtitle=_subtitle(run_dir, summary), figures=_figures(summary)
    )
    last = _audited(run_dir)
    tokens = pd.Series(dtype=float) if last is None else last["share"][last["reader"] != "labels"]
    if tokens.notna().any():
        page.figures.append((f"{100 * tokens.max():.1f}%", "of tokens read by the best attacker"))
    for section in (
        _accuracy(run_dir, metrics),
        _clients(run_dir),
        _trust(run_dir),
        _traffic(run_dir, summary),
        _privacy(run_dir),
    ):
        if section is not None:
            page.sections.append(section)
    config = run_dir / "config.yaml"
    if config.is_file():
        page.details.append(("config.yaml", config.read_text()))
    page.details.append(("versions", "\n".join(f"{name} {found}" for name, found in summary["versions"].items())))
    return page.write(run_dir / "report.html")


def _subtitle(run_dir: Path, summary: dict[str, Any]) -> str:
    """What was run, in a sentence, as far as its settings say."""
    said = f"{summary['rounds']} rounds, seed {summary['seed']}; elsa_pl {summary['versions']['elsa_pl']}"
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text()) if path.is_file() else {}
    model, data, trainer = (config.get(part) or {} for part in ("model", "data", "trainer"))
    strategy = trainer.get("strategy")
    arguments = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    parts = [
        model.get("model") or (model.get("model_config") or {}).get("model_type"),
        data.get("dataset") or data.get("train_file"),
        f"{data['num_clients']} clients, {data.get('partition')}" if data.get("num_clients") else None,
        f"{arguments['num_edges']} edges" if arguments.get("num_edges") else None,
        ", ".join(
            callback["class_path"].rpartition(".")[2]
            for callback in trainer.get("callbacks") or []
            if isinstance(callback, dict) and "class_path" in callback
        ),
    ]
    return "; ".join([said, *(str(part) for part in parts if part)])


def _figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    def percent(name: str) -> str | None:
        return None if summary.get(name) is None else f"{100 * summary[name]:.1f}%"

    def score(name: str) -> str | None:
        return None if summary.get(name) is None else f"{summary[name]:.1f}"

    seconds, peak = summary["seconds"], summary.get("peak_bytes")
    trained = "" if _trained(summary) else ", of the training behind it"
    found = [
        (percent("val_accuracy"), "validation accuracy"),
        (score("val_perplexity"), "validation perplexity"),
        (percent("test_accuracy"), "test accuracy"),
        (percent("test_merged_accuracy"), "test accuracy, adapters merged into the uncut model"),
        (score("test_perplexity"), "test perplexity"),
        (None if summary.get("tested_round") is None else str(summary["tested_round"]), "round that was tested"),
        (f"{summary['bytes']['total'] / 1e6:,.1f} MB", f"sent, validation included{trained}"),
        (f"{seconds['simulated']:,.0f} s" if "simulated" in seconds else None, f"simulated time{trained}"),
        (f"{seconds['total']:,.0f} s", "time of the run"),
        (f"{peak / 1e9:.1f} GB" if peak else None, "peak memory, first process"),
    ]
    return [(value, what) for value, what in found if value is not None]


def _trained(summary: dict[str, Any]) -> bool:
    """Whether the run is one of fit; others have the bytes and rounds of the run whose adapters they took."""
    return summary.get("adapter") is not None


def _metrics(path: Path) -> pd.DataFrame:
    """A row for each round that was trained; empty where another logger has the figures."""
    if not path.is_file():
        return pd.DataFrame()
    table = pd.read_csv(path)
    rounds = table.drop(columns="step").groupby("epoch").max().reset_index()
    return rounds[rounds["train_loss"].notna()] if "train_loss" in rounds else pd.DataFrame()


def _accuracy(run_dir: Path, metrics: pd.DataFrame) -> Section | None:
    if metrics.empty:
        return None
    section = Section("Training")
    rounds = metrics["epoch"] + 1
    heights, what = 100 * metrics.get("val_accuracy", pd.Series(dtype=float)), "validation accuracy [%]"
    if heights.empty or heights.isna().all():
        heights, what = metrics["train_loss"], "training loss"
    sent = metrics[[name for name in metrics if name.startswith("bytes/")]].sum(axis=1).cumsum() / 1e6
    axes = [("rounds", rounds), ("bytes", sent)]
    if "simulated/time_s" in metrics:
        axes.append(("simulated", metrics["simulated/time_s"]))
    for name, places in axes:
        label, against = AXES[name]
        title = f"{what.removesuffix(' [%]').capitalize()} against {against}"
        figure = draw_lines({"run": of_one(places, heights)}, x=label, y=what, title=title)
        section.pictures.append(draw(figure, run_dir / "pictures" / f"accuracy-{name}", f"{what} against {label}"))
    losses = {
        name: of_one(rounds, metrics[column])
        for name, column in (("training", "train_loss"), ("validation", "val_loss"))
        if column in metrics and metrics[column].notna().any()
    }
    figure = draw_lines(losses, x="global round", y="loss", title="Loss")
    section.pictures.append(draw(figure, run_dir / "pictures" / "loss", "loss against rounds"))
    return section


def _clients(run_dir: Path) -> Section | None:
    section = Section("Clients")
    path = run_dir / "clients.csv"
    if path.is_file():
        table = pd.read_csv(path)
        columns = [name for name in table if table[name].notna().any()]
        rows = [[_cell(name, row[name]) for name in columns] for _, row in table.iterrows()]
        section.tables.append(Table([_HEADS.get(name, name) for name in columns], rows))
    section.pictures += [embed(run_dir / name, alt) for name, alt in _CLIENTS.items() if (run_dir / name).is_file()]
    return section if section.tables or section.pictures else None


_HEADS = {"up_bytes": "sent [MB]", "down_bytes": "received [MB]"}


def _cell(name: str, value: Any) -> Cell:
    if name in ("client", "edge", "plan", "fault", "device"):
        return text(value)
    if name.endswith("_bytes"):
        return number(value, 2, 1e-6)
    return number(value, 2 if name == "trust" else 0)


def _trust(run_dir: Path) -> Section | None:
    path = run_dir / "trust.png"
    if not path.is_file():
        return None
    return Section("Trust", pictures=[embed(path, "trust of each client over the rounds", wide=True)])


def _traffic(run_dir: Path, summary: dict[str, Any]) -> Section | None:
    sent = {link: ways for link, ways in summary["bytes"].items() if link != "total" and any(ways.values())}
    if not sent or not _trained(summary):
        return None
    rows = [
        [text(link), text(way), number(count, 2, 1e-6)] for link, ways in sent.items() for way, count in ways.items()
    ]
    bars = {f"{link}, {way}": {"MB": count / 1e6} for link, ways in sent.items() for way, count in ways.items()}
    figure = draw_bars(bars, x="payload of the whole run [MB]", title="Traffic by link and direction")
    picture = draw(figure, run_dir / "pictures" / "traffic", "payload bytes by link and direction")
    tables = [Table(["link", "direction", "payload [MB]"], rows)]
    path = run_dir / "traffic.csv"
    if path.is_file():
        table = pd.read_csv(path)
        columns = [name for name in ("payload_bytes", "wire_bytes") if name in table]
        totals = table.groupby(["phase", "link", "direction"])[["messages", *columns]].sum().reset_index()
        lines = [
            [
                *(text(row[name]) for name in ("phase", "link", "direction")),
                number(row["messages"], 0),
                *(number(row[name], 2, 1e-6) for name in columns),
            ]
            for _, row in totals.iterrows()
        ]
        heads = ["phase", "link", "direction", "messages", *(f"{name.removesuffix('_bytes')} [MB]" for name in columns)]
        tables.append(Table(heads, lines, "messages, as CommunicationMonitor counted them"))
    return Section("Traffic", pictures=[picture], tables=tables)


def _audited(run_dir: Path) -> pd.DataFrame | None:
    """What attackers read in the last round that was audited."""
    path = run_dir / "privacy.csv"
    if not path.is_file():
        return None
    table = pd.read_csv(path)
    return table[table["round"] == table["round"].max()]


def _privacy(run_dir: Path) -> Section | None:
    last = _audited(run_dir)
    if last is None:
        return None
    rows = [
        [text(row["reader"]), text(row["what"]), number(row["share"], 1, 100, "%"), number(row["floor"], 1, 100, "%")]
        for _, row in last.iterrows()
    ]
    pictures: list[Picture] = []
    if (run_dir / "privacy.png").is_file():
        pictures.append(embed(run_dir / "privacy.png", "accuracy against the tokens that attackers read", wide=True))
    said = "What attackers read of private texts after the last audited round. The attacker blind sees no states."
    section = Section("Privacy", said, pictures)
    section.tables.append(Table(["reader", "attack", "read", "by always saying the commonest"], rows))
    return section
