"""The same federated run in Flower and in this project: accuracy, seconds and bytes.

    python -m benchmarks.flower --data_root DATA_ROOT [--seeds 0 1 2] [--rounds 10] [--output runs/flower]
        [--num_clients 10] [--local_steps 5] [--batch_size 16] [--model_per_message]

FedAvg of LoRA adapters and the head on TREC: MiniLM uncut on the client, LoRA of rank 8, 10 clients with
Dirichlet(0.5) labels, 5 local steps of 16 texts a round unless told otherwise, AdamW at 3e-3, made anew in each round.
Clients have the same texts, batches and initial adapters in both systems. What differs is everything else: processes,
messages, rounds, averages (Flower sums in float32 in the order of arrival, this project in float64 in the order of
clients). Flower runs in its simulation with two Ray actors of one CPU; this project in layout tiers with two hosts and
one thread each. Processes beside them wait while clients train. Flower's actors keep their model from client to client,
unless --model_per_message has them make one for each message, as the clients of Flower's own examples do (which also
tokenize their texts for each: that is left out).

The two take turns, seed by seed. Seconds of a round are those of training and averaging, without evaluation, which
Flower does in one process and this project in two, and without checkpoints; the first round is left out, because
Flower's actors load their data in it. Bytes are of adapters: in Flower as it serialises arrays, here as tensors,
counted also between the edge and the cloud, as if that were one more client.

It needs the extra `flower`: ``pip install -e '.[flower]'``, without the constraints, as Flower asks for older
packaging, rich and typer. Three seeds of 6 rounds take 6 to 10 minutes on 2 CPU cores.
Every process that was started is ended, also after Ctrl-C.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.flower import report
from benchmarks.flower.outcome import RUN, Outcome
from benchmarks.flower.processes import ending_on_signals
from benchmarks.flower.task import Task, local_training
from elsa_pl.callbacks import drawing
from elsa_pl.export import new_folder

SIZES = {
    "num_clients": "clients, all in every round",
    "local_steps": "steps of a client in a round",
    "batch_size": "texts in a step",
}
"""What can be had otherwise: of many small steps a system's own share is larger."""


def missing(modules: Iterable[str] = ("flwr", "ray")) -> list[str]:
    """Those of the modules that are not installed."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_root", type=Path, required=True, help="folder of trec/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of each system for each")
    parser.add_argument("--rounds", type=int, default=Task.num_rounds, help="at least 3 (default: %(default)s)")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(Task, name), help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--model_per_message", action="store_true", help="Flower's clients make their model anew for each message"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/flower"), help="where the runs go")
    args = parser.parse_args()
    if absent := missing():
        raise SystemExit(f"error: {' and '.join(absent)} not installed: pip install -e '.[flower]'")
    if args.rounds < 3:
        parser.error(f"expected --rounds >= 3, got {args.rounds}: the first one is left out of the times")
    sizes: dict[str, Any] = {name: getattr(args, name) for name in SIZES}
    for name, size in sizes.items():
        if size < 1:
            parser.error(f"expected --{name} >= 1, got {size}")
    sizes["model_per_message"] = args.model_per_message
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"expected seeds that differ, got {args.seeds}")
    if not (train := args.data_root / "trec" / "train.csv").is_file():
        parser.error(f"expected {train}: see configs/trec.yaml for what it holds")
    output = new_folder(args.output.resolve(), "")
    found: dict[str, dict[int, Outcome]] = {system: {} for system in RUN}
    data_root = str(args.data_root.resolve())
    tasks = {seed: Task(data_root=data_root, seed=seed, num_rounds=args.rounds, **sizes) for seed in args.seeds}
    for seed, task in tasks.items():
        for system, run in RUN.items():
            folder = output / f"{system}-{seed}"
            folder.mkdir(parents=True)
            found[system][seed] = outcome = run(task, folder)
            print(
                f"  {system:<8} seed {seed}: validation {100 * outcome.val_accuracy[-1]:.2f}%,"
                f" test {100 * outcome.test_accuracy:.2f}%, {report.spread(outcome.round_s[1:], 2)} s a round",
                flush=True,
            )
    alone = local_training(tasks[args.seeds[0]]).round_cpu_s()
    what = ", ".join(f"{name} {size}" for name, size in sizes.items()) + ": median (range) over rounds and seeds"
    needed = f"The local steps of a round alone, one client after another in one process: {alone:.2f} CPU s"
    tables = [what, report.cost_table(found), needed, report.accuracy_table(found), report.distance_table(found)]
    text = "\n\n".join(tables)
    print(f"\n{text}\n")
    (output / "tables.txt").write_text(text + "\n")
    rows = [
        {"system": system, "seed": seed, **sizes, **asdict(outcome), "folder": outcome.folder.name}
        for system, runs in found.items()
        for seed, outcome in runs.items()
    ]
    (output / "outcomes.json").write_text(json.dumps(rows, indent=2) + "\n")
    drawing.save(report.draw(found), output / "flower.png")
    print(f"tables, outcomes and picture: {output}")


if __name__ == "__main__":
    with ending_on_signals():
        try:
            main()
        except KeyboardInterrupt:
            print("stopped; nothing is left running", file=sys.stderr)
            sys.exit(130)
