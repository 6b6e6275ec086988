"""The line per round, in a project that has nothing else of ours."""

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elsa_pl.callbacks import RoundProgress


class Line(pl.LightningModule):
    """A line through points; it has nothing to do with this project."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.layer(batch[0]) ** 2).mean()
        values = {"train_loss": 0.5, "bytes/uplink": 2_000_000.0, "bytes/downlink": 500_000.0, "other": 7.0}
        self.log_dict(values, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(progress: RoundProgress, epochs: int, capsys: pytest.CaptureFixture[str], **settings: Any) -> list[str]:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[progress],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    capsys.readouterr()
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(2, 1))))
    return [line for line in capsys.readouterr().out.splitlines() if re.match(r"\w+ \d+", line)]


@pytest.mark.filterwarnings("ignore")
def test_a_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = train(RoundProgress(), 2, capsys)
    assert re.fullmatch(r"round 1/2  train_loss 0\.5000  2\.5 MB sent  \d+ s  \d+ s left", first)
    assert re.fullmatch(r"round 2/2  train_loss 0\.5000  2\.5 MB sent  \d+ s", second)


@pytest.mark.filterwarnings("ignore")
def test_metrics_and_label(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = train(RoundProgress(("other", "absent", "train_loss"), label="epoch"), 1, capsys)
    assert line.startswith("epoch 1/1  other 7.0000  train_loss 0.5000  ")


@pytest.mark.filterwarnings("ignore")
def test_every_so_many_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    lines = train(RoundProgress(every_n_epochs=2), 5, capsys)
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]


@pytest.mark.filterwarnings("ignore")
def test_without_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = train(RoundProgress(), -1, capsys, max_steps=2)
    assert line.startswith("round 1  train_loss")
    assert not line.endswith("left")


def test_refused() -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1; got 0"):
        RoundProgress(every_n_epochs=0)
