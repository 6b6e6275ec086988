"""One run in Flower's simulation, in a process of its own: its ServerApp, and Ray's actors for the clients.

    python -m benchmarks.flower.simulation FOLDER RAY_FOLDER

reads ``task.json`` from the folder, and writes ``round-N.pt`` (the global adapters after round N) and ``rounds.json``.
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.flower.client import app as client_app
from benchmarks.flower.processes import cpu_seconds
from benchmarks.flower.task import NUM_WORKERS, Task, local_training

_OBJECT_STORE_BYTES = 100_000_000


class MeasuredFedAvg(FedAvg):
    """Flower's FedAvg, with a note of what it sends and receives and when; a client that fails ends the run."""

    def __init__(self, num_clients: int) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients, min_evaluate_nodes=0
        )
        self.started: list[float] = []
        self.cpu_s: list[float] = []
        self.down_bytes: list[int] = []
        self.up_bytes: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        self.started.append(time.time())
        self.cpu_s.append(cpu_seconds())
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.down_bytes.append(sum(num_bytes(message) for message in messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        if len(replies) < self.min_train_nodes or any(reply.has_error() for reply in replies):
            reasons = [reply.error.reason for reply in replies if reply.has_error()]
            raise RuntimeError(f"round {server_round}: {len(replies)} clients answered, with the errors {reasons}")
        self.up_bytes.append(sum(num_bytes(reply) for reply in replies))
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays, metrics


def num_bytes(message: Message) -> int:
    """What the arrays of a message take as Flower serialises them."""
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def make_server(task: Task, folder: Path) -> ServerApp:
    """A ServerApp that trains, evaluates the global model after each round, and writes down what came out."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        training = local_training(task)
        strategy = MeasuredFedAvg(task.num_clients)
        rounds: list[dict[str, Any]] = []

        def evaluate(server_round: int, arrays: ArrayRecord) -> None:
            if server_round == 0:
                return
            ended, cpu_s = time.time(), cpu_seconds() - strategy.cpu_s[-1]
            adapters: Mapping[str, torch.Tensor] = arrays.to_torch_state_dict()
            torch.save(dict(adapters), folder / f"round-{server_round}.pt")
            training.load(adapters)
            rounds.append(
                {
                    "started": strategy.started[-1],
                    "ended": ended,
                    "cpu_s": cpu_s,
                    "down_bytes": strategy.down_bytes[-1],
                    "up_bytes": strategy.up_bytes[-1],
                    "val_accuracy": training.accuracy(training.data.eval_batches("validation")),
                    "test_accuracy": training.accuracy(training.data.eval_batches("test")),
                }
            )

        strategy.start(
            grid,
            ArrayRecord(training.adapters()),
            num_rounds=task.num_rounds,
            train_config=ConfigRecord(asdict(task)),
            evaluate_fn=evaluate,
        )
        (folder / "rounds.json").write_text(json.dumps(rounds, indent=2) + "\n")

    return server


def main() -> None:
    folder, ray_folder = Path(sys.argv[1]), sys.argv[2]
    task = Task(**json.loads((folder / "task.json").read_text()))
    init_args = {
        "num_cpus": NUM_WORKERS,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_temp_dir": ray_folder,
        "_node_ip_address": "127.0.0.1",
    }
    run_simulation(
        make_server(task, folder),
        client_app,
        num_supernodes=task.num_clients,
        backend_config={"init_args": init_args, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    main()
