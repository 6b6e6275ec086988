"""Runs whose links are compressed: what crosses is what was asked for, and nothing else about a run changes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elsa_pl import cli
from elsa_pl.callbacks import SSOP, LinkProjection, LinkQuantization, SketchCompression
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.links import LINKS, NOBODY, Codec
from elsa_pl.links.perturbation import PerturbationStage
from elsa_pl.links.stages import ProjectionStage, QuantizationStage, SketchStage
from tests.runs import Settings, arguments, assert_close, assert_equal, fork_all, run_forked, run_here, write_data

WIDTH = 32
SKETCH = {"class_path": "SketchCompression", "init_args": {"ratio": 2}}
MEDIAN = {"class_path": "SketchCompression", "init_args": {"ratio": 2, "decoder": "median"}}
INT8 = {"class_path": "LinkQuantization", "init_args": {"bits": 8}}
INT4 = {"class_path": "LinkQuantization", "init_args": {"bits": 4, "block": 8}}
LEARNED = {"class_path": "LinkProjection", "init_args": {"ratio": 4}}
WHOLE = {
    "class_path": "LinkProjection",
    "init_args": {"ratio": 1.03, "learn": False},
}  # 31: LayerNorm takes the mean out
AT_TAIL = {"class_path": "SSOP", "init_args": {"rank": 16}}
AT_EDGE = {"class_path": "SSOP", "init_args": {"rank": 31, "undo": "edge"}}  # LayerNorm takes the mean out
OUTSIDE = {"class_path": "SSOP", "init_args": {"rank": 8, "undo": "edge", "complement": "sketch", "ratio": 2}}
DROPPED = {"class_path": "SSOP", "init_args": {"rank": 8, "undo": "edge", "complement": "drop"}}
WAYS = [(link, way) for link in ("uplink", "downlink") for way in ("forward", "backward")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four clients on two edges, two rounds."""
    return {
        **write_data(tmp_path_factory.mktemp("data")),
        "data.num_probes": 32,
        "strategy.num_edges": 2,
        "checkpoint.save_top_k": -1,
        "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
    }


def with_links(base: Settings, *callbacks: Settings) -> dict[str, Any]:
    return {**base, "trainer.callbacks": list(callbacks)}


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "numbers"),
    [
        ((), WIDTH),
        ((SKETCH,), 15),  # three rows of five buckets
        ((MEDIAN,), 15),
        ((INT8,), 9),  # 32 bytes and one scale of two, in words of four
        ((LEARNED,), 8),
        ((LEARNED, INT4), 2),  # four bytes, one scale
        ((AT_TAIL,), WIDTH),
        ((OUTSIDE,), 8 + 15),
        ((DROPPED, INT4), 2),
    ],
)
def test_links_carry_what_the_stages_leave(
    base: Settings, tmp_path: Path, callbacks: tuple[Settings, ...], numbers: int
) -> None:
    run = run_here(tmp_path, "run", {**with_links(base, *callbacks), "trainer.max_epochs": 1})
    counted = run.summary()["bytes"]
    plain = counted["uplink"]["backward"] / numbers
    assert plain > 0
    assert plain % 4 == 0, "whole float32 numbers for each token"
    for link, way in WAYS[1:]:
        if way == "backward":
            assert counted[link][way] == plain * numbers
    # evaluation goes the same way, without gradients
    assert counted["downlink"]["forward"] > counted["downlink"]["backward"]
    assert counted["downlink"]["forward"] % (4 * numbers) == 0
    # what a client has of both links: it decodes the downlink, and turns with the subspace, at one end or both
    subspace, decoder = WIDTH * 8, 15 * WIDTH + WIDTH
    fitted = {
        "SketchCompression": decoder if SKETCH in callbacks else 0,
        "LinkProjection": WIDTH * 8 + 8 + 8 * WIDTH + WIDTH,
        "SSOP": 2 * WIDTH * 16 if AT_TAIL in callbacks else 3 * subspace + (decoder if OUTSIDE in callbacks else WIDTH),
    }
    # at the start and after the round, four clients; what trains is an adapter once it has started
    times = 1 if LEARNED in callbacks else 2
    expected = sum(fitted.get(str(callback["class_path"]), 0) for callback in callbacks)
    assert counted["calibration"]["down"] == times * 4 * 4 * expected


@pytest.mark.parametrize("callbacks", [(), (LEARNED, INT4)])
def test_counted_bytes_are_those_of_the_connections(
    base: Settings, tmp_path: Path, callbacks: tuple[Settings, ...]
) -> None:
    """Of a host, steps alone: what the kernel says its connections carried, both ways."""
    recorder = {"class_path": "tests.wire.WireRecorder", "init_args": {"path": str(tmp_path / "wire.json")}}
    settings = {
        **with_links(base, *callbacks, {"class_path": "CommunicationMonitor"}, recorder),
        "strategy.layout": "tiers",
        "strategy.local_steps": 4,
        "trainer.max_epochs": 1,
    }
    run = run_forked(tmp_path, "run", settings, 2)
    carried = json.loads((tmp_path / "wire.json").read_text())
    assert len(carried) == 4
    counted = pd.read_csv(run.folder / "traffic.csv").query("phase == 'training'")
    assert set(counted["client"]) == {"client-0", "client-1", "client-2", "client-3"}
    assert set(counted["messages"]) == {4}
    up = counted.query("(link == 'uplink') == (direction == 'forward')")["wire_bytes"].sum()
    down = counted.query("(link == 'uplink') != (direction == 'forward')")["wire_bytes"].sum()
    assert up == pytest.approx(sum(step["sent"] for step in carried), rel=0.05)
    assert down == pytest.approx(sum(step["received"] for step in carried), rel=0.05)
    by_place = counted.groupby(["link", "direction"])["payload_bytes"].sum()
    for link, way in WAYS[1:]:
        total = run.summary()["bytes"][link][way]
        assert total == by_place[link, way] or way == "forward", "evaluation goes forward as well"
        assert run.metrics()[0][f"traffic/{link}_{way}"] == by_place[link, way]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_a_projection_on_all_directions_changes_nothing(base: Settings, tmp_path: Path) -> None:
    plain = run_here(tmp_path, "plain", base)
    rotated = run_here(tmp_path, "rotated", with_links(base, WHOLE))
    assert_close(rotated.adapters(), plain.adapters(), atol=2e-4)


def test_what_the_edge_undoes_changes_nothing(base: Settings, tmp_path: Path) -> None:
    plain = run_here(tmp_path, "plain", base)
    turned = run_here(tmp_path, "turned", with_links(base, AT_EDGE))
    assert_close(turned.adapters(), plain.adapters(), atol=2e-4)
    assert turned.summary()["test_loss"] == pytest.approx(plain.summary()["test_loss"], abs=1e-4)


def test_compressed_links_change_what_is_learnt(base: Settings, tmp_path: Path) -> None:
    plain = run_here(tmp_path, "plain", base).adapters()
    sketched = run_here(tmp_path, "sketched", with_links(base, SKETCH, INT8)).adapters()
    assert any(not torch.equal(sketched[name], value) for name, value in plain.items())


@pytest.mark.parametrize("callbacks", [(AT_TAIL, SKETCH, INT8), (LEARNED, INT4)])
def test_layouts_are_equal(base: Settings, tmp_path: Path, callbacks: tuple[Settings, ...]) -> None:
    settings = with_links(base, *callbacks)
    single = run_here(tmp_path, "single", settings)
    full = run_forked(tmp_path, "full", {**settings, "strategy.layout": "full", "strategy.num_hosts": 2}, 5)
    assert_equal(full.adapters(), single.adapters())
    # forwards, padding differs with the share of the evaluation that a host has
    sent, expected = full.summary()["bytes"], single.summary()["bytes"]
    for link, way in [*WAYS[1::2], ("adapters", "up"), ("adapters", "down"), ("calibration", "down")]:
        assert sent[link][way] == expected[link][way] > 0, (link, way)
    if AT_TAIL not in callbacks:  # whose rotation a test batch meets depends on who evaluates it
        assert full.summary()["test_loss"] == pytest.approx(single.summary()["test_loss"], rel=1e-5)


@pytest.mark.parametrize("callbacks", [(AT_TAIL, SKETCH, INT8), (LEARNED, INT4), (AT_EDGE, INT4)])
def test_resumed_is_uninterrupted(base: Settings, tmp_path: Path, callbacks: tuple[Settings, ...]) -> None:
    settings = {**with_links(base, *callbacks), "trainer.max_epochs": 3}
    whole = run_here(tmp_path, "whole", settings)
    resumed = run_here(tmp_path, "resumed", {**settings, "ckpt_path": str(whole.checkpoint(0))})
    assert_equal(resumed.adapters(), whole.adapters())
    assert resumed.metrics()[2]["val_loss"] == whole.metrics()[2]["val_loss"]


def test_a_learned_projection_trains(base: Settings, tmp_path: Path) -> None:
    run = run_here(tmp_path, "run", with_links(base, LEARNED))
    before, after = run.adapters(0), run.adapters(1)
    learnt = [name for name in after if name.startswith("links.")]
    assert {name.split(".", 3)[1] + "." + name.split(".")[3] for name in learnt} == {
        f"{link}.{side}" for link in ("uplink", "downlink") for side in ("encoder", "decoder")
    }
    for name in learnt:
        assert after[name].isfinite().all()
        assert not torch.equal(after[name], before[name]), name


def test_an_audit_attacks_what_is_sent(base: Settings, tmp_path: Path) -> None:
    """Of a random model: without a defence the nearest public state tells every public token, and a reader of a link
    under SS-OP that the edge undoes sees something else than the edge."""
    audit = {"class_path": "PrivacyAudit", "init_args": {"num_texts": 12, "num_known": 4}}
    more = {"trainer.max_epochs": 1, "data.num_probes": 40}
    tables = {}
    for name, callbacks in {"plain": [audit], "turned": [AT_EDGE, audit]}.items():
        run = run_here(tmp_path, name, {**with_links(base, *callbacks), **more})
        table = pd.read_csv(run.folder / "privacy.csv")
        tables[name] = table.set_index(["reader", "what"])["share"]
        tokens = table[table["reader"] != "labels"]
        assert (tokens["share"] <= tokens["cap"]).all()
        assert (tokens["floor"] < tokens["cap"]).all()
        assert run.metrics()[0]["privacy/edge"] == pytest.approx(tables[name]["edge"].max())
        assert tables[name]["edge", "nearest"] > 0.5
        assert (run.folder / "privacy.png").stat().st_size > 10_000
    assert set(tables["plain"].index.get_level_values("reader")) == {"edge", "labels"}
    assert tables["turned"]["link", "nearest"] < 0.5 * tables["turned"]["edge", "nearest"]


# ---- a codec alone ---------------------------------------------------------------------------------------------------


@pytest.fixture
def states() -> Tensor:
    """Of unlike directions: calibration has something to find."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH)
    return torch.randn(400, WIDTH, generator=generator) @ mixing.T + 1


def test_gradients_pass_a_fitted_codec_exactly(states: Tensor) -> None:
    """Of the map that the receiver computes with, by finite differences in double precision."""
    codec = Codec(
        "uplink.1-2-1", "uplink", [ProjectionStage(2, learn=False), SketchStage(2, "calibrated", 1, 1e-4, 0)], WIDTH
    )
    codec.fit(states)
    codec = codec.double()
    sent = states[:3].double().requires_grad_()
    assert torch.autograd.gradcheck(codec, (sent,))


def test_gradients_of_a_learned_projection_are_exact(states: Tensor) -> None:
    codec = Codec("uplink.1-2-1", "uplink", [ProjectionStage(4, learn=True)], WIDTH)
    codec.fit(states)
    codec = codec.double()
    names = [name for name, _ in codec.named_parameters()]

    def apply(sent: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(codec, dict(zip(names, values, strict=True)), (sent,))
        return out

    assert torch.autograd.gradcheck(apply, (states[:3].double().requires_grad_(), *codec.parameters()))


def test_a_learned_projection_learns_what_the_task_needs(states: Tensor) -> None:
    """The task reads the first direction that the principal ones leave out."""
    directions = torch.linalg.svd(states - states.mean(0))[2]
    head = directions[2] / (states @ directions[2]).std()
    codec = Codec("uplink.1-2-1", "uplink", [ProjectionStage(WIDTH / 2, learn=True)], WIDTH)
    codec.fit(states)
    optimizer = torch.optim.Adam(codec.parameters(), 0.03)
    losses = []
    for _ in range(150):
        loss = (codec(states) @ head - states @ head).var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9, "at first nothing of it passes"
    assert losses[-1] < 0.1


def test_halves_make_the_whole(states: Tensor) -> None:
    stages = [SketchStage(2, "calibrated", 3, 1e-4, 0), QuantizationStage(BlockFormat(bits=8, block=5))]
    fitted = Codec("uplink.1-2-1", "uplink", stages, WIDTH)
    fitted.fit(states)
    encoder, decoder = (Codec("uplink.1-2-1", "uplink", stages, WIDTH).side(side) for side in ("encoder", "decoder"))
    with pytest.raises(RuntimeError, match=r"stage 0 of links\.uplink\.1-2-1\.decoder\.\* is not calibrated yet"):
        decoder(encoder(states))
    assert encoder(states).shape == (400, fitted.width)
    decoder.load(fitted.tensors())
    assert torch.equal(decoder(encoder(states)), fitted(states))


@pytest.mark.parametrize("client", ["client-0", "client-1"])
def test_calibration_behind_a_rotation_holds_for_every_client(states: Tensor, client: str) -> None:
    """Both links, with a middle that does nothing: the edge fits without knowing the client's secret."""
    ssop = PerturbationStage(16, "tail", "keep", 4, rekey=False, seed=0)
    ssop.secret = "secret"
    stages = [ssop, SketchStage(2, "calibrated", 3, 1e-4, 0)]
    fitted = Codec("uplink.1-2-1", "uplink", stages, WIDTH)
    fitted.fit(states)
    back = Codec("downlink.1-2-1", "downlink", stages, WIDTH)
    back.fit(fitted.side("encoder").ends["0"](states), fitted)
    uplink, downlink = (Codec(f"{link}.1-2-1", link, stages, WIDTH, client) for link in LINKS)
    uplink.load(fitted.tensors())
    downlink.load(back.tensors())
    turned = uplink.side("encoder").ends["0"](states)  # what the middle would have without the sketch
    assert (downlink(turned) - states).norm() < 0.5 * states.norm()
    nobody = Codec("uplink.1-2-1", "uplink", stages[:1], WIDTH, NOBODY)
    nobody.fit(states)
    assert torch.allclose(nobody(states), states, atol=1e-5)


def test_calibrated_decoding_loses_less_than_the_median(states: Tensor) -> None:
    lost = {}
    for decoding in ("calibrated", "median", "mean"):
        codec = Codec("uplink.1-2-1", "uplink", [SketchStage(2, decoding, 3, 1e-4, 0)], WIDTH)
        codec.fit(states[:200])
        lost[decoding] = float((codec(states[200:]) - states[200:]).norm() / states[200:].norm())
    assert lost["calibrated"] < 0.5 < 1 < lost["mean"] < lost["median"]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "more", "message"),
    [
        (
            [{"class_path": "SketchCompression", "init_args": {"ratio": 20}}],
            {},
            r"stage 0 of uplink.1-2-1 \(sketch 1/20 .*expected at least one bucket in each of 3 rows",
        ),
        ([INT8, SKETCH], {}, r"stage 1 of uplink.1-2-1 \(sketch .* comes after int8"),
        (
            [{"class_path": "LinkQuantization", "init_args": {"block": 12}}],
            {},
            r"stage 0 of uplink.* expected a block size that divides the width 32 .*; got 12",
        ),
        ([SKETCH, INT4], {}, r"stage 1 of uplink.* expected a block size that divides the width 15 .*; got 8"),
        ([{"class_path": "LinkProjection", "init_args": {"ratio": 40}}], {}, "expected a ratio of at most 32"),
        ([SKETCH], {"data.num_probes": 0}, "expected probe texts, got none"),
        ([LEARNED, {"class_path": "ResourceAwareSplitting"}], {"profile": {"distribution": "mixed"}}, "cut alike"),
        (
            [{"class_path": "LinkProjection", "init_args": {"ratio": 1}}],
            {"data.num_probes": 1},
            r"stage 0 of uplink.1-2-1 \(projection 1/1, learned\): expected .* probes",
        ),
        ([LEARNED, SKETCH], {}, r"stage 1 of uplink.* is calibrated to what arrives, and a stage before it trains"),
        ([{"class_path": "PrivacyAudit"}], {"data.num_probes": 0}, "expected probe texts, got none"),
        ([{"class_path": "PrivacyAudit", "init_args": {"num_texts": 20}}], {}, "0 < num_known <= num_texts / 2"),
        ([SKETCH, AT_TAIL], {}, r"stage 1 of uplink.* \(SS-OP of rank 16.* comes after sketch"),
        ([AT_TAIL, LEARNED], {}, "states whose directions are known, but SSOP has turned them"),
        ([DROPPED, SKETCH], {}, "nothing that is calibrated can follow complement='drop'"),
        ([{"class_path": "SSOP", "init_args": {"rank": 33}}], {}, "a rank of at most the width 32; got 33"),
        ([{"class_path": "SSOP", "init_args": {"rekey": True}}], {}, "expected rekey=false with undo='tail'"),
        (
            [{"class_path": "SSOP", "init_args": {"rank": 8, "secret_file": "no"}}],
            {},
            "expected a secret in secret_file",
        ),
        ([{"class_path": "SketchCompression", "init_args": {"at": "encoder"}}], {}, "at='encoder' has no use here"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    base: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    callbacks: list[Settings],
    more: Settings,
    message: str,
) -> None:
    assert cli.main(arguments(tmp_path, "run", {**with_links(base, *callbacks), **more})) != 0
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(message, shown), shown
    assert "Traceback" not in shown


def test_different_secrets_are_an_error_at_the_start(base: Settings, tmp_path: Path) -> None:
    settings = {**base, "strategy.layout": "tiers", "strategy.num_edges": 1}
    commands = []
    for name in ("one", "other"):
        (tmp_path / name).write_text(f"{name}\n")
        stage = {"class_path": "SSOP", "init_args": {"rank": 8, "undo": "edge", "secret_file": str(tmp_path / name)}}
        commands.append(arguments(tmp_path, "run", with_links(settings, stage)))
    ranks = fork_all(commands, tmp_path / "outputs")
    assert all(forked.returncode for forked in ranks)
    shown = " ".join("".join(forked.err for forked in ranks).split())
    assert "have different secrets for SSOP: give both the same secret_file" in shown


def test_ends_that_disagree_are_an_error_at_the_start(base: Settings, tmp_path: Path) -> None:
    settings = {**base, "strategy.layout": "tiers", "strategy.num_edges": 1}
    commands = [arguments(tmp_path, "run", with_links(settings, *used)) for used in ([SKETCH], [MEDIAN])]
    ranks = fork_all(commands, tmp_path / "outputs")
    assert all(forked.returncode for forked in ranks)
    shown = " ".join("".join(forked.err for forked in ranks).split())
    assert "stage 0 of the uplink differs: sketch 1/2 in 3 rows, calibrated" in shown
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.ckpt"))


# ---- in any other Lightning project ----------------------------------------------------------------------------------


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


def test_what_is_turned_is_turned_back_elsewhere(tmp_path: Path) -> None:
    """The model in between computes on turned states; without one in between, nothing is lost."""

    class Between(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Identity()

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.encoder(inputs)
            back = self.middle(hidden)
            self.seen.append(torch.stack([hidden, back]).detach())
            out: Tensor = self.head(back)
            return out

    plain, _ = fit_plain(tmp_path, make=Between)
    turning = SSOP(16, at="encoder", decode_at="middle", probes=probes())
    turned, _ = fit_plain(tmp_path, turning, make=Between)
    hidden, back = turned.seen[-1]
    assert (hidden - plain.seen[-1][0]).norm() > 0.1 * hidden.norm()
    assert_close({"back": back}, {"back": plain.seen[-1][1]}, atol=1e-4)
    assert_close({"head": turned.head.weight}, {"head": plain.head.weight}, atol=1e-4)
