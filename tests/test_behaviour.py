"""Runs whose clients are compared, judged, moved and recut: none of that may change what is learnt without faults."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from elsa_pl import cli
from elsa_pl.callbacks import BehaviorClustering, LatencyAwareAssignment, TrustScoring, pictures
from elsa_pl.datamodules.faults import corrupt
from elsa_pl.functional.factors import to_rank
from elsa_pl.functional.profiles import ProfileSettings, draw_profile
from elsa_pl.partition import SplitPlan
from elsa_pl.strategies import fleet
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

CLUSTERING = {"class_path": "BehaviorClustering", "init_args": {"width": 8, "warmup_rounds": 2, "every_n_rounds": 1}}
TRUST = {"class_path": "TrustScoring", "init_args": {"min_trust": 0.0}}
ASSIGNMENT = {"class_path": "LatencyAwareAssignment", "init_args": {"behaviour_weight": 50.0}}
SPLITTING = {"class_path": "ResourceAwareSplitting"}
ALL = (CLUSTERING, TRUST, ASSIGNMENT, SPLITTING)
PICTURES = {"divergences.png", "clients.png", "trust.png", "assignment.png"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six clients of different kinds on two edges, three rounds; one average an edge in each round."""
    return {
        **write_data(tmp_path_factory.mktemp("data")),
        "data.num_clients": 6,
        "data.num_probes": 24,
        "profile": {"distribution": "mixed"},
        "strategy.num_edges": 2,
        "trainer.max_epochs": 3,
        "checkpoint.save_top_k": -1,
        # steps in proportion to the gradients: Adam's would turn the rounding of sums into steps
        "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
    }


def with_callbacks(base: Settings, callbacks: Sequence[Any], **more: Any) -> dict[str, Any]:
    return {**base, "trainer.callbacks": list(callbacks), **more}


@pytest.fixture(scope="module")
def plain(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_here(tmp_path_factory.mktemp("plain"), "plain", base)


@pytest.fixture(scope="module")
def watched(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything on, and everybody trusted whatever they do: weights stay those of the plain run."""
    callbacks = [CLUSTERING, ASSIGNMENT, SPLITTING]
    return run_here(tmp_path_factory.mktemp("watched"), "watched", with_callbacks(base, callbacks))


@pytest.fixture(scope="module")
def judged(base: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything on, trust too."""
    return run_here(tmp_path_factory.mktemp("judged"), "judged", with_callbacks(base, ALL))


def state_of(run: Run, callback: str, epoch: int | None = None) -> dict[str, Any]:
    states = run.content(epoch)["callbacks"]
    return dict(next(state for key, state in states.items() if key.startswith(callback)))


def placements(run: Run, first: int = 0) -> list[dict[str, str]]:
    return [state_of(run, "LatencyAwareAssignment", epoch)["assignment"] for epoch in range(first, 3)]


def test_moving_and_recutting_clients_changes_nothing_that_is_learnt(plain: Run, watched: Run) -> None:
    """A mean of means is the flat mean, and any cut computes what the uncut model does."""
    first, *later = placements(watched)
    assert any(assignment != first for assignment in later), "somebody moved, or this shows nothing"
    plans = state_of(watched, "ResourceAwareSplitting")["plans"]
    assert len({tuple(plan) for plan in plans.values()}) > 1, "clients are cut differently, or this shows nothing"
    assert_close(watched.adapters(), plain.adapters(), atol=1e-6)


def test_what_is_left_behind(judged: Run) -> None:
    run = judged
    assert {path.name for path in run.folder.iterdir()} >= PICTURES
    clients = {f"client-{index}" for index in range(6)}
    for epoch in range(3):
        row = run.metrics()[epoch]
        assert {f"trust/{client}" for client in clients} <= row.keys()
        assert row["simulated/round_s"] > 0
    times = [run.metrics()[epoch]["simulated/time_s"] for epoch in range(3)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(sum(run.metrics()[epoch]["simulated/round_s"] for epoch in range(3)))
    trust = state_of(run, "TrustScoring")
    assert trust["trust"].keys() == clients
    assert all(len(scores) == 3 for scores in trust["history"].values())
    assert run.summary()["bytes"]["behaviour"]["up"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("layout", "num_processes"),
    [({"strategy.layout": "tiers", "strategy.num_hosts": 2}, 3), ({"strategy.layout": "full"}, 4)],
    ids=["tiers", "full"],
)
def test_layouts_agree(layout: Settings, num_processes: int, base: Settings, judged: Run, tmp_path: Path) -> None:
    run = run_forked(tmp_path / "runs", "run", {**with_callbacks(base, ALL), **layout}, num_processes)
    assert_equal(run.adapters(), judged.adapters())
    assert state_of(run, "TrustScoring") == state_of(judged, "TrustScoring")
    assert placements(run) == placements(judged)
    assert run.metrics()[2]["simulated/time_s"] == judged.metrics()[2]["simulated/time_s"]


def test_resumed_equals_uninterrupted(base: Settings, judged: Run, tmp_path: Path) -> None:
    """Trust, clusters, places and plans come back with the checkpoint of a round."""
    whole = judged
    assert placements(whole)[0] != placements(whole)[-1]
    resumed = run_here(tmp_path, "resumed", with_callbacks(base, ALL, ckpt_path=str(whole.checkpoint(0))))
    assert_equal(resumed.adapters(), whole.adapters())
    for callback in ("TrustScoring", "ResourceAwareSplitting"):
        assert state_of(resumed, callback) == state_of(whole, callback)
    assert placements(resumed, first=1) == placements(whole, first=1)
    got, expected = (state_of(run, "LatencyAwareAssignment")["shown"] for run in (resumed, whole))
    assert_equal(got, expected)
    assert state_of(resumed, "BehaviorClustering")["clusters"] == state_of(whole, "BehaviorClustering")["clusters"]
    assert resumed.metrics()[2]["simulated/time_s"] == pytest.approx(whole.metrics()[2]["simulated/time_s"])


@pytest.mark.parametrize("removed", ALL, ids=lambda callback: str(callback["class_path"]))
def test_each_can_be_left_out(removed: dict[str, Any], base: Settings, tmp_path: Path) -> None:
    rest = [callback for callback in ALL if callback is not removed]
    run = run_here(tmp_path, "rest", with_callbacks(base, rest, **{"trainer.max_epochs": 2}))
    assert run.summary()["rounds"] == 2


def test_a_hostile_client_loses_trust_and_its_weight(base: Settings, tmp_path: Path) -> None:
    hostile = {
        "data.faults": {"client-2": "sign_flip"},
        "data.fault_scale": 20,
        "data.partition": "iid",
        "model.optimizer": ADAM,
        "strategy.local_steps": 6,
    }
    trusting = run_here(tmp_path, "trust", with_callbacks(base, [TrustScoringAt(0.3)], **hostile))
    trust = state_of(trusting, "TrustScoring")["trust"]
    honest = [score for client, score in trust.items() if client != "client-2"]
    assert trust["client-2"] < 0.3 < min(honest)
    assert sorted(honest)[2] > 0.8
    blind = run_here(tmp_path, "blind", {**base, **hostile})
    assert trusting.metrics()[2]["val_loss"] < blind.metrics()[2]["val_loss"]


ADAM = {"class_path": "AdamW", "init_args": {"lr": 0.01}}


def TrustScoringAt(min_trust: float) -> dict[str, Any]:  # it makes one
    return {"class_path": "TrustScoring", "init_args": {"min_trust": min_trust}}


def test_a_silent_client_is_left_out(base: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = {"data.faults": {"client-2": "silent"}, "strategy.round_timeout_s": 1, "trainer.max_epochs": 2}
    with caplog.at_level(logging.WARNING):
        run = run_here(tmp_path, "silent", with_callbacks(base, ALL, **silent))
    assert "left out client-2" in caplog.text
    assert run.summary()["rounds"] == 2
    assert "client-2" not in state_of(run, "TrustScoring")["trust"]


class Poison(Callback):
    """Makes the adapters of a client NaN before they are submitted, from the second round on.

    Args:
        client: whose.
    """

    rounds_poisoned = 0

    def __init__(self, client: str) -> None:
        self._client = client

    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: object) -> None:
        strategy: Any = trainer.strategy
        if trainer.current_epoch and trainer.fit_loop.epoch_loop.batch_idx + 1 == strategy.steps_per_round:
            client = strategy.rounds.clients[self._client]
            client.load({name: torch.full_like(value, torch.nan) for name, value in client.adapters().items()})
            type(self).rounds_poisoned += 1


def test_updates_that_are_not_finite_never_count(
    base: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Poison.rounds_poisoned = 0
    poison = {"class_path": "tests.test_behaviour.Poison", "init_args": {"client": "client-2"}}
    trusting = {"class_path": "TrustScoring", "init_args": {"min_trust": 0.0, "smoothing": 0.0}}
    with caplog.at_level(logging.WARNING):
        run = run_here(tmp_path, "poisoned", with_callbacks(base, [CLUSTERING, trusting, ASSIGNMENT, poison]))
    assert Poison.rounds_poisoned == 2
    assert "client-2 is left out of the clusters" in caplog.text
    trust = state_of(run, "TrustScoring")["trust"]
    assert trust["client-2"] == 0
    assert max(trust.values()) > 0.8
    assert all(value.isfinite().all() for value in run.adapters().values())
    assert not torch.equal(*(torch.cat([v.flatten() for v in run.adapters(epoch).values()]) for epoch in (0, 2)))
    Poison.rounds_poisoned = 0
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        blind = run_here(tmp_path, "blind", {**base, "trainer.callbacks": [poison]})
    assert Poison.rounds_poisoned == 2
    assert caplog.text.count("edge left out client-2: adapters that are not finite") == 2
    assert all(value.isfinite().all() for value in blind.adapters().values())


def test_faults_strike_in_each_edge_round(base: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flipped updates go the other way, and noise is drawn anew each time."""
    changes: dict[str, list[torch.Tensor]] = {"sign_flip": [], "random": []}

    def watching(kind: Any, submitted: Any, received: Any, *rest: Any) -> Any:
        sent = corrupt(kind, submitted, received, *rest)
        assert sent is not None
        honest, hostile = (
            torch.cat([(side[name] - received[name]).flatten() for name in submitted]) for side in (submitted, sent)
        )
        changes[kind].append(torch.stack([honest, hostile]))
        return sent

    monkeypatch.setattr(fleet, "corrupt", watching)
    settings = {
        "data.faults": {"client-1": "sign_flip", "client-2": "random"},
        "data.fault_scale": 3,
        "strategy.edge_rounds": 2,
        "trainer.max_epochs": 2,
    }
    run = run_here(tmp_path, "faulty", with_callbacks(base, [CLUSTERING, TrustScoringAt(0.3)], **settings))
    assert all(value.isfinite().all() for value in run.adapters().values())
    assert len(changes["sign_flip"]) == len(changes["random"]) == 4
    for honest, hostile in changes["sign_flip"]:
        torch.testing.assert_close(hostile, -3 * honest, atol=1e-6, rtol=1e-3)
    directions = torch.stack([change[1] / change[1].norm() for change in changes["random"]])
    assert (directions @ directions.T - torch.eye(4)).abs().max() < 0.1, "noise repeats"


def test_the_lost_take_no_place_at_an_edge() -> None:
    clients = [f"client-{index}" for index in range(5)]
    network = draw_profile(ProfileSettings(distribution="mixed"), clients, ["edge-0", "edge-1"], seed=0)
    before = dict(zip(clients, ["edge-0", "edge-1", "edge-0", "edge-1", "edge-0"], strict=True))
    strategy = SimpleNamespace(network=network, workload=None, lost_clients=frozenset())
    trainer: Any = SimpleNamespace(strategy=strategy, callbacks=[])
    assignment = LatencyAwareAssignment(capacity=2)
    with pytest.raises(ValueError, match="5 clients"):
        assignment.on_assign_clients(trainer, before)
    strategy.lost_clients = frozenset({"client-0"})
    after = assignment.on_assign_clients(trainer, before)
    assert after["client-0"] == "edge-0"
    assert sorted(edge for client, edge in after.items() if client != "client-0") == ["edge-0"] * 2 + ["edge-1"] * 2


def test_the_trade_off_is_drawn_from_the_state(judged: Run, tmp_path: Path) -> None:
    """After a run that was resumed and did not assign clients again."""
    state = state_of(judged, "LatencyAwareAssignment")
    assert [f"edge-{edge}" for edge in state["shown"]["chosen"].tolist()] == list(state["assignment"].values())
    resumed = LatencyAwareAssignment()
    resumed.load_state_dict(state)
    trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False, accelerator="cpu")
    resumed.on_fit_end(trainer, pl.LightningModule())
    assert (tmp_path / "assignment.png").is_file()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_trade_off_is_between_assignments_of_the_kind_that_was_asked_for(
    sign: int, judged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []
    monkeypatch.setattr(pictures, "draw_trade_off", lambda weights, *_, **__: drawn.append(weights))
    monkeypatch.setattr(pictures, "save", lambda *_: None)
    assignment = LatencyAwareAssignment(behaviour_weight=sign * 2.0)
    assignment.load_state_dict(state_of(judged, "LatencyAwareAssignment"))
    trainer = pl.Trainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False, accelerator="cpu")
    assignment.on_fit_end(trainer, pl.LightningModule())
    ((*weights, own),) = drawn
    assert own == 2.0 * sign
    assert weights[0] == 0
    assert all(sign * weight > 0 for weight in weights[1:])


class Own(pl.LightningModule):
    """A project without our strategy, whose model says what its one weight is.

    Args:
        lr: learning rate.
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._lr = lr

    def probe_step(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return batch + self.weight, (batch + self.weight).softmax(-1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return -self.weight.sum()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(3, 1))  # type: ignore[arg-type]  # a tensor has what it takes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self._lr)


def fit_own(folder: Path, epochs: int, clustering: BehaviorClustering, lr: float = 1.0, **how: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[clustering],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Own(lr), **how)
    return trainer


def probes() -> list[torch.Tensor]:
    return [torch.randn(16, 4, generator=torch.Generator().manual_seed(0))]


def test_another_project_goes_on_from_its_first_base(tmp_path: Path) -> None:
    first = BehaviorClustering(width=2, every_n_rounds=1, probes=probes(), pictures=False)
    fit_own(tmp_path, 1, first).save_checkpoint(tmp_path / "own.ckpt")
    second = BehaviorClustering(width=2, every_n_rounds=1, probes=probes(), pictures=False)
    trainer = fit_own(tmp_path, 2, second, ckpt_path=tmp_path / "own.ckpt")
    own: Any = trainer.lightning_module
    assert own.weight.item() == 6, "it has trained before and after"
    assert second.round == 2
    assert second._base is not None
    torch.testing.assert_close(second._base[0], probes()[0])


def test_nobody_compared_is_no_comparison(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clustering = BehaviorClustering(width=2, every_n_rounds=1, probes=probes(), pictures=False)
    fit_own(tmp_path, 1, clustering, lr=float("inf"))
    assert "rank-0 is left out of the clusters" in caplog.text
    assert clustering.round == 0
    assert clustering.divergences is None


def test_the_base_is_the_same_after_clients_were_tried() -> None:
    model = ProbeModel(make_module({}).build(), "classification", torch.device("cpu"), nullcontext)
    ids = torch.arange(24).view(3, 8)
    plan = SplitPlan().resolve(3)
    desk = ProbeDesk([model], [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], plan)
    before = desk.base()
    changed = {name: value + 0.1 for name, value in model.adapters().items()}
    tried = desk.evaluate({"client-0": changed}, {"client-0": plan})["client-0"]
    assert not torch.equal(tried[1], before[1])
    assert all(torch.equal(*pair) for pair in zip(desk.base(), before, strict=True))


def test_adapters_of_a_lower_rank_are_tried_as_they_are() -> None:
    """Whatever the model was tried with before: nothing of that is left in the other directions."""
    model = ProbeModel(make_module({}).build(), "classification", torch.device("cpu"), nullcontext)
    ids = torch.arange(24).view(3, 8)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    full = {name: value + 0.1 for name, value in model.adapters().items()}
    low = to_rank(full, 2)
    plan = SplitPlan().resolve(4)
    whole = model.evaluate(full, batches, plan)
    tried = model.evaluate(low, batches, plan)
    expected = model.evaluate(to_rank(low, 8), batches, plan)
    assert all(torch.equal(*pair) for pair in zip(tried, expected, strict=True))
    assert not torch.equal(tried[1], whole[1])


class Dawdler(TrustScoring):
    """Makes each edge take its time before it looks at its clients.

    Args:
        seconds: how much.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def probes_due(self, trainer: "pl.Trainer") -> bool:
        strategy: Any = trainer.strategy
        if strategy.world.role == "edge":
            time.sleep(self._seconds)
        return super().probes_due(trainer)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_others_wait_while_an_edge_looks_at_its_clients(base: Settings, tmp_path: Path) -> None:
    dawdler = {"class_path": "tests.test_behaviour.Dawdler", "init_args": {"seconds": 12}}
    patience = {"strategy.round_timeout_s": 5, "strategy.call_timeout_s": 5, "trainer.max_epochs": 1}
    full = {"strategy.layout": "full", "strategy.num_edges": 1}
    run = run_forked(tmp_path / "runs", "run", {**with_callbacks(base, [dawdler]), **full, **patience}, 3)
    assert run.summary()["rounds"] == 1
    assert run.metrics()[0]["clients_lost"] == 0


class Quitter(Callback):
    """Ends a process once the clients are placed.

    Args:
        worker: which.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        strategy: Any = trainer.strategy
        if strategy.world.worker == self._worker:
            os._exit(7)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("worker", "rank"), [("edge-0", 1), ("host-0", 3)])
def test_the_clients_are_compared_and_placed_without_the_lost(
    worker: str, rank: int, base: Settings, tmp_path: Path
) -> None:
    quitter = {"class_path": "tests.test_behaviour.Quitter", "init_args": {"worker": worker}}
    settings = {**with_callbacks(base, [*ALL, quitter]), "strategy.layout": "full", "strategy.num_hosts": 2}
    ranks = fork_all([arguments(tmp_path / "runs", "run", settings)] * 5, tmp_path / "outputs")
    codes = [forked.returncode for forked in ranks]
    assert codes[rank] == 7
    assert set(codes[:rank] + codes[rank + 1 :]) == {0}, ranks[0].err
    run = find_run(tmp_path / "runs", "run")
    assert run.summary()["rounds"] == 3
    stays = f"stay as they are from here on, because {worker} is lost"
    assert ranks[0].err.count(stays) == (1 if worker == "edge-0" else 0)
    compared = state_of(run, "BehaviorClustering")["names"]
    if worker == "host-0":
        assert compared == ["client-3", "client-4", "client-5"]
        after = state_of(run, "LatencyAwareAssignment")["assignment"]
        assert max(Counter(after[client] for client in compared).values()) <= 2, "a quarter more than half of three"
    else:
        assert 0 < len(compared) < 6


def test_only_training_needs_probes(base: Settings, judged: Run, tmp_path: Path) -> None:
    settings = with_callbacks(base, ALL, **{"data.num_probes": 0, "ckpt_path": str(judged.checkpoint())})
    assert cli.main(["test", *arguments(tmp_path, "tested", settings)[1:]]) == 0


def test_moved_clients_lose_optimizer_states_with_a_warning(
    base: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"strategy.reset_optimizer": False, "model.optimizer": ADAM}
    with caplog.at_level(logging.WARNING):
        run = run_here(tmp_path, "kept", with_callbacks(base, [CLUSTERING, ASSIGNMENT, SPLITTING], **kept))
    expected = []
    plans = [state_of(run, "ResourceAwareSplitting", epoch)["plans"] for epoch in range(3)]
    assignments = placements(run)
    for epoch in (1, 2):  # decided after the round, so the checkpoint of the round has it
        before, after = ((assignments[e], plans[e]) for e in (epoch - 1, epoch))
        moved = [c for c in after[0] if (before[0][c], before[1][c]) != (after[0][c], after[1][c])]
        if moved:
            expected.append(", ".join(moved))
    assert expected, "somebody moved, or this shows nothing"
    told = [text.split(":")[0] for text in caplog.messages if "optimizer states start afresh" in text]
    assert told == expected


def test_slow_clients_cost_simulated_time_only(
    base: Settings, plain: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = run_here(tmp_path, "slow", {**base, "data.faults": {"client-0": "slow"}, "data.fault_scale": 1000})
    assert_equal(slow.adapters(), plain.adapters())
    assert slow.metrics()[0]["simulated/round_s"] > 2 * plain.metrics()[0]["simulated/round_s"]
    assert "no effect" not in caplog.text
    run_here(tmp_path, "real", {**base, "profile": None, "data.faults": {"client-0": "slow"}, "trainer.max_epochs": 1})
    assert "fault slow has no effect without simulated time" in caplog.text


def test_identical_clients_are_one_trusted_group(base: Settings, tmp_path: Path) -> None:
    still = {"model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.0}}}
    run = run_here(tmp_path, "same", with_callbacks(base, ALL, **still))
    assert set(state_of(run, "BehaviorClustering")["clusters"].values()) == {0}
    assert len(set(state_of(run, "TrustScoring")["trust"].values())) == 1


def test_one_client(base: Settings, tmp_path: Path) -> None:
    alone = {"data.num_clients": 1, "data.partition": "iid", "strategy.num_edges": 1, "trainer.max_epochs": 2}
    run = run_here(tmp_path, "one", with_callbacks(base, ALL, **alone))
    assert 0.75 <= state_of(run, "TrustScoring")["trust"]["client-0"] <= 1
    assert state_of(run, "BehaviorClustering")["clusters"] == {"client-0": 0}


def test_places_and_plans_that_are_ignored_earn_a_warning(
    base: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_for_some = {
        "strategy.edge_of": {"client-1": "edge-0"},
        "model.client_plans": {"client-3": {"front": 2, "middle": 1, "tail": 1}},
        "trainer.max_epochs": 1,
    }
    with caplog.at_level(logging.WARNING):
        run_here(tmp_path, "ignored", with_callbacks(base, [ASSIGNMENT, SPLITTING], **set_for_some))
        (places,) = [text for text in caplog.messages if "edge_of" in text]
        (plans,) = [text for text in caplog.messages if "client_plans" in text]
        assert "client-1, because LatencyAwareAssignment chooses" in places
        assert "client-3, because ResourceAwareSplitting chooses" in plans
        caplog.clear()
        run_here(tmp_path, "obeyed", {**base, **set_for_some})
    assert not [text for text in caplog.messages if "ignored" in text]


BAD: list[tuple[list[Any], dict[str, Any], list[str]]] = [
    ([CLUSTERING], {"data.num_probes": 0}, ["num_probes", "probe_file"]),
    ([CLUSTERING], {"data.num_probes": 8}, ["12", "8", "width"]),
    ([ASSIGNMENT], {"profile": None}, ["profile"]),
    ([SPLITTING], {"profile": None}, ["profile"]),
    ([{**ASSIGNMENT, "init_args": {"capacity": 2}}], {}, ["6 clients", "4"]),
    ([{**ASSIGNMENT, "init_args": {"capacity": {"edge-0": 9}}}], {}, ["edge-1"]),
    (
        [SPLITTING],
        {"profile": {"distribution": "mixed", "clients": {"client-3": {"memory_bytes": 1000}}}},
        ["client-3"],
    ),
    ([{**CLUSTERING, "init_args": {"num_clusters": 0}}], {}, ["num_clusters"]),
    ([TrustScoringAt(2.0)], {}, ["min_trust"]),
    ([], {"strategy.aggregator": "average"}, ["trimmed_mean", "krum"]),
]


@pytest.mark.parametrize(("callbacks", "changed", "told"), BAD, ids=range(len(BAD)))
def test_bad_input(
    callbacks: list[Any],
    changed: Settings,
    told: list[str],
    base: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code = cli.main(arguments(tmp_path, "bad", with_callbacks(base, callbacks, **changed)))
    except SystemExit as stop:  # the parser's own
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert all(word in error for word in told), error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.ckpt"))


def test_nothing_private_in_the_clusters_state(watched: Run) -> None:
    """Only what follows from fingerprints is kept: no states, predictions or texts."""
    state = state_of(watched, "BehaviorClustering")
    assert state.keys() == {"clusters", "names", "divergences", "round", "base"}
    assert state["base"] is None
    assert state["divergences"].shape == (6, 6)
    assert torch.equal(state["divergences"], state["divergences"].T)
    assert json.dumps(state["clusters"])
