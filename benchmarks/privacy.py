"""What does an edge, or a reader of the link, make of what crosses, and what does hiding it cost in accuracy?

    python -m benchmarks.privacy --data_root DATA_ROOT [--rows "1|4|1" "4|1|1, first" ...] [--seeds 0 1 2]

TREC, trained as in `benchmarks.links`, but for 200 training texts that are held out. Attackers know 2,000 of the other
training texts and see what an edge gets of the held-out ones after the last round. Recovery is the share of their
tokens that the best attacker of ``PrivacyAudit`` finds, [CLS] and [SEP] not counted; of the edge, and of a reader of
the link where that sees something else; ``by`` is the attacker that finds most over all seeds. ``blind`` sees no state
and guesses by position, and by length where the attention mask shows it: no defence brings the best below it. MB are
those of states and gradients in training, those of validation included.

The picture ``frontier.png`` in ``--output`` shows the rows that were asked for.

Finished runs with the same settings are found again in ``--output``: use a fresh folder after a change of the code.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from benchmarks import links
from benchmarks.links import BATCH_SIZE, ROUNDS, Row, callback, learned
from benchmarks.runs import Settings, all_of, several, summary
from elsa_pl.callbacks.drawing import DARK, FONT_PT, label_points, new_figure, save, style, title
from elsa_pl.functional.pooling import TokenPooling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD_OUT, PUBLIC = 200, 2000


ROWS = {
    "1|4|1": Row(),
    "1|4|1, noise 1": Row((callback("LinkNoise", scale=1.0),)),
    "1|4|1, noise 2": Row((callback("LinkNoise", scale=2.0),)),
    "1|4|1, learned 16 + int4": Row(learned(16, 4, 8)),
    "1|4|1, SS-OP 64": Row((callback("SSOP", rank=64),)),
    "1|4|1, SS-OP 383": Row((callback("SSOP", rank=383),)),
    "1|4|1, int4, encrypted": Row((callback("LinkQuantization", bits=4), callback("LinkEncryption"))),
    "1|4|1, groups of 4": Row((), 1, TokenPooling(4)),
    "2|3|1": Row((), 2),
    "3|2|1": Row((), 3),
    "4|1|1": Row((), 4),
    "4|1|1, groups of 4": Row((), 4, TokenPooling(4)),
    "4|1|1, first and mean": Row((), 4, TokenPooling(64)),
    "4|1|1, first and mean, learned 4 + int4": Row(learned(4, 4, 16), 4, TokenPooling(64)),
    "4|1|1, first and mean, learned 32 + int4": Row(learned(32, 4, 4), 4, TokenPooling(64)),
    "4|1|1, first and mean, learned 64 + int4": Row(learned(64, 4, 6), 4, TokenPooling(64)),
    "4|1|1, first and mean, learned 128 + int4": Row(learned(128, 4, 3), 4, TokenPooling(64)),
    "3|2|1, first and mean, learned 4 + int4": Row(learned(4, 4, 16), 3, TokenPooling(64)),
    "3|2|1, first, learned 4 + int4": Row(learned(4, 4, 8), 3, TokenPooling("first")),
    "4|1|1, first": Row((), 4, TokenPooling("first")),
    "4|1|1, first, learned 4 + int4": Row(learned(4, 4, 8), 4, TokenPooling("first")),
    "4|1|1, first, learned 16 + int4": Row(learned(16, 4, 8), 4, TokenPooling("first")),
}


def divide(data_root: Path, output: Path) -> dict[str, Path]:
    """Write the files of the training texts, those held out, and those that attackers know."""
    files = {name: output / f"{name}.csv" for name in ("train", "held_out", "public")}
    texts = pd.read_csv(data_root / "trec" / "train.csv").sample(frac=1, random_state=0)
    parts = texts[HELD_OUT:].sort_index(), texts[:HELD_OUT], texts[["text"]][HELD_OUT : HELD_OUT + PUBLIC]
    for path, part in zip(files.values(), parts, strict=True):
        part.to_csv(path, index=False)
    return files


def settings_of(data_root: Path, output: Path, files: dict[str, Path], row: Row, seed: int) -> Settings:
    """The settings of one run."""
    audit = callback(
        "PrivacyAudit", num_texts=HELD_OUT, public_file=str(files["public"]), every_n_rounds=ROUNDS, pictures=False
    )
    num_train = len(pd.read_csv(files["train"]))
    return {
        **links.settings_of(data_root, output, "trec", row._replace(callbacks=(*row.callbacks, audit)), seed),
        "data.train_file": str(files["train"]),
        "data.validation_file": str(files["held_out"]),
        "data.validation_fraction": 0.0,
        "trainer.limit_val_batches": 1.0,
        "trainer.strategy.init_args.local_steps": math.ceil(num_train / BATCH_SIZE),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_root", type=Path, required=True, help="folder of trec/ and banking77/")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/privacy"), help="where the runs go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    output, data_root = args.output.resolve(), args.data_root.resolve()
    files = divide(data_root, output)
    names = {
        (row, seed): f"{row.replace('|', '').replace(', ', '-').replace(' ', '')}-{seed}"
        for row in args.rows
        for seed in args.seeds
    }
    jobs = [(name, settings_of(data_root, output, files, ROWS[row], seed)) for (row, seed), name in names.items()]
    folders = all_of(jobs, output)
    columns = {
        "test accuracy": 26,
        "edge reads": 26,
        "by": 26,
        "link reads": 12,
        "blind": 8,
        "MB, validation included": 26,
    }
    print(f"\n{'cut and link':<36}" + "".join(f"{title:>{width}}" for title, width in columns.items()))
    points, blinds = {}, []
    for row in args.rows:
        runs = [folders[names[row, seed]] for seed in args.seeds]
        shares = [pd.read_csv(run / "privacy.csv").set_index(["reader", "what"])["share"] * 100 for run in runs]
        readers = set(shares[0].index.get_level_values("reader"))
        accuracies = [100 * summary(run)["test_accuracy"] for run in runs]
        read = [share["edge"].max() for share in shares]
        blinds.append(statistics.mean(share["edge", "blind"] for share in shares))
        sent = statistics.mean(summary(run)["bytes"]["total"] for run in runs) / 1e6
        points[row] = statistics.mean(read), statistics.mean(accuracies), sent
        cells = [
            several(accuracies, 1),
            several(read, 1),
            pd.concat([share["edge"] for share in shares], axis=1).mean(axis=1).idxmax(),
            f"{statistics.mean(share['link' if 'link' in readers else 'edge'].max() for share in shares):.1f}",
            f"{blinds[-1]:.1f}",
            f"{sent:.1f}",
        ]
        print(f"{row:<36}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, columns.values(), strict=True)))
    print(f"picture: {save(draw(points, blinds), output / 'frontier.png')}")


def draw(points: dict[str, tuple[float, float, float]], blinds: Sequence[float]) -> "Figure":
    """Accuracy against what an edge reads, coloured by what was sent.

    Args:
        points: tokens read and accuracy, in per cent, and MB; by name.
        blinds: tokens found without seeing any state, in per cent; more where lengths show.
    """
    figure = new_figure(8.0, 5.0)
    axes, bar = figure.subplots(1, 2, width_ratios=[40, 1])
    read, accuracy, sent = np.array(list(points.values())).T
    marks = np.arange(math.floor(np.log10(sent.min())), math.ceil(np.log10(sent.max())) + 1)
    look = {"cmap": "viridis", "vmin": marks[0], "vmax": marks[-1], "s": 50, "edgecolors": DARK, "linewidths": 0.7}
    drawn = axes.scatter(read, accuracy, c=np.log10(sent), **look)
    half_way = np.mean(axes.get_ylim())
    for blind in sorted({round(min(blinds), 1), round(max(blinds), 1)}):
        axes.axvline(blind, color="#999999", linestyle=":", linewidth=1)
    axes.annotate("seeing no state", (min(blinds), half_way), rotation=90, fontsize=FONT_PT, ha="right", va="top")
    axes.set(xlim=(0, 100), xlabel="held-out tokens that the best attacker at the edge recovers, %")
    axes.set_ylabel("test accuracy, %")
    style(axes)
    scale = figure.colorbar(drawn, cax=bar)
    scale.set_ticks(marks.tolist(), labels=[f"{10.0**mark:g}" for mark in marks])
    scale.set_label("MB, validation included")
    style(bar)
    title(figure, "Up and left is better: accuracy, and what an edge reads of held-out texts (TREC)")
    short = [name.replace(" and mean", "+mean").replace("learned ", "1/").replace(" + int4", "") for name in points]
    label_points(axes, np.column_stack([read, accuracy]), short, np.full(len(read), 4.0))
    return figure


if __name__ == "__main__":
    main()
