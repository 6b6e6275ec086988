"""The line per round, and the live line of a terminal, in a project that has nothing else of ours."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elsa_pl.callbacks import RoundProgress

pytestmark = pytest.mark.filterwarnings("ignore")
ROUND_1 = r"round 1/2  train_loss 0\.5000  val_accuracy 0\.7500  clients 2/2  2\.5 MB sent  \d+ s  \d+ s left"
ROUND_2 = r"round 2/2  train_loss 0\.5000  val_accuracy 0\.7500  clients 2/2  5\.0 MB sent  \d+ s"


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

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", 0.75)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Federated(Line):
    """Each step is one of two clients, told by another thread; the last word comes when the round is over."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.tell(batch_idx + 1, loss=1.0 / (batch_idx + 1) if batch_idx else None)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.tell(99, loss=None)

    def tell(self, step: int, loss: float | None) -> None:
        trainer: Any = self.trainer
        progress = next(callback for callback in trainer.callbacks if isinstance(callback, RoundProgress))
        told = {"steps_done": step, "steps_total": 2, "clients_done": step, "num_clients": 2, "loss": loss}
        thread = threading.Thread(target=progress.on_client_progress, args=(self.trainer,), kwargs=told)
        thread.start()
        thread.join()


class Terminal:
    """A pseudo-terminal. Tests redirect stdout to it themselves, since pytest sets its own after the fixtures."""

    def __init__(self) -> None:
        self._reading, writing = os.openpty()
        self.stdout = os.fdopen(writing, "w")

    def read(self) -> str:
        """What was written so far; less than a terminal's buffer holds. It arrives in pieces, the bell last."""
        print("\a", end="", file=self.stdout, flush=True)
        raw = b""
        while not raw.endswith(b"\a"):
            raw += os.read(self._reading, 65536)
        return raw[:-1].decode()

    def close(self) -> None:
        self.stdout.close()
        os.close(self._reading)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    made = Terminal()
    yield made
    made.close()


def shown(raw: str) -> list[str]:
    """The lines that are left on the screen, of the little that a terminal can be asked here."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|[\r\n]|[^\x1b\r\n]+", raw):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return [line for line in lines if line]


def fit(progress: RoundProgress, epochs: int, model: pl.LightningModule | None = None, **settings: Any) -> None:
    settings = {"enable_progress_bar": False, "limit_val_batches": 0, **settings}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[progress],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
    data = DataLoader(TensorDataset(torch.ones(2, 1)))
    trainer.fit(model or Line(), data, data)


def train(progress: RoundProgress, epochs: int, capsys: pytest.CaptureFixture[str], **settings: Any) -> list[str]:
    capsys.readouterr()
    fit(progress, epochs, **settings)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    return [line for line in out.splitlines() if re.match(r"\w+ \d+", line)]


def test_a_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = train(RoundProgress(), 2, capsys)
    assert re.fullmatch(r"round 1/2  train_loss 0\.5000  2\.5 MB sent  \d+ s  \d+ s left", first)
    assert re.fullmatch(r"round 2/2  train_loss 0\.5000  5\.0 MB sent  \d+ s", second)


def test_a_file_gets_the_same_lines_when_clients_are_heard_of(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = train(RoundProgress(), 2, capsys, model=Federated(), limit_val_batches=1)
    assert re.fullmatch(ROUND_1, first)
    assert re.fullmatch(ROUND_2, second)


def test_metrics_and_label(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = train(RoundProgress(("other", "absent", "train_loss"), label="epoch"), 1, capsys)
    assert line.startswith("epoch 1/1  other 7.0000  train_loss 0.5000  ")


def test_every_so_many_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    lines = train(RoundProgress(every_n_epochs=2), 5, capsys)
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert "12.5 MB sent" in lines[-1], "epochs without a line count too"


def test_without_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = train(RoundProgress(), -1, capsys, max_steps=2)
    assert line.startswith("round 1  train_loss")
    assert not line.endswith("left")


def test_a_terminal_sees_the_round_go_on(terminal: Terminal) -> None:
    with redirect_stdout(terminal.stdout):
        fit(RoundProgress(), 2, Federated(), limit_val_batches=1)
    raw = terminal.read()
    drawn = [re.sub(r"\d+ s left", "9 s left", line) for line in re.findall(r"\r\x1b\[K([^\r]+)\r(?!\n)", raw)]
    assert drawn == [
        "round 1/2",
        "round 1/2  steps 1/2  clients 1/2  9 s left",
        "round 1/2  steps 2/2  clients 2/2  loss 0.5000  9 s left",
        "round 1/2  validating  9 s left",
        "round 2/2  val_accuracy 0.7500  9 s left  2.5 MB sent",
        "round 2/2  steps 1/2  clients 1/2  val_accuracy 0.7500  9 s left  2.5 MB sent",
        "round 2/2  steps 2/2  clients 2/2  loss 0.5000  val_accuracy 0.7500  2.5 MB sent",
        "round 2/2  validating  val_accuracy 0.7500  2.5 MB sent",
    ]
    first, second = (line for line in shown(raw) if line.startswith("round"))
    assert re.fullmatch(ROUND_1, first)
    assert re.fullmatch(ROUND_2, second)


def test_a_narrow_terminal_gets_less(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with redirect_stdout(terminal.stdout):
        fit(RoundProgress(), 1, Federated())
    assert "\x1b[Kround 1/1  steps 2/2  clients 2/2\r" in terminal.read()


def test_an_error_begins_on_a_line_of_its_own(terminal: Terminal) -> None:
    class Broken(Federated):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("broken")

    with redirect_stdout(terminal.stdout):
        with pytest.raises(RuntimeError, match="broken"):
            fit(RoundProgress(), 1, Broken())
        print("error: broken")
    assert shown(terminal.read())[-1] == "error: broken"


@pytest.mark.parametrize(("term", "bar"), [("dumb", False), ("xterm", True)])
def test_no_live_line_where_it_would_disturb(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, term: str, bar: bool
) -> None:
    monkeypatch.setenv("TERM", term)
    with redirect_stdout(terminal.stdout):
        fit(RoundProgress(), 1, Federated(), enable_progress_bar=bar)
    assert "steps 1/2" not in terminal.read()


def test_nothing_is_drawn_after_the_round(terminal: Terminal) -> None:
    progress, model = RoundProgress(), Federated()
    with redirect_stdout(terminal.stdout):
        fit(progress, 1, model)
        terminal.read()
        model.tell(1, None)
        print("end", end="")
    assert terminal.read() == "end"


def test_a_resumed_run_goes_on_counting() -> None:
    first, second = RoundProgress(), RoundProgress()
    fit(first, 2)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"num_bytes": 5_000_000.0}


def test_refused() -> None:
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1; got 0"):
        RoundProgress(every_n_epochs=0)
