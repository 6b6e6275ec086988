"""Link callbacks in Lightning projects that have nothing else of elsa_pl: they stand at a submodule."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import BaseModelOutput

from elsa_pl.callbacks import SSOP, LinkProjection, LinkQuantization, SketchCompression
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.links import Codec, codecs_in, on_states
from elsa_pl.links.stages import QuantizationStage
from tests.runs import assert_close, assert_equal

WIDTH = 32


class Plain(pl.LightningModule):
    """A project that knows nothing of elsa_pl, but for a method that runs the model on public inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 2)
        self.seen: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.encoder(inputs)
        self.seen.append(hidden.detach())
        out: Tensor = self.head(hidden)
        return out

    def probe_step(self, batch: Tensor) -> Tensor:
        return self.forward(batch)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_plain(
    folder: Path,
    *callbacks: pl.Callback,
    epochs: int = 1,
    ckpt_path: Path | None = None,
    make: Callable[[], Plain] = Plain,
) -> tuple[Plain, pl.Trainer]:
    pl.seed_everything(0)
    inputs = torch.randn(40, 6)
    data = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=8)
    module = make()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


def probes() -> list[Tensor]:
    return [torch.randn(64, 6, generator=torch.Generator().manual_seed(1))]


def test_callbacks_stand_at_a_submodule(tmp_path: Path) -> None:
    """What the rest of the model sees is what the stack leaves of the output: at most six directions plus the mean."""
    stack = [LinkProjection(8, at="encoder", probes=probes()), LinkQuantization(8, block=4, at="encoder")]
    module, _ = fit_plain(tmp_path, *stack)
    assert torch.linalg.matrix_rank(module.seen[-1] - module.seen[-1].mean(0), atol=1e-3) == 4
    untouched, _ = fit_plain(tmp_path)
    assert torch.linalg.matrix_rank(untouched.seen[-1] - untouched.seen[-1].mean(0), atol=1e-3) > 4
    learnt = dict(module.named_parameters())["link_encoder.ends.0.encoder.weight"]
    fitted = fit_plain(tmp_path, *stack, epochs=0)[0]
    assert not torch.equal(learnt, dict(fitted.named_parameters())["link_encoder.ends.0.encoder.weight"]), "it trains"


def test_a_resumed_project_goes_on_with_what_it_learnt(tmp_path: Path) -> None:
    def stack() -> list[pl.Callback]:
        return [LinkProjection(8, at="encoder", probes=probes()), LinkQuantization(8, block=4, at="encoder")]

    whole, _ = fit_plain(tmp_path, *stack(), epochs=2)
    _, trainer = fit_plain(tmp_path, *stack(), epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit_plain(tmp_path, *stack(), epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(dict(resumed.named_parameters()), dict(whole.named_parameters()))


def test_a_codec_of_an_earlier_fit_is_not_used_with_other_settings(tmp_path: Path) -> None:
    kept = Plain()
    fit_plain(tmp_path, SketchCompression(2, at="encoder", probes=probes()), make=lambda: kept)
    with pytest.raises(ConfigurationError, match=r"encoder has a codec already, sketch 1/2 .*; got sketch 1/4"):
        fit_plain(tmp_path, SketchCompression(4, at="encoder", probes=probes()), make=lambda: kept)


def test_nothing_is_left_behind_by_a_fit_that_failed(tmp_path: Path) -> None:
    class Failing(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise RuntimeError("as asked")

    failing = Failing()
    with pytest.raises(RuntimeError, match="as asked"):
        fit_plain(tmp_path, SketchCompression(2, at="encoder", probes=probes()), make=lambda: failing)
    assert not failing.encoder._forward_hooks


def test_a_project_without_probes_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="SketchCompression at encoder needs probes"):
        fit_plain(tmp_path, SketchCompression(2, at="encoder"))
    with pytest.raises(ConfigurationError, match="LinkQuantization needs at, the name of a submodule"):
        fit_plain(tmp_path, LinkQuantization())


class Block(nn.Module):
    """Puts out what blocks of transformers do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(6, WIDTH), kind

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.linear(inputs)
        if self.kind == "tuple":
            return hidden, None
        return BaseModelOutput(last_hidden_state=hidden) if self.kind == "output" else hidden


@pytest.mark.parametrize("kind", ["tensor", "tuple", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codec_stands_in_the_form_and_dtype_of_the_output(kind: str, dtype: torch.dtype) -> None:
    block = Block(kind).to(dtype)
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = Codec("block", "uplink", [QuantizationStage(BlockFormat(bits=4, block=8))], WIDTH)
    expected = codec(block.linear(inputs)).to(dtype)
    on_states(block, codec)
    out: Any = block(inputs)
    assert type(out).__name__ == {"tensor": "Tensor", "tuple": "tuple", "output": "BaseModelOutput"}[kind]
    found = out if kind == "tensor" else out[0]
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert not torch.equal(found, block.linear(inputs))
    if kind == "output":
        assert torch.equal(out.last_hidden_state, expected)


@pytest.mark.parametrize("kind", [{}, torch.ones(())])
def test_a_place_without_states_is_told_so(tmp_path: Path, kind: Any) -> None:
    class Elsewhere(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Identity()

        def forward(self, inputs: Tensor) -> Tensor:
            self.aside(kind)
            return super().forward(inputs)

    codec = LinkQuantization(at="aside", probes=probes())
    with pytest.raises(ConfigurationError, match=r"expected states \[\*, D\] from aside; got a (dict|tensor \[\])"):
        fit_plain(tmp_path, codec, make=Elsewhere)


class Between(Plain):
    """With a middle that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.encoder(inputs)
        back = self.middle(hidden)
        self.seen.append(torch.stack([hidden, back]).detach())
        out: Tensor = self.head(back)
        return out


def test_what_is_turned_is_turned_back_elsewhere(tmp_path: Path) -> None:
    """The model in between computes on turned states; without one in between, nothing is lost."""

    plain, _ = fit_plain(tmp_path, make=Between)
    turning = SSOP(16, at="encoder", decode_at="middle", probes=probes())
    turned, _ = fit_plain(tmp_path, turning, make=Between)
    hidden, back = turned.seen[-1]
    assert (hidden - plain.seen[-1][0]).norm() > 0.1 * hidden.norm()
    assert_close({"back": back}, {"back": plain.seen[-1][1]}, atol=1e-4)
    assert_close({"head": turned.head.weight}, {"head": plain.head.weight}, atol=1e-4)


@pytest.mark.parametrize("first", ["SSOP", "quantization"])
def test_others_stand_where_it_is_turned_back(tmp_path: Path, first: str) -> None:
    """In one codec, once, and before turning back, whoever comes first; it is used again by another fit."""
    kept = Between()
    turning = SSOP(16, at="encoder", decode_at="middle", probes=probes())
    others = [LinkQuantization(8, block=8, at="middle"), LinkQuantization(8, block=8, at="encoder")]
    stack = [turning, *others] if first == "SSOP" else [others[0], turning, others[1]]
    for _ in range(2):
        fit_plain(tmp_path, *stack, make=lambda: kept)
        expected = [stage.describe() for stage in (turning.stage, others[0].stage)]
        assert [codec.describe() for codec in codecs_in(kept)] == [expected] * 2
        assert not kept.middle._forward_hooks
    plain, _ = fit_plain(tmp_path, make=Between)
    made, _ = fit_plain(tmp_path, *stack, make=Between)
    hidden, back = made.seen[-1]
    before, after = plain.seen[-1]
    assert (hidden - before).norm() > 0.1 * before.norm(), "turned"
    assert 0 < (back - after).norm() < 0.05 * after.norm(), "turned back, and rounded"


def test_two_of_them_do_not_turn_at_one_place(tmp_path: Path) -> None:
    turning = SSOP(16, at="encoder", decode_at="middle", probes=probes())
    for other in (SSOP(16, undo="edge", at="middle"), SSOP(8, at="head", decode_at="middle")):
        with pytest.raises(ConfigurationError, match=r"expected one SSOP at middle, .*; got 2: name another"):
            fit_plain(tmp_path, turning, other, make=Between)
    narrow = LinkQuantization(8, block=2, at="head", probes=probes())
    with pytest.raises(ConfigurationError, match=r"stage 0 of head .*: expected states as wide .*, 32; got 2"):
        fit_plain(tmp_path, SSOP(2, at="encoder", decode_at="head", probes=probes()), narrow)
