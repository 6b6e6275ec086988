"""Split training in layout ``single`` against plain peft LoRA on one device, for models of several sizes.

    python -m benchmarks.devices --device cuda:0 --precision bf16-mixed
    python -m benchmarks.devices --device cpu --precision 32-true --shapes minilm

Both train the same model with random weights on the same batches in one process. Prints training tokens per second.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.setting import MODEL, write_texts
from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.strategies import HierarchicalStrategy
from elsa_pl.tiers import SplitModel
from elsa_pl.tiers.split import adamw

BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512}
SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {
        **BERT,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert-base": {
        **BERT,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "decoder-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
}
BATCH_SIZE, NUM_TOKENS, STEPS, REPEATS = 16, 64, 10, 3


class RoundTimes(L.Callback):
    """Wall seconds of the steps of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def split_tokens_per_s(
    config: dict[str, Any], data: FederatedTextDataModule, device: str, precision: Any, clients: int
) -> float:
    """Of all clients together, averaging included; the first round warms up."""
    strategy = HierarchicalStrategy(
        "single", local_steps=STEPS, client_device=device, edge_device=device, passes_in_flight=clients
    )
    times = RoundTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=strategy,
            precision=precision,
            max_epochs=1 + REPEATS,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[times],
            default_root_dir=folder,
        )
        try:
            trainer.fit(SplitModel(None, config), datamodule=data)
        finally:
            strategy.shutdown(success=True)
    return clients * STEPS * BATCH_SIZE * NUM_TOKENS / statistics.median(times.seconds[1:])


def plain_tokens_per_s(config: dict[str, Any], data: FederatedTextDataModule, device: str, precision: str) -> float:
    """The uncut model in a loop as anybody would write it."""
    module = SplitModel(None, config)
    module.num_labels = data.num_labels
    model = module.build().to(device).train()
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    batches = [{k: v.to(device) for k, v in data.train_batch("client-0", i).items()} for i in range(STEPS)]
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16-mixed")
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        for batch in batches:
            with autocast:
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # a client looks at its loss too
        seconds.append(time.perf_counter() - start)
    return STEPS * BATCH_SIZE * NUM_TOKENS / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    print(f"tokens/s on {args.device}, {args.precision}, batches of {BATCH_SIZE} x {NUM_TOKENS} tokens")
    print(f"{'':<12}{'plain LoRA':>12}{'1 client':>12}{'4 clients':>12}")
    for shape in args.shapes:
        figures = [0.0, 0.0, 0.0]
        with tempfile.TemporaryDirectory() as folder:
            texts = Path(folder) / "texts.csv"
            write_texts(texts)

            def data(num_clients: int, texts: Path = texts) -> FederatedTextDataModule:
                return FederatedTextDataModule(
                    train_file=str(texts),
                    tokenizer=MODEL,
                    max_length=NUM_TOKENS,
                    batch_size=BATCH_SIZE,
                    num_clients=num_clients,
                    partition="iid",
                    validation_fraction=0.0,
                )

            plain = data(1)
            plain.load()
            figures[0] = plain_tokens_per_s(SHAPES[shape], plain, args.device, args.precision)
            for place, clients in ((1, 1), (2, 4)):
                figures[place] = split_tokens_per_s(SHAPES[shape], data(clients), args.device, args.precision, clients)
        print(f"{shape:<12}" + "".join(f"{figure:12.0f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
