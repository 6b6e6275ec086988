"""Framework time per client step: a tiny model in layout ``single`` against the same model uncut.

    python -m benchmarks.step_overhead

Both do the same batches with the same optimizer in one process with one intra-operator thread; what the split run
needs beyond the uncut one is Lightning, RPC to itself, remote autograd, two optimizers more, and aggregation.
The split rounds come first and the uncut ones after them, and a figure is the median of the repeats.
"""

import logging
import statistics
import tempfile
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.strategies import HierarchicalStrategy
from elsa_pl.tiers import SplitModel

NUM_CLIENTS, NUM_ROUNDS, NUM_STEPS, REPEATS = 8, 10, 5, 5
TINY = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 30522,
}


class EpochTimes(Callback):
    """Wall seconds of each epoch's training part."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def uncut_step_s(module: SplitModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean seconds of forward, backward and optimizer step of the uncut model."""
    model = module.build().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    start = time.perf_counter()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / len(batches)


def measure() -> dict[str, float]:
    """Milliseconds of a client step, split and uncut, and their difference: medians of the repeats."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips would stand between the figures
    data = FederatedTextDataModule(
        dataset="bundled:helpdesk",
        tokenizer="bundled:all-MiniLM-L6-v2",
        num_clients=NUM_CLIENTS,
        validation_fraction=0.0,
    )
    module = SplitModel(None, TINY)
    strategy = HierarchicalStrategy("single", num_edges=2, local_steps=NUM_STEPS)
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            max_epochs=NUM_ROUNDS * REPEATS,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[times],
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)
        strategy.shutdown(success=True)
    batches = [data.train_batch(f"client-{i % NUM_CLIENTS}", i // NUM_CLIENTS) for i in range(NUM_CLIENTS * NUM_STEPS)]
    uncut = [uncut_step_s(module, batches) * 1e3 for _ in range(REPEATS + 1)][1:]
    steps = NUM_CLIENTS * NUM_STEPS
    split = [sum(times.seconds[i::REPEATS]) / NUM_ROUNDS / steps * 1e3 for i in range(REPEATS)]
    return {
        "split_step_ms": round(statistics.median(split), 2),
        "uncut_step_ms": round(statistics.median(uncut), 2),
        "single_overhead_ms": round(statistics.median(split) - statistics.median(uncut), 2),
    }


if __name__ == "__main__":
    print(f"{NUM_ROUNDS} rounds x {NUM_CLIENTS} clients x {NUM_STEPS} steps, medians of {REPEATS} repeats")
    for name, value in measure().items():
        print(f"  {name:<20}{value:8.2f} ms")
