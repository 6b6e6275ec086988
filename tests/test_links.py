"""Runs whose links are compressed: what crosses is what was asked for, and nothing else about a run changes."""

import itertools
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from elsa_pl import cli
from elsa_pl.callbacks import SSOP, LinkEncryption
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.perturbation import Complement
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.links import LINKS, NOBODY, Codec, Link, Stage, crossing
from elsa_pl.links.hiding import EncryptionStage, NoiseStage
from elsa_pl.links.perturbation import PerturbationStage, Undo
from elsa_pl.links.stages import ProjectionStage, QuantizationStage, SketchStage
from elsa_pl.partition import SplitPlan
from elsa_pl.tiers.probes import ProbeDesk, ProbeModel
from tests.runs import (
    Run,
    Settings,
    arguments,
    assert_close,
    assert_equal,
    find_run,
    fork_all,
    make_module,
    run_forked,
    run_here,
    write_data,
)

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
ENCRYPTED = {"class_path": "LinkEncryption"}
NOISE = {"class_path": "LinkNoise", "init_args": {"scale": 1}}
DROPPED = {"class_path": "SSOP", "init_args": {"rank": 8, "undo": "edge", "complement": "drop"}}
TWO_PART = {"model.plan": {"front": 1, "middle": 3, "tail": 0}}
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


@pytest.fixture(scope="module")
def plain(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run whose links carry states as they are."""
    return run_here(tmp_path_factory.mktemp("plain"), "plain", base)


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
    # and what the other edge has, which did not fit it: both sides of both links
    other = {
        "SketchCompression": 2 * decoder if SKETCH in callbacks else 0,
        "LinkProjection": 2 * fitted["LinkProjection"],
        "SSOP": 3 * WIDTH * 16 if AT_TAIL in callbacks else 2 * fitted["SSOP"],
    }
    at_edge = sum(other.get(str(callback["class_path"]), 0) for callback in callbacks)
    assert counted["calibration"]["down"] == times * 4 * (4 * expected + at_edge)
    assert counted["calibration"]["up"] == times * 4 * at_edge


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


def test_a_projection_on_all_directions_changes_nothing(base: Settings, plain: Run, tmp_path: Path) -> None:
    rotated = run_here(tmp_path, "rotated", with_links(base, WHOLE))
    assert_close(rotated.adapters(), plain.adapters(), atol=2e-4)


def test_what_the_edge_undoes_changes_nothing(base: Settings, plain: Run, tmp_path: Path) -> None:
    turned = run_here(tmp_path, "turned", with_links(base, AT_EDGE))
    assert_close(turned.adapters(), plain.adapters(), atol=2e-4)
    assert turned.summary()["test_loss"] == pytest.approx(plain.summary()["test_loss"], abs=1e-4)


def test_encryption_changes_nothing(base: Settings, tmp_path: Path) -> None:
    plain = run_here(tmp_path, "plain", with_links(base, INT4))
    settings = {**with_links(base, INT4, ENCRYPTED), "strategy.layout": "full", "strategy.num_hosts": 2}
    sealed = run_forked(tmp_path, "sealed", settings, 5)
    assert_equal(sealed.adapters(), plain.adapters())
    sent, expected = sealed.summary()["bytes"], plain.summary()["bytes"]
    messages = 2 * 2 * 4  # rounds, steps, clients
    for link in LINKS:  # nonce and tag, the three sizes and their number
        assert sent[link]["backward"] - expected[link]["backward"] == messages * (12 + 16 + 16)


def test_compressed_links_change_what_is_learnt(base: Settings, plain: Run, tmp_path: Path) -> None:
    sketched = run_here(tmp_path, "sketched", with_links(base, SKETCH, INT8)).adapters()
    assert any(not torch.equal(sketched[name], value) for name, value in plain.adapters().items())


@pytest.mark.parametrize("callbacks", [(AT_TAIL, SKETCH, INT8), (LEARNED, INT4)])
def test_layouts_are_equal(base: Settings, tmp_path: Path, callbacks: tuple[Settings, ...]) -> None:
    settings = with_links(base, *callbacks)
    single = run_here(tmp_path, "single", settings)
    full = run_forked(tmp_path, "full", {**settings, "strategy.layout": "full", "strategy.num_hosts": 2}, 5)
    assert_equal(full.adapters(), single.adapters())
    # forwards, padding differs with the share of the evaluation that a host has
    sent, expected = full.summary()["bytes"], single.summary()["bytes"]
    for link, way in [*WAYS[1::2], *itertools.product(("adapters", "calibration"), ("up", "down"))]:
        assert sent[link][way] == expected[link][way] > 0, (link, way)
    if AT_TAIL not in callbacks:  # whose rotation a test batch meets depends on who evaluates it
        assert full.summary()["test_loss"] == pytest.approx(single.summary()["test_loss"], rel=1e-5)


@pytest.mark.parametrize("callbacks", [(AT_TAIL, SKETCH, INT8), (LEARNED, INT4), (AT_EDGE, INT4), (NOISE,)])
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
    stacks: dict[str, list[Settings]] = {
        "plain": [audit],
        "turned": [AT_EDGE, audit],
        "sealed": [INT4, ENCRYPTED, audit],
    }
    for name, callbacks in stacks.items():
        run = run_here(tmp_path, name, {**with_links(base, *callbacks), **more}, pictures=True)
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
    blind = tables["sealed"]["link", "blind"]
    assert tables["sealed"]["link"].max() < blind + 0.1 < 0.5 * tables["sealed"]["edge"].max()
    labels = table[table["reader"] == "labels"].set_index("what")
    assert set(labels.index) == {"uplink", "middle", "gradients", "shuffled"}
    assert labels["floor"].nunique() == 1
    assert 0.25 <= labels["floor"].iloc[0] < 0.6, "of four labels, in twelve texts"
    assert 0.2 < labels.loc["shuffled", "share"] < 0.7


@pytest.mark.parametrize("audited", [False, True])
def test_a_run_is_audited_again_without_training(base: Settings, tmp_path: Path, audited: bool) -> None:
    """By validate, with link tensors that the checkpoint has; of the same adapters, the same figures."""
    audit = {"class_path": "PrivacyAudit", "init_args": {"num_texts": 12, "num_known": 4, "pictures": False}}
    callbacks = (LEARNED, INT4, *([audit] if audited else []))
    run = run_here(tmp_path, "run", {**with_links(base, *callbacks), "data.num_probes": 40})
    again = ["validate", "--run", str(run.folder), "--name", "again", "--output_dir", str(tmp_path)]
    again += ["--ckpt_path", str(run.checkpoint(1))]
    if not audited:
        again += ["--trainer.callbacks+=PrivacyAudit", "--trainer.callbacks.num_texts=12"]
        again += ["--trainer.callbacks.num_known=4", "--trainer.callbacks.pictures=false"]
    assert cli.main(again) == 0
    folder = find_run(tmp_path, "again").folder
    assert "<h2>Privacy</h2>" in (folder / "report.html").read_text()
    table = pd.read_csv(folder / "privacy.csv")
    assert set(table["round"]) == {1}, "those of the checkpoint"
    assert table["share"].between(0, 1).all()
    assert not table.duplicated(["reader", "what"]).any()
    if audited:
        first = pd.read_csv(run.folder / "privacy.csv").query("round == 1").reset_index(drop=True)
        columns = ["round", "reader", "what", "share", "floor", "cap", "accuracy"]
        pd.testing.assert_frame_equal(table[columns], first[columns])


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "cols.csv",
            "text,label\na b c,x\nd e f,y\n",
            "PrivacyAudit.public_file .*, which everybody sees, got also label",
        ),
        (
            "other.csv",
            "words\na b c\n",
            "expected a column 'text' in PrivacyAudit.public_file .*got words: set text_col",
        ),
        ("empty.csv", "text\n", "expected rows, got none in PrivacyAudit.public_file .*: give a file with data"),
        ("zero.csv", "", "PrivacyAudit.public_file: expected a header and rows, got the empty file .*: give a file"),
        ("x.txt", "hello", "expected PrivacyAudit.public_file to end in one of .*: convert or rename it"),
        ("missing.csv", None, "expected PrivacyAudit.public_file to exist, got .*missing.csv"),
        ("one.csv", "text\nhello\n", "expected at least 2 texts in PrivacyAudit.public_file .*; got 1: add texts"),
    ],
)
def test_public_texts_are_read_before_the_start(
    base: Settings,
    audit_run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    content: str | None,
    message: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    words = arguments(tmp_path, "run", base)
    if command == "validate":
        words = ["validate", "--run", str(audit_run.folder), "--name", "run", "--output_dir", str(tmp_path)]
    words += ["--trainer.callbacks+=PrivacyAudit", f"--trainer.callbacks.public_file={path}"]
    assert cli.main(words) != 0
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(message, shown), shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists(), "nothing was trained"


@pytest.fixture(scope="module")
def audit_run(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without links or probes, to be audited later."""
    settings = {**base, "trainer.max_epochs": 1, "data.num_probes": 0}
    return run_here(tmp_path_factory.mktemp("runs"), "plain", settings)


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


@pytest.mark.parametrize(
    ("undo", "complement", "changed"),
    [("tail", "keep", set()), ("tail", "drop", {"mean"}), ("edge", "keep", {"subspace"})],
)
def test_training_does_not_change_how_the_middle_sees_states_turned(
    undo: Undo, complement: Complement, changed: set[str]
) -> None:
    """Adapters that have learnt on states that are turned are of no use on states that are turned in another way."""
    model = ProbeModel(make_module({}).build(), "classification", torch.device("cpu"), nullcontext)
    ids = torch.arange(1, 161).view(10, 16)
    plan = SplitPlan().resolve(4)
    desk = ProbeDesk([model], [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], plan)
    ssop = PerturbationStage(16, undo, complement, 4, rekey=False, seed=0)

    def make(plan: SplitPlan) -> dict[Link, Codec]:
        return {link: Codec(link, link, [ssop], WIDTH) for link in LINKS}

    initial = model.adapters()
    generator = torch.Generator().manual_seed(0)
    trained = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in initial.items()}
    before, after = (desk.fit_links(adapters, [plan], make) for adapters in (initial, trained))
    assert any(name.endswith("subspace") for name in after)
    assert {name.rsplit(".", 1)[1] for name in after if not torch.equal(after[name], before[name])} == changed


def test_noise_is_another_one_for_each_pass(states: Tensor) -> None:
    noise = NoiseStage(0.5)
    noise.seed = 3
    seen = {}
    for client in ("client-0", "client-1", NOBODY):
        codec = Codec("uplink.1-2-1", "uplink", [noise], WIDTH, client)
        codec.fit(states)
        for number in (1, 2):
            with crossing(number):
                seen[client, number] = codec(states) - states
    again = Codec("uplink.1-2-1", "uplink", [noise], WIDTH, "client-0")
    again.fit(states)
    with crossing(1):
        assert torch.equal(again(states) - states, seen["client-0", 1])
    added = [value for (client, _), value in seen.items() if client != NOBODY]
    for value in added:
        torch.testing.assert_close(value.std(0), 0.5 * states.std(0), rtol=0.2, atol=0)
    cosines = [float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) for a, b in itertools.combinations(added, 2)]
    assert max(map(abs, cosines)) < 0.05
    assert not seen[NOBODY, 1].any()


def test_noise_depends_on_all_of_its_seed(states: Tensor) -> None:
    """A torch.Generator keeps the lower 32 bits of what it is given, few enough to try them all."""
    noise = NoiseStage(0.5)
    noise.seed = 3
    codec = Codec("uplink.1-2-1", "uplink", [noise], WIDTH, "client-0")
    codec.fit(states)
    guessed = derive_seed(derive_seed(3, "noise", "uplink", "client-0"), 0) % 2**32
    drawn = torch.randn(states.shape, generator=torch.Generator().manual_seed(guessed))
    added = codec(states) - states
    assert abs(torch.cosine_similarity(drawn.flatten(), added.flatten(), 0)) < 0.05


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("changed", ["nothing", "number", "mask", "slots"])
def test_a_sealed_message_belongs_to_its_pass(states: Tensor, link: Link, changed: str) -> None:
    stage = EncryptionStage()
    stage.secret = "secret"
    codec = Codec(f"{link}.1-2-1", link, [stage], WIDTH, "client-0")
    mask, slots = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 1], dtype=torch.int32)
    with crossing(5, mask, slots):
        sent = codec.side("encoder")(states[:6])
    number = 6 if changed == "number" else 5
    mask = mask.logical_not() if changed == "mask" else mask.long()
    slots = slots + 1 if changed == "slots" else slots
    with crossing(number, mask, slots):
        if changed == "number" or (link == "uplink" and changed != "nothing"):
            with pytest.raises(ValueError, match="of this pass"):
                codec.side("decoder")(sent)
        else:  # nothing goes with states that come down
            assert torch.equal(codec.side("decoder")(sent), states[:6])


def test_calibrated_decoding_loses_less_than_the_median(states: Tensor) -> None:
    lost = {}
    for decoding in ("calibrated", "median", "mean"):
        codec = Codec("uplink.1-2-1", "uplink", [SketchStage(2, decoding, 3, 1e-4, 0)], WIDTH)
        codec.fit(states[:200])
        lost[decoding] = float((codec(states[200:]) - states[200:]).norm() / states[200:].norm())
    assert lost["calibrated"] < 0.5 < 1 < lost["mean"] < lost["median"]


@pytest.mark.parametrize("name", ["sketch", "int8", "encryption"])
def test_states_of_low_precision_are_sent_in_full(states: Tensor, name: str) -> None:
    """As autocast makes them; `LinkEncryption` takes nothing else."""
    encryption = EncryptionStage()
    encryption.secret = "secret"
    stages: dict[str, Stage] = {
        "sketch": SketchStage(2, "median", 3, 1e-4, 0),
        "int8": QuantizationStage(BlockFormat(bits=8, block=8)),
        "encryption": encryption,
    }
    codec = Codec("uplink.1-2-1", "uplink", [stages[name]], WIDTH, "client-0")
    with torch.autocast("cpu", torch.bfloat16):
        sent = codec.side("encoder")(states.bfloat16())
        assert sent.dtype == torch.float32
        assert torch.equal(codec.side("decoder")(sent), codec(states.bfloat16().float()))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callbacks", "more", "message"),
    [
        ([AT_TAIL], TWO_PART, "expected a tail in every plan with SS-OP of rank 16, undone at the tail"),
        (
            [AT_TAIL],
            {"model.client_plans": {"client-0": TWO_PART["model.plan"]}},
            "expected a tail in every plan with SS-OP of rank 16, undone at the tail",
        ),
        ([INT4, ENCRYPTED], TWO_PART, "with which labels, losses and logits would cross readable beside them"),
        (
            [{"class_path": "LinkQuantization", "init_args": {"links": ["downlink"]}}],
            TWO_PART,
            "LinkQuantization is for the downlink, which a plan without a tail does not have",
        ),
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
        (
            [{"class_path": "PrivacyAudit", "init_args": {"at": "encoder", "public": [], "special_ids": [1]}}],
            {},
            "beside links and data module, where they have no use; got at and public and special_ids: leave it out",
        ),
        ([{"class_path": "PrivacyAudit", "init_args": {"private": []}}], {}, "no use; got private: leave it out"),
        ([{"class_path": "PrivacyAudit", "init_args": {"num_texts": 20}}], {}, "0 < num_known <= num_texts / 2"),
        ([ENCRYPTED, INT8], {}, r"stage 1 of uplink.* \(int8 .* comes after encryption"),
        ([{"class_path": "LinkNoise", "init_args": {"scale": 0}}], {}, "expected a finite scale > 0; got 0"),
        (
            [{"class_path": "LinkEncryption", "init_args": {"secret_file": "no"}}],
            {},
            "expected a secret in secret_file; got none in no: see the help of LinkEncryption",
        ),
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


def test_a_run_goes_on_with_what_it_has_learnt_on(
    base: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def turned(rank: int, secret: str) -> Settings:
        (tmp_path / secret).write_text(secret)
        return {"class_path": "SSOP", "init_args": {"rank": rank, "secret_file": str(tmp_path / secret)}}

    run = run_here(tmp_path, "run", {**with_links(base, turned(8, "one")), "trainer.max_epochs": 1})
    more = {"ckpt_path": str(run.checkpoint(0)), "trainer.max_epochs": 2}
    for callbacks, message in (
        ([turned(9, "one")], "links undone at the tail is ['SS-OP of rank 8, undone at the tail"),
        ([], "undone at the tail, complement keep, seed 0'] in the checkpoint and None in the settings"),
        ([turned(8, "other")], "expected the secret that the checkpoint was made with"),
    ):
        assert cli.main(arguments(tmp_path, "again", {**with_links(base, *callbacks), **more})) != 0
        shown = " ".join(capsys.readouterr().err.split())
        assert message in shown, shown
        assert "Traceback" not in shown
    assert "one" not in str(run.content()["elsa_secrets"])
    run_here(tmp_path, "resumed", {**with_links(base, turned(8, "one")), **more})


@pytest.mark.parametrize(
    ("callback", "roles"), [(LinkEncryption, ("edge", "host")), (SSOP, ("host",))], ids=["LinkEncryption", "SSOP"]
)
def test_sites_without_need_of_a_secret_need_no_file(callback: type[SSOP | LinkEncryption], roles: Any) -> None:
    for role in ("cloud", "edge", "host"):
        world = SimpleNamespace(role=role)
        trainer: Any = SimpleNamespace(
            strategy=SimpleNamespace(layout="site", world=world, gather_clients=None), callbacks=[]
        )
        module: Any = SimpleNamespace(seed=0)
        refused = pytest.raises(ConfigurationError, match="expected a secret in secret_file; got none in no")
        with refused if role in roles else nullcontext():
            callback(secret_file="no").setup(trainer, module, "fit")
        refused = pytest.raises(ConfigurationError, match=r"between sites .* needs secret_file")
        with refused if role in roles else nullcontext():
            callback().setup(trainer, module, "fit")


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
    assert "have different secrets for SSOP or LinkEncryption: give both the same secret_file" in shown


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            {"trainer.callbacks": [SKETCH]},
            {"trainer.callbacks": [MEDIAN]},
            "stage 0 of the uplink differs: sketch 1/2 in 3 rows, calibrated",
        ),
        (
            {"model.token_pooling.uplink": "first"},
            {"model.token_pooling.downlink": 3},
            "model.token_pooling differs: uplink and downlink are ('first', None) at cloud, (None, 3) at host-0",
        ),
        ({"strategy.adapter_bits": 8}, {}, "strategy.adapter_bits differs: 8 at cloud, 32 at host-0: give both"),
        (
            {"strategy.aggregator": "stacked", "model.client_ranks": {"client-1": 4}},
            {"strategy.aggregator": "stacked"},
            "model.client_ranks differs: {'client-1': 4} at cloud, {} at host-0: give both",
        ),
    ],
)
def test_ends_that_disagree_are_an_error_at_the_start(
    base: Settings, tmp_path: Path, one: Settings, other: Settings, message: str
) -> None:
    settings = {**base, "strategy.layout": "tiers", "strategy.num_edges": 1}
    commands = [arguments(tmp_path, "run", {**settings, **own}) for own in (one, other)]
    ranks = fork_all(commands, tmp_path / "outputs")
    assert all(forked.returncode for forked in ranks)
    shown = " ".join("".join(forked.err for forked in ranks).split())
    assert message in shown, shown
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.ckpt"))
