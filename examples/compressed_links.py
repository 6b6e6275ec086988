"""Sketch and SS-OP in a Lightning project that has nothing else of elsa_pl: a network in three parts, in one process.

    python examples/compressed_links.py

Between front and middle stand a rotation that only the client's secret gives (`SSOP`, turned back after the middle) and
a count sketch with a calibrated decoder (`SketchCompression`): the middle computes on what a receiver would have
decoded. Both are fitted to public images before training, and `CommunicationMonitor` counts what would have been sent.
What such a project has to add is `probe_step`.
"""

from pathlib import Path

import lightning as L
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elsa_pl.callbacks import SSOP, CommunicationMonitor, SketchCompression

FOLDER = Path("runs/compressed_links")
NUM_PUBLIC, NUM_TEST = 256, 300


class Digits(L.LightningModule):
    """Front and head would be a client's, the middle its server's."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(64, 96), nn.Tanh())
        self.middle = nn.Sequential(nn.Linear(96, 96), nn.Tanh())
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 64)."""
        logits: Tensor = self.head(self.middle(self.front(images)))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def probe_step(self, batch: list[Tensor]) -> Tensor:
        """Run on public images: all that the callbacks need."""
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def train(*callbacks: Callback) -> float:
    """Train with the callbacks; returns the accuracy on images that were held out."""
    L.seed_everything(0, verbose=False)
    images, labels = load()
    training = TensorDataset(images[NUM_PUBLIC:-NUM_TEST], labels[NUM_PUBLIC:-NUM_TEST])
    module = Digits()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=8,
        default_root_dir=FOLDER,  # where traffic.csv goes
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(training, batch_size=32, shuffle=True))
    held_out = DataLoader(TensorDataset(images[-NUM_TEST:], labels[-NUM_TEST:]), batch_size=100)
    return float(trainer.test(module, held_out, verbose=False)[0]["accuracy"])


def load() -> tuple[Tensor, Tensor]:
    """Images (N, 64) and labels (N,) of scikit-learn's digits."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    return images.float() / 16, labels.long()


def main() -> None:
    """Train with plain and with compressed links, and print what that costs and saves."""
    probes = DataLoader(TensorDataset(load()[0][:NUM_PUBLIC]), batch_size=64)
    plain = train()
    compressed = train(
        SSOP(32, at="front", decode_at="middle", probes=probes),
        SketchCompression(2, at="front"),
        CommunicationMonitor(),
    )
    traffic = pd.read_csv(FOLDER / "traffic.csv")
    sent = traffic.query("client == 'front' and direction == 'forward'")["payload_bytes"].sum()
    images_seen = 8 * (len(load()[0]) - NUM_PUBLIC - NUM_TEST)
    print(f"accuracy: plain {plain:.3f}, compressed {compressed:.3f}")
    print(f"numbers sent for each state: 96 plain, {sent / images_seen / 4:.0f} compressed")


if __name__ == "__main__":
    main()
