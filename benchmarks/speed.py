"""How fast and how large split training is, against the uncut model and against torch's own pipeline.

    python -m benchmarks.speed [--repeats 5] [--output bench.json]

Every figure comes from whole commands in processes of their own, as a user starts them. The modes take turns, and a
figure is the median of the repeats, since timings on a shared machine drift.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import step_overhead
from benchmarks.setting import (
    BATCH_SIZE,
    MICRO_BATCHES,
    MODEL,
    NUM_TOKENS,
    PLAN,
    STEPS,
    TOKENS_PER_STEP,
    write_texts,
)
from elsa_pl.rpc.lifecycle import free_port

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300
MODES = ("uncut_1_thread", "tiers_1_client", "tiers_4_clients", "pipelining")


@dataclass
class Bench:
    """The commands, and what they showed.

    Attributes:
        folder: for texts and runs.
        tokens_per_s: of each mode, by repeat.
        startup_s: from each command to its first step.
        peak_mb: of a host, by number of clients.
    """

    folder: Path
    tokens_per_s: dict[str, list[float]] = field(default_factory=dict)
    startup_s: list[float] = field(default_factory=list)
    peak_mb: dict[int, list[float]] = field(default_factory=dict)

    @property
    def texts(self) -> Path:
        """The data of all modes."""
        return self.folder / "texts.csv"

    def run(self, mode: str) -> None:
        """Run one mode once and note its figures."""
        if mode == "tiers_1_client":
            speed = self.tiers(num_clients=1, micro_batches=MICRO_BATCHES)
        elif mode == "tiers_4_clients":
            speed = self.tiers(num_clients=4, micro_batches=1)
        elif mode == "pipelining":
            launch = ["torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
            port = f"--master_port={free_port()}"
            speed = float(_python("-m", *launch, port, "-m", "benchmarks.pipelining", str(self.texts)).split()[-1])
        else:
            speed = float(_python("-m", "benchmarks.uncut", str(self.texts)).split()[-1])
        self.tokens_per_s.setdefault(mode, []).append(speed)

    def tiers(self, num_clients: int, micro_batches: int, rounds: int = 2) -> float:
        """Two processes, cloud and edge in one, the clients in the other: tokens/s after the first, shorter round."""
        out = Path(tempfile.mkdtemp(dir=self.folder))
        strategy = "--trainer.strategy.init_args."
        steps = max(1, STEPS // num_clients)
        started = time.time()
        _python(
            "train.py",
            *("fit", "--output_dir", str(out), "--name", "bench", "--model.model", MODEL),
            *(
                "--model.plan",
                json.dumps(PLAN),
                "--data.train_file",
                str(self.texts),
                "--data.validation_fraction",
                "0",
            ),
            *("--data.max_length", str(NUM_TOKENS), "--data.batch_size", str(BATCH_SIZE)),
            *("--data.num_clients", str(num_clients), "--data.partition", "iid"),
            *("--trainer.max_epochs", str(rounds), f"{strategy}layout", "tiers", f"{strategy}local_steps", str(steps)),
            *(f"{strategy}micro_batches", str(micro_batches), "--checkpoint.save_top_k", "0"),
            *("--trainer.callbacks+=benchmarks.probe.Probe", "--trainer.callbacks.folder", str(out)),
        )
        host = json.loads((out / "host-0.json").read_text())
        self.startup_s.append(host["first_step"] - started)
        self.peak_mb.setdefault(num_clients, []).append(host["peak_rss_mb"])
        seconds: list[float] = host["steps_s"][1:]
        return len(seconds) * steps * num_clients * TOKENS_PER_STEP / sum(seconds)


def _python(*args: str) -> str:
    """Run Python with one thread per process; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="of every mode (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), help="where the medians go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        write_texts(bench.texts)
        print(
            f"MiniLM with LoRA, cut {'|'.join(map(str, PLAN.values()))}, batches of {BATCH_SIZE} x {NUM_TOKENS} tokens"
            f" in {MICRO_BATCHES} micro-batches, 1 thread per process, {args.repeats} repeats in turns\n"
        )
        for repeat in range(args.repeats):
            for mode in MODES:
                bench.run(mode)
                print(
                    f"{repeat + 1}/{args.repeats}  {mode:<16} {bench.tokens_per_s[mode][-1]:7.0f} tokens/s", flush=True
                )
            bench.tiers(num_clients=20, micro_batches=MICRO_BATCHES)
            print(f"{repeat + 1}/{args.repeats}  {'tiers_20_clients':<16} {bench.peak_mb[20][-1]:7.0f} MB", flush=True)
    result = {mode: round(statistics.median(bench.tokens_per_s[mode]), 1) for mode in MODES}
    small, large = (statistics.median(bench.peak_mb[count]) for count in (1, 20))
    result |= {"rss_1_client_mb": round(small), "rss_20_clients_mb": round(large)}
    result["single_overhead_ms"] = step_overhead.measure()["single_overhead_ms"]
    result["startup_s"] = round(statistics.median(bench.startup_s), 1)
    uncut, one, four, pipelining = (result[mode] for mode in MODES)
    print(f"""
training tokens/s, medians
  (a) uncut model, one process       {uncut:8.0f}
  (b) tiers, one client              {one:8.0f}   {one / uncut:.2f} x (a), {one / pipelining:.2f} x (d)
  (c) tiers, four clients            {four:8.0f}   {four / uncut:.2f} x (a)
  (d) torch.distributed.pipelining   {pipelining:8.0f}   {pipelining / uncut:.2f} x (a)
peak memory of a host, MB
  1 client                           {small:8.0f}
  20 clients                         {large:8.0f}   {large / small:.2f} x
framework time of a client step      {result["single_overhead_ms"]:8.2f} ms
from the command to the first step   {result["startup_s"]:8.1f} s
""")
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
