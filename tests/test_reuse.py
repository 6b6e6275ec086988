"""Runs in which texts whose states changed little are not sent again."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl import cli
from elsa_pl.callbacks import LinkReuse
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.quantization import BlockFormat
from elsa_pl.links import Codec, LinkEnd, Stage, crossing
from elsa_pl.links.hiding import EncryptionStage, NoiseStage
from elsa_pl.links.perturbation import PerturbationStage
from elsa_pl.links.reuse import NO_SLOT, Memory, Receiver, ReuseStage, Sender
from elsa_pl.links.stages import ProjectionStage, QuantizationStage
from tests.runs import Run, Settings, arguments, assert_close, assert_equal, run_forked, run_here, write_data

WIDTH = 32
INT4 = {"class_path": "LinkQuantization", "init_args": {"bits": 4, "block": 8}}
PROJECTED = {"class_path": "LinkProjection", "init_args": {"ratio": 4, "learn": False}}
ENCRYPTED = {"class_path": "LinkEncryption"}
MONITOR = {"class_path": "CommunicationMonitor"}
QUANTIZED = QuantizationStage(BlockFormat(bits=4, block=8))
# without adapters in the front, which then never changes
FROZEN = {"model.lora": {"target_modules": [f"{block}.attention.self.query" for block in (1, 2, 3)]}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
STILL = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}


def reuse(threshold: float = 1e-3, **settings: Any) -> dict[str, Any]:
    return {"class_path": "LinkReuse", "init_args": {"threshold": threshold, **settings}}


def with_links(base: Settings, *callbacks: Settings) -> dict[str, Any]:
    return {**base, "trainer.callbacks": [*callbacks, MONITOR]}


def sent(run: Run, column: str = "payload_bytes") -> dict[tuple[int, str, str], int]:
    """What crossed in training, by round, link and direction."""
    rows = pd.read_csv(run.folder / "traffic.csv").query("phase == 'training'")
    sums = rows.groupby(["round", "link", "direction"])[column].sum()
    return {key: int(value) for key, value in sums.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four clients on two edges; two rounds, and in the first one all texts are there once."""
    return {
        **write_data(tmp_path_factory.mktemp("data")),
        "data.validation_fraction": 0.0,
        "data.num_probes": 16,
        "strategy.num_edges": 2,
        "strategy.local_steps": 4,
        "checkpoint.save_top_k": -1,
        "trainer.max_epochs": 2,
        "model.optimizer": SGD,
    }


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> list[Memory]:
    """Those that are used in a run of one process."""
    used: list[Memory] = []

    def watched(kind: type[Any]) -> Any:
        forward = kind.forward

        def watching(self: Any, states: Tensor) -> Tensor:
            if self not in used:
                used.append(self)
            out: Tensor = forward(self, states)
            return out

        return watching

    for kind in (Sender, Receiver):
        monkeypatch.setattr(kind, "forward", watched(kind))
    return used


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callbacks", [(), (INT4,)])
def test_without_reuse_nothing_changes_but_padding(base: Settings, tmp_path: Path, callbacks: Any) -> None:
    plain = run_here(tmp_path, "plain", with_links(base, *callbacks))
    run = run_here(tmp_path, "run", with_links(base, reuse(0), *callbacks))
    assert_close(run.adapters(), plain.adapters(), atol=1e-5)
    assert run.summary()["test_loss"] == pytest.approx(plain.summary()["test_loss"], abs=1e-5)
    before, after = sent(plain), sent(run)
    for number in range(2):
        assert 0 < after[number, "uplink", "backward"] < before[number, "uplink", "backward"]
        assert after[number, "downlink", "forward"] == before[number, "downlink", "forward"]


@pytest.mark.parametrize(
    ("callbacks", "more"),
    [
        ((), {}),
        ((INT4,), {"strategy.micro_batches": 3, "model.accumulate_grad_batches": 2}),
        ((INT4, ENCRYPTED), {"model.token_pooling.uplink": 3}),
        ((INT4,), {"model.plan": {"front": 1, "middle": 3, "tail": 0}}),
    ],
)
def test_what_does_not_change_is_sent_once(base: Settings, tmp_path: Path, callbacks: Any, more: Settings) -> None:
    """With a front that is never trained, and is as good from memory."""
    settings = {**base, **FROZEN, **more}
    plain = run_here(tmp_path, "plain", with_links(settings, *callbacks))
    run = run_here(tmp_path, "run", with_links(settings, reuse(), *callbacks))
    assert_close(run.adapters(), plain.adapters(), atol=1e-5)
    assert run.summary()["test_loss"] == pytest.approx(plain.summary()["test_loss"], abs=1e-5)
    before, after = sent(plain), sent(run)
    assert after[0, "uplink", "forward"] > 0.3 * before[0, "uplink", "forward"]
    assert after[1, "uplink", "forward"] < 0.2 * before[1, "uplink", "forward"]


@pytest.mark.parametrize("callbacks", [(), (INT4,), (INT4, ENCRYPTED)])
def test_nothing_but_slots_and_masks_crosses(base: Settings, tmp_path: Path, callbacks: Any) -> None:
    """In the last round of a run that learns nothing, back either."""
    run = run_here(tmp_path, "run", with_links({**base, "model.optimizer": STILL}, reuse(), *callbacks))
    messages, counted = sent(run, "messages"), sent(run)
    assert messages[1, "uplink", "forward"] == 4 * 4
    texts = 4 * 4 * 8
    sealed = 4 * 4 * (4 * 3 + 28) if ENCRYPTED in callbacks else 0  # two sizes and their number, nonce and tag
    assert counted[0, "uplink", "backward"] > 10 * sealed
    assert counted[1, "uplink", "backward"] == sealed
    masks = counted[1, "downlink", "forward"] / (4 * (WIDTH if not callbacks else 6))
    if ENCRYPTED not in callbacks:  # where the downlink's bytes tell how many tokens there are
        assert counted[1, "uplink", "forward"] == texts * 4 + masks
    else:
        assert texts * 4 + sealed < counted[1, "uplink", "forward"] < texts * (4 + 24) + sealed


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_layouts_are_equal(base: Settings, tmp_path: Path, micro_batches: int) -> None:
    """Bit for bit, whichever pass comes first."""
    settings = {
        **with_links(base, reuse(0.3, capacity=20), PROJECTED, INT4),
        "strategy.micro_batches": micro_batches,
        "model.accumulate_grad_batches": 2,
    }
    single = run_here(tmp_path, "single", settings)
    full = run_forked(tmp_path, "full", {**settings, "strategy.layout": "full", "strategy.num_hosts": 2}, 5)
    assert_equal(full.adapters(), single.adapters())
    assert sent(full) == sent(single)
    counted = sent(single)
    assert 0 < counted[1, "uplink", "backward"] < counted[0, "uplink", "backward"], "some texts, but not all"


def test_both_ends_keep_no_more_than_their_capacity(base: Settings, tmp_path: Path, memories: list[Memory]) -> None:
    run = run_here(tmp_path, "run", with_links({**base, **FROZEN}, reuse(capacity=5)))
    assert [type(memory) for memory in memories].count(Receiver) == 4
    assert [type(memory) for memory in memories].count(Sender) == 4
    assert [sorted(memory.kept) for memory in memories] == [list(range(5))] * 8
    counted = sent(run)
    assert 0.5 < counted[1, "uplink", "forward"] / counted[0, "uplink", "forward"] < 0.95


class Mover(Callback):
    """Gives each client another edge in every round."""

    def on_assign_clients(self, trainer: "pl.Trainer", assignment: dict[str, str]) -> dict[str, str]:
        other = {"edge-0": "edge-1", "edge-1": "edge-0"}
        moves = trainer.current_epoch % 2 == 1
        return {client: other[edge] if moves and client != "client-0" else edge for client, edge in assignment.items()}


def test_a_client_that_moves_begins_anew(base: Settings, tmp_path: Path, memories: list[Memory]) -> None:
    """It sends its texts again, and one that stays does not, although its middle is made anew beside the others."""
    settings = {**base, **FROZEN, "trainer.max_epochs": 3}
    mover = {"class_path": "tests.test_reuse.Mover"}
    plain = run_here(tmp_path, "plain", with_links(settings, mover))
    run = run_here(tmp_path, "run", with_links(settings, reuse(), mover))
    assert_close(run.adapters(), plain.adapters(), atol=1e-5)
    rows = pd.read_csv(run.folder / "traffic.csv").query("phase == 'training' and link == 'uplink' and round == 2")
    uplink = rows.groupby("client")["payload_bytes"].sum()
    assert uplink["client-0"] < 0.2 * uplink.drop("client-0").min()
    apart = {**with_links(settings, reuse(), mover), "strategy.layout": "full", "strategy.num_hosts": 2}
    full = run_forked(tmp_path, "full", apart, 5)
    assert_equal(full.adapters(), run.adapters())
    assert sent(full) == sent(run)


def test_a_resumed_run_sends_once_more(base: Settings, tmp_path: Path) -> None:
    settings = with_links({**base, **FROZEN}, reuse())
    whole = run_here(tmp_path, "whole", settings)
    resumed = run_here(tmp_path, "resumed", {**settings, "ckpt_path": str(whole.checkpoint(0))})
    assert_close(resumed.adapters(), whole.adapters(), atol=1e-5)
    assert sent(resumed)[1, "uplink", "forward"] > 3 * sent(whole)[1, "uplink", "forward"]


# ---- both ends alone -------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)


def halves(*more: Stage, threshold: float = 0.1, capacity: int = 4) -> tuple[LinkEnd, LinkEnd]:
    stages = [ReuseStage(threshold, capacity), *more]
    sender, receiver = (Codec("uplink.1-2-1", "uplink", stages, WIDTH, "client-0") for _ in range(2))
    return sender.side("encoder"), receiver.side("decoder")


def cross(ends: tuple[LinkEnd, LinkEnd], states: Tensor, slots: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """What crosses, what is received, and what the sender says about the texts."""
    with crossing(0, MASK, torch.tensor(slots, dtype=torch.int32)) as passing:
        rows = ends[0](states)
    assert passing.slots is not None
    with crossing(0, MASK, passing.slots):
        return rows, ends[1](rows), passing.slots.tolist()


@pytest.fixture
def states() -> Tensor:
    return torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def test_gradients_are_those_of_texts_that_were_sent(states: Tensor) -> None:
    """Against the same in plain torch: what was kept is a constant."""
    ends = halves()
    cross(ends, states, [0, 1, 2])
    changed = (states * torch.tensor([1.01, 1.5, 0.98])[:, None, None]).requires_grad_()
    _, received, said = cross(ends, changed, [0, 1, 2])
    assert said == [-2, 1, -4]
    expected = torch.stack([states[0], changed[1], states[2]]) * MASK[:, :, None]
    assert torch.equal(received, expected)
    weights = torch.randn(3, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((received.tanh() * weights).sum(), changed)
    (wanted,) = torch.autograd.grad((expected.tanh() * weights).sum(), changed)
    assert torch.equal(got, wanted)
    assert [bool(part.any()) for part in got] == [False, True, False]


def test_changes_are_measured_to_what_was_sent(states: Tensor) -> None:
    """And not to the pass before: small changes add up."""
    ends = halves()
    said = [cross(ends, states * 1.06**number, [0, NO_SLOT, 2])[2] for number in range(4)]
    assert said == [[0, -1, 2], [-2, -1, -4], [0, -1, 2], [-2, -1, -4]]


@pytest.mark.parametrize("stages", [(), (QUANTIZED,), (QUANTIZED, "sealed")])
def test_no_text_at_all_may_cross(states: Tensor, stages: tuple[Any, ...]) -> None:
    sealing = EncryptionStage()
    sealing.secret = "secret"
    ends = halves(*(sealing if stage == "sealed" else stage for stage in stages))
    _, first, _ = cross(ends, states, [0, 1, 2])
    states.requires_grad_()
    rows, again, said = cross(ends, states, [0, 1, 2])
    assert said == [-2, -3, -4]
    assert torch.equal(again, first)
    assert rows.numel() == (0 if "sealed" not in stages else 10)
    again.sum().backward()
    assert states.grad is not None
    assert not states.grad.any()


def test_a_text_has_its_slot_once_in_a_step() -> None:
    sender = Sender(0.1, 3)

    def batch(*texts: list[int], longest: int = 4) -> dict[str, Tensor]:
        rows = [text + [0] * (longest - len(text)) for text in texts]
        masks = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}

    first = sender.slots([batch([5], [6, 7]), batch([6, 7], [8, 0], [5, 0], longest=3)])
    assert [slots.tolist() for slots in first] == [[0, 1], [-1, 2, -1]], "an id of 0 is no padding"
    (second,) = sender.slots([batch([5, 0], [9], [8, 0], [5], [6, 7])])
    assert second.tolist() == [-1, -1, 2, 0, 1], "no more than three texts"
    assert sender.slots([{**batch([5]), "token_type_ids": torch.ones(1, 4, dtype=torch.long)}])[0].tolist() == [-1]
    sender.forget()
    assert sender.slots([batch([9])])[0].tolist() == [0]


def test_evaluations_pass(states: Tensor) -> None:
    encode, decode = halves()
    with crossing(3, MASK):
        assert torch.equal(decode(encode(states)), states)
    assert not any(end.kept for side in (encode, decode) for end in side.modules() if isinstance(end, Memory))


@pytest.mark.parametrize(
    ("slots", "rows", "reason"),
    [
        ([-2, -1, -1], 3, "expected the states of 3 tokens in slot 0; got nothing"),
        ([-1, -3, -1], 4, "expected the states of 2 tokens in slot 1; got 3 tokens"),
        ([-1, 4, -1], 6, "expected a slot below the capacity 4; got 4"),
        ([-1, -1, -1], 5, r"expected tokens \[6\]; got \[5\]"),
    ],
)
def test_slots_that_the_edge_does_not_have_are_refused(slots: list[int], rows: int, reason: str) -> None:
    _, decode = halves()
    (receiver,) = (end for end in decode.modules() if isinstance(end, Receiver))
    receiver.kept[1] = torch.zeros(3, WIDTH)
    with (
        crossing(0, MASK, torch.tensor(slots)),
        pytest.raises(ValueError, match=rf"stage 0 of links\.uplink\.1-2-1\.decoder\.\*: {reason}"),
    ):
        decode(torch.zeros(rows, WIDTH))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([NoiseStage(1)], "shows when a text comes again.*Gaussian noise.* is against: leave one of them out"),
        ([ProjectionStage(4, learn=True)], "earlier values of projection 1/4, learned.*: leave one of them out"),
        ([PerturbationStage(8, "edge", "keep", 4, True, 0)], "SS-OP of rank 8.* is against: leave one of them out"),
    ],
)
def test_stages_that_do_not_go_together(others: list[Stage], reason: str) -> None:
    own = ReuseStage(0.1, 4)
    for stages in ([own, *others], [*others, own]):
        with pytest.raises(ConfigurationError, match=reason):
            Codec("uplink.1-2-1", "uplink", stages, WIDTH)
    with pytest.raises(ConfigurationError, match=r"stage 1 of .*reuse.* comes after int4"):
        Codec("uplink.1-2-1", "uplink", [QUANTIZED, own], WIDTH)
    with pytest.raises(ConfigurationError, match=r"comes after reuse.*: put it before"):
        Codec("uplink.1-2-1", "uplink", [own, ReuseStage(0.1, 4)], WIDTH)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="finite threshold >= 0; got -1"):
        LinkReuse(-1)
    with pytest.raises(ValueError, match="capacity of at least one text; got 0"):
        LinkReuse(capacity=0)


def test_it_is_for_links_of_ours() -> None:
    trainer: Any = SimpleNamespace(strategy=object())
    with pytest.raises(ConfigurationError, match="it needs HierarchicalStrategy"):
        LinkReuse().setup(trainer, pl.LightningModule(), "fit")


def test_noise_beside_it_ends_a_run_before_it_starts(
    base: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path, "run", with_links(base, reuse(), {"class_path": "LinkNoise"}))) != 0
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search("stage 0 of uplink.* shows when a text comes again", shown), shown
    assert "Traceback" not in shown
