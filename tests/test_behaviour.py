"""Runs whose clients are compared, judged, moved and recut: none of that may change what is learnt without faults."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from elsa_pl import cli
from tests.runs import Run, Settings, arguments, assert_close, assert_equal, run_forked, run_here, write_data

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


def placements(run: Run) -> list[dict[str, str]]:
    return [state_of(run, "LatencyAwareAssignment", epoch)["assignment"] for epoch in range(3)]


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
    for callback in ("TrustScoring", "LatencyAwareAssignment", "ResourceAwareSplitting"):
        assert state_of(resumed, callback) == state_of(whole, callback)
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


def test_slow_clients_cost_simulated_time_only(base: Settings, plain: Run, tmp_path: Path) -> None:
    slow = run_here(tmp_path, "slow", {**base, "data.faults": {"client-0": "slow"}, "data.fault_scale": 1000})
    assert_equal(slow.adapters(), plain.adapters())
    assert slow.metrics()[0]["simulated/round_s"] > 2 * plain.metrics()[0]["simulated/round_s"]


def test_identical_clients_are_one_trusted_group(base: Settings, tmp_path: Path) -> None:
    still = {"model.optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.0}}}
    run = run_here(tmp_path, "same", with_callbacks(base, ALL, **still))
    assert set(state_of(run, "BehaviorClustering")["clusters"].values()) == {0}
    assert set(state_of(run, "TrustScoring")["trust"].values()) == {1.0}


def test_one_client(base: Settings, tmp_path: Path) -> None:
    alone = {"data.num_clients": 1, "data.partition": "iid", "strategy.num_edges": 1, "trainer.max_epochs": 2}
    run = run_here(tmp_path, "one", with_callbacks(base, ALL, **alone))
    assert state_of(run, "TrustScoring")["trust"] == {"client-0": 1.0}
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
    assert state.keys() == {"clusters", "names", "divergences", "round"}
    assert state["divergences"].shape == (6, 6)
    assert torch.equal(state["divergences"], state["divergences"].T)
    assert json.dumps(state["clusters"])
