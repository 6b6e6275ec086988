"""What do compressed links cost in accuracy, and what do they save?

    python -m benchmarks.links --data_root DATA_ROOT [--data_sets trec] [--rows plain int8 ...] [--seeds 0 1 2]

One client and one edge, MiniLM cut 1|4|1 (4|1|1 where only the first token's state goes on), LoRA of rank 8, AdamW
from 1e-3 to 0, gradients clipped to norm 1, batches of 32, three passes over the training texts: central training, but
for what the links lose. Probes are 256 texts of another data set. Bytes are those of training: both links, both
directions, adapters and calibration; the ratio is that to the plain run of the same seed.
Accuracies are of the last round, on the test texts; differences to the plain run are paired by seed, with a 95%
interval (Student's t) from three seeds on.

Finished runs with the same settings are found again in ``--output``: use a fresh folder after a change of the code.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import t

from benchmarks.runs import Settings, all_of, several, summary
from elsa_pl.functional.pooling import TokenPooling

NUM_PROBES, BATCH_SIZE, ROUNDS = 256, 32, 3
PROBES_FROM = {"trec": "banking77", "banking77": "trec"}


def callback(name: str, **settings: Any) -> dict[str, Any]:
    """One entry of ``trainer.callbacks``."""
    return {"class_path": name, "init_args": settings}


class Row(NamedTuple):
    """What is done to the links, the blocks of the front (the tail has one), and which tokens go on behind it."""

    callbacks: tuple[dict[str, Any], ...] = ()
    front: int = 1
    pooling: TokenPooling = TokenPooling()


def learned(ratio: int, bits: int, block: int) -> tuple[dict[str, Any], ...]:
    """A projection that trains, and what follows it."""
    return callback("LinkProjection", ratio=ratio), callback("LinkQuantization", bits=bits, block=block)


REUSE = callback("LinkReuse", threshold=0.2, capacity=6000)

ROWS = {
    "plain": Row(),
    "int8": Row((callback("LinkQuantization", bits=8),)),
    "int4": Row((callback("LinkQuantization", bits=4),)),
    **{
        f"{decoder} {ratio}": Row((callback("SketchCompression", ratio=ratio, decoder=decoder),))
        for decoder in ("median", "calibrated")
        for ratio in (2, 4, 8)
    },
    "principal 4": Row((callback("LinkProjection", ratio=4, learn=False),)),
    "learned 4 + int4": Row(learned(4, 4, 16)),
    "learned 8 + int4": Row(learned(8, 4, 16)),
    "learned 16 + int4": Row(learned(16, 4, 8)),
    "first and mean, learned 4 + int4": Row(learned(4, 4, 16), 4, TokenPooling(64)),
    "first and mean, learned 2 + int8": Row(learned(2, 8, 32), 4, TokenPooling(64)),
    "int4, reuse": Row((REUSE, callback("LinkQuantization", bits=4))),
    "first token, learned 2 + int8": Row(learned(2, 8, 32), 4, TokenPooling("first")),
    "first token, learned 4 + int4": Row(learned(4, 4, 8), 4, TokenPooling("first")),
}


def settings_of(data_root: Path, output: Path, data_set: str, row: Row, seed: int) -> Settings:
    """The settings of one run."""
    probe_file = output / f"probes-{PROBES_FROM[data_set]}.csv"
    if not probe_file.exists():
        texts = pd.read_csv(data_root / PROBES_FROM[data_set] / "train.csv")[["text"]]
        texts.sample(NUM_PROBES, random_state=0).to_csv(probe_file, index=False)
    train_file = data_root / data_set / "train.csv"
    return {
        "model.model": "bundled:all-MiniLM-L6-v2",
        "model.plan": {"front": row.front, "middle": 5 - row.front, "tail": 1},
        **({"model.token_pooling": asdict(row.pooling)} if row.pooling else {}),
        "model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
        "model.lr_schedule": "linear",
        "model.gradient_clip_val": 1.0,
        "seed_everything": seed,
        "data.train_file": str(train_file),
        "data.test_file": str(data_root / data_set / "test.csv"),
        "data.probe_file": str(probe_file),
        "data.num_clients": 1,
        "data.validation_fraction": 0.02,
        "data.batch_size": BATCH_SIZE,
        "data.max_length": 64,
        "trainer.max_epochs": ROUNDS,
        "trainer.limit_val_batches": 0,  # the last round is tested
        "trainer.callbacks": list(row.callbacks),
        "trainer.strategy.init_args.layout": "single",
        "trainer.strategy.init_args.local_steps": math.ceil(0.98 * len(pd.read_csv(train_file)) / BATCH_SIZE),
        "trainer.strategy.init_args.passes_in_flight": 1,
        "trainer.strategy.init_args.reset_optimizer": False,
    }


def difference(values: Sequence[float], plain: Sequence[float]) -> str:
    """The mean of paired differences, with a 95% interval from three pairs on."""
    pairs = [value - other for value, other in zip(values, plain, strict=True)]
    mean = statistics.mean(pairs)
    if len(pairs) < 3:
        return f"{mean:+.2f}"
    half = t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_root", type=Path, required=True, help="folder of trec/ and banking77/")
    parser.add_argument("--data_sets", nargs="+", default=["trec"], choices=list(PROBES_FROM))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/links"), help="where the runs go")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    output, data_root = args.output.resolve(), args.data_root.resolve()
    rows = ["plain", *(row for row in args.rows if row != "plain")]
    cells = [(data_set, row, seed) for data_set in args.data_sets for seed in args.seeds for row in rows]
    names = {cell: f"{cell[0]}-{cell[1].replace(' ', '').replace(',', '-')}-{cell[2]}" for cell in cells}
    jobs = [(names[cell], settings_of(data_root, output, cell[0], ROWS[cell[1]], cell[2])) for cell in cells]
    folders = all_of(jobs, output)
    found = {cell: summary(folders[names[cell]]) for cell in cells}
    print(f"\n{'links':<32}{'test accuracy':>36}{'to plain, points':>26}{'MB':>9}{'less by':>9}")
    for data_set in args.data_sets:
        plain = [found[data_set, "plain", seed] for seed in args.seeds]
        reference = [100 * run["test_accuracy"] for run in plain]
        for row in rows:
            runs = [found[data_set, row, seed] for seed in args.seeds]
            accuracies = [100 * run["test_accuracy"] for run in runs]
            sent = statistics.mean(run["bytes"]["total"] for run in runs)
            ratio = statistics.mean(run["bytes"]["total"] for run in plain) / sent
            print(
                f"{data_set + ', ' + row:<32}{several(accuracies, 1):>36}{difference(accuracies, reference):>26}"
                f"{sent / 1e6:>9.1f}{ratio:>8.1f}x"
            )


if __name__ == "__main__":
    main()
