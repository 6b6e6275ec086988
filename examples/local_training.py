"""Two of the callbacks in a Lightning project that has nothing else of elsa_pl: local training on two ranks.

    python examples/local_training.py

Each rank (DDP over gloo, on CPU) has images of digits of its own (scikit-learn's, 8 x 8 pixels) and trains on them
without synchronising gradients; after every epoch the ranks' weights are averaged. `BehaviorClustering` compares what
the ranks' models do on the same public images, and `TrustScoring` scores them; the average uses the scores as weights.
What such a project has to add is `probe_step`.
"""

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elsa_pl.callbacks import BehaviorClustering, TrustScoring

DIGITS_OF_RANK = ((0, 1, 2, 3, 4, 5), (4, 5, 6, 7, 8, 9))


def keep_local(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A DDP hook that leaves each rank its own gradients."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class Digits(L.LightningModule):
    """A small network that each rank trains alone between averages."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 64)."""
        logits: Tensor = self.head(self.body(images))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def probe_step(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Representations (B, 64) and class probabilities (B, 10): all that the callbacks look at."""
        states = self.body(batch[0])
        return states, self.head(states).softmax(-1)

    def on_train_start(self) -> None:
        self.trainer.strategy.model.register_comm_hook(None, keep_local)  # Lightning registers hooks on GPUs only

    def on_train_epoch_end(self) -> None:
        """Average the ranks' weights by trust; the callbacks have looked at the ranks' own ones before."""
        trust = next(found.trust for found in self.trainer.callbacks if isinstance(found, TrustScoring))
        share = trust[f"rank-{self.global_rank}"] / sum(trust.values())
        for parameter in self.parameters():
            parameter.data.copy_(self.trainer.strategy.reduce(parameter.detach() * share, reduce_op="sum"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    """Train on two ranks, and print what the callbacks found."""
    L.seed_everything(0)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, labels = images.float() / 16, labels.long()
    probes = DataLoader(TensorDataset(images[:128]), batch_size=64)  # public, the same for both ranks
    clustering = BehaviorClustering(num_clusters=2, width=16, every_n_rounds=1, probes=probes)
    trust = TrustScoring(probes=probes)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=3,
        default_root_dir="runs/local_training",  # where pictures go
        callbacks=[clustering, trust],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    own = torch.isin(labels[128:], torch.tensor(DIGITS_OF_RANK[trainer.global_rank]))
    data = TensorDataset(images[128:][own], labels[128:][own])
    trainer.fit(Digits(), DataLoader(data, batch_size=32, shuffle=True))
    if trainer.is_global_zero:
        print(f"clusters: {clustering.clusters}")
        print(f"divergence of the two ranks: {clustering.divergences[0, 1]:.3f}")  # type: ignore[index]  # after training
        print(f"trust: { ({rank: round(score, 2) for rank, score in trust.trust.items()}) }")


if __name__ == "__main__":
    main()
