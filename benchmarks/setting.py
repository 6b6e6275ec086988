"""What all modes of the speed benchmark share: the model, the cut, the texts and the batches."""

import random
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from elsa_pl.datamodules import FederatedTextDataModule, helpdesk
from elsa_pl.tiers import SplitModel

MODEL = "bundled:all-MiniLM-L6-v2"
PLAN = {"front": 1, "middle": 3, "tail": 2}
BATCH_SIZE, NUM_TOKENS, MICRO_BATCHES = 16, 64, 4
WARMUP_STEPS, STEPS = 4, 16
TOKENS_PER_STEP = BATCH_SIZE * NUM_TOKENS
NUM_TEXTS = 1280


def write_texts(path: Path) -> None:
    """Helpdesk tickets, several to a text, so that every text fills `NUM_TOKENS` and none is padded."""
    draw = random.Random(0)
    tickets, topics = helpdesk.generate("train")
    by_topic: dict[str, list[str]] = {}
    for ticket, topic in zip(tickets, topics, strict=True):
        by_topic.setdefault(topic, []).append(ticket)
    labels = [sorted(by_topic)[index % len(by_topic)] for index in range(NUM_TEXTS)]
    texts = [" ".join(draw.sample(by_topic[label], 12)) for label in labels]
    pd.DataFrame({"text": texts, "label": labels}).to_csv(path, index=False)


def load_batches(path: Path, count: int) -> tuple[int, list[dict[str, Tensor]]]:
    """The number of labels, and the first batches of the only client."""
    data = FederatedTextDataModule(
        train_file=str(path),
        tokenizer=MODEL,
        max_length=NUM_TOKENS,
        batch_size=BATCH_SIZE,
        num_clients=1,
        partition="iid",
        validation_fraction=0.0,
    )
    data.load()
    batches = [data.train_batch("client-0", index) for index in range(count)]
    assert all(batch["attention_mask"].all() for batch in batches), "a padded text would make the modes unequal"
    return data.num_labels, batches


def build_model(num_labels: int) -> torch.nn.Module:
    """The uncut model with its LoRA adapters, as a run builds it."""
    module = SplitModel(MODEL)
    module.num_labels = num_labels
    return module.build().train()
