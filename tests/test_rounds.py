"""Whole runs are federated averaging, written out here on the uncut model."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.functional.aggregation import sample_clients
from elsa_pl.lora import LoraSettings, dropout_key
from elsa_pl.models import uncut
from elsa_pl.tiers import SplitModel
from tests.runs import (
    DEFAULTS,
    Run,
    Settings,
    assert_close,
    assert_equal,
    initial_adapters,
    make_data,
    make_module,
    moved,
    run_here,
    write_data,
)

CLIENTS = ["client-0", "client-1", "client-2", "client-3"]
KEEP_ALL = {"checkpoint.save_top_k": -1}
Plans = dict[str, tuple[int, int, int]]


@pytest.fixture(scope="module")
def data_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


def mean(adapters: Sequence[dict[str, Tensor]], weights: Sequence[int]) -> dict[str, Tensor]:
    return {
        name: (sum(w * a[name].double() for a, w in zip(adapters, weights, strict=True)) / sum(weights)).float()  # type: ignore[union-attr]
        for name in adapters[0]
    }


def fedavg(
    data: FederatedTextDataModule,
    module: SplitModel,
    *,
    edges: Sequence[Sequence[str]],
    num_rounds: int,
    edge_rounds: int = 1,
    local_steps: int = 2,
    participation: float = 1.0,
    accumulate: int = 1,
) -> list[dict[str, Tensor]]:
    """Federated averaging in two levels, one client after the other; returns the adapters after each round."""
    model = module.build().train()
    parameters = {name: p for name, p in uncut(model).named_parameters() if p.requires_grad}

    def load(adapters: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(adapters[name])

    history = []
    current = {name: p.detach().clone() for name, p in parameters.items()}
    for number in range(num_rounds):
        active = sample_clients(CLIENTS, participation, 0, number)
        means, weights = [], []
        for members in edges:
            names = [client for client in members if client in active]
            if not names:
                continue
            at_edge, states = current, dict[str, Any]()
            for edge_round in range(edge_rounds):
                sent = []
                for client in names:
                    load(at_edge)
                    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
                    if client in states:
                        optimizer.load_state_dict(states[client])
                    for step in range(edge_round * local_steps, (edge_round + 1) * local_steps):
                        optimizer.zero_grad()
                        for micro in range(accumulate):
                            index = (number * edge_rounds * local_steps + step) * accumulate + micro
                            with dropout_key(0, number, client, step, micro):
                                loss = model(**data.train_batch(client, index)).loss / accumulate
                            loss.backward()
                        optimizer.step()
                    states[client] = optimizer.state_dict()
                    sent.append({name: p.detach().clone() for name, p in parameters.items()})
                at_edge = mean(sent, [data.client_sizes[client] for client in names])
            means.append(at_edge)
            weights.append(sum(data.client_sizes[client] for client in names))
        current = mean(means, weights)
        history.append(current)
    return history


def run_and_fedavg(
    folder: Path, settings: Settings, edges: Sequence[Sequence[str]], dropout: float = 0.0, **how: Any
) -> tuple[Run, list[dict[str, Tensor]]]:
    run = run_here(folder, "run", {**settings, **KEEP_ALL, "model.lora": {"dropout": dropout}})
    module = make_module(settings)
    module.lora = LoraSettings(dropout=dropout)
    rounds = {**DEFAULTS, **settings}["trainer.max_epochs"]
    return run, fedavg(make_data(settings), module, edges=edges, num_rounds=rounds, **how)


def test_one_edge_is_fedavg_on_the_uncut_model(tmp_path: Path, data_settings: Settings) -> None:
    """Sizes of the clients differ, so that wrong weights show."""
    settings = {**data_settings, "trainer.max_epochs": 3}
    sizes = list(make_data(settings).client_sizes.values())
    assert len(set(sizes)) > 1
    run, expected = run_and_fedavg(tmp_path, settings, [CLIENTS])
    for epoch, adapters in enumerate(expected):
        assert_equal(run.adapters(epoch), adapters)
    assert moved(expected[0], initial_adapters(settings))
    assert moved(expected[2], expected[1])


# a number is rounded up to five times in two edge rounds, each time by up to half a step of 1/127 or 1/7
@pytest.mark.parametrize(("bits", "share", "worst"), [(8, 66 / 256, 2.5 / 127), (4, 34 / 256, 2.5 / 7)])
def test_differences_in_few_bits(
    bits: int, share: float, worst: float, tmp_path: Path, data_settings: Settings
) -> None:
    """Nearly what full precision trains, at its share of the bytes; the scales are 2 bytes for every 64 numbers."""
    settings = {**data_settings, "strategy.num_edges": 2, "strategy.edge_rounds": 2, **KEEP_ALL}
    full = run_here(tmp_path, "full", settings)
    few = run_here(tmp_path, "few", {**settings, "strategy.adapter_bits": bits})
    start = initial_adapters(settings)
    for name, value in full.adapters(0).items():
        moved_by, error = (value - start[name]).abs().max(), (few.adapters(0)[name] - value).abs().max()
        assert 0 < error < worst * moved_by, name
    for way in ("up", "down"):
        sent, expected = (run.summary()["bytes"]["adapters"][way] for run in (few, full))
        assert sent == pytest.approx(share * expected, rel=0.01)  # small tensors end in a block that is not full
    assert few.metrics()[1]["train_loss"] == pytest.approx(full.metrics()[1]["train_loss"], rel=0.01)


UNCUT = {"model.plan": {"front": 4, "middle": 0, "tail": 0}}


def test_clients_that_train_alone(tmp_path: Path, data_settings: Settings) -> None:
    """The first round is that of averaging, but nobody gets the mean, and nothing is sent."""
    settings = {**data_settings, **UNCUT, "strategy.reset_optimizer": False, "checkpoint.save_top_k": -1}
    settings |= {"trainer.max_epochs": 3}
    alone = run_here(tmp_path, "alone", {**settings, "strategy.aggregator": "none"})
    averaged = run_here(tmp_path, "averaged", settings)
    assert_equal(alone.adapters(0), averaged.adapters(0))
    assert moved(alone.adapters(1), averaged.adapters(1))
    assert alone.summary()["bytes"]["total"] == 0
    assert averaged.summary()["bytes"]["total"] > 0
    own = [alone.content(epoch)["elsa_own_adapters"] for epoch in (0, 1)]
    clients = sorted(own[0])
    assert len(clients) == 4
    assert all(moved(own[1][client], own[0][client]) for client in clients)
    assert all(moved(own[1][clients[0]], own[1][client]) for client in clients[1:])
    # the texts are dealt to the clients, each with adapters of its own
    accuracies = [run.metrics()[1]["val_loss"] for run in (alone, averaged)]
    assert accuracies[0] != accuracies[1]


def test_clients_alone_do_not_wait_for_the_cloud(tmp_path: Path, data_settings: Settings) -> None:
    far = {"distribution": "mixed", "edges": {"edge-0": {"cloud_latency_s": 100.0}}}
    settings = {**data_settings, **UNCUT, "trainer.max_epochs": 1, "profile": far}
    alone, averaged = (
        run_here(tmp_path, name, {**settings, "strategy.aggregator": name}).metrics()[0]["simulated/round_s"]
        for name in ("none", "mean")
    )
    assert 0 < alone < averaged - 2 * 99


def test_what_clients_alone_have_no_use_for_is_named(
    tmp_path: Path, data_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    trust = {"class_path": "elsa_pl.callbacks.TrustScoring", "init_args": {"pictures": False}}
    settings = {**data_settings, **UNCUT, "trainer.max_epochs": 1, "data.num_probes": 8, "trainer.callbacks": [trust]}
    settings |= {"strategy.adapter_bits": 8, "data.faults": {"client-1": "scaled", "client-2": "flipped_labels"}}
    with caplog.at_level(logging.WARNING):
        run_here(tmp_path, "averaged", settings)
        assert "no effect" not in caplog.text
        run_here(tmp_path, "alone", {**settings, "strategy.aggregator": "none"})
    (told,) = [text for text in caplog.messages if "no effect" in text]
    assert "aggregator=none" in told
    assert told.endswith(": adapter_bits=8, fault scaled, TrustScoring; leave it out")


def test_a_client_alone_is_all_the_federation(tmp_path: Path, data_settings: Settings) -> None:
    settings = {**data_settings, "data.num_clients": 1, "trainer.max_epochs": 3}
    one, alone = (run_here(tmp_path, name, {**settings, "strategy.aggregator": name}) for name in ("mean", "none"))
    assert_equal(alone.adapters(), one.adapters())
    assert alone.summary()["test_accuracy"] == one.summary()["test_accuracy"]
    assert alone.summary()["tested_round"] == one.summary()["tested_round"]


def test_who_trained_alone_goes_on_alone(tmp_path: Path, data_settings: Settings) -> None:
    settings = {**data_settings, **UNCUT, "strategy.aggregator": "none", "checkpoint.save_top_k": -1}
    whole = run_here(tmp_path, "whole", {**settings, "trainer.max_epochs": 3})
    again = {**settings, "trainer.max_epochs": 3, "ckpt_path": str(whole.checkpoint(0))}
    resumed = run_here(tmp_path, "resumed", again)
    own = [run.content()["elsa_own_adapters"] for run in (whole, resumed)]
    for client, adapters in own[0].items():
        assert_equal(own[1][client], adapters)
    for epoch in (1, 2):
        assert resumed.metrics()[epoch]["val_loss"] == whole.metrics()[epoch]["val_loss"]


@pytest.mark.parametrize("name", ["SketchCompression", "LinkProjection"])
def test_who_trained_alone_goes_on_with_what_links_are_fitted_to(
    name: str, tmp_path: Path, data_settings: Settings
) -> None:
    settings = {**data_settings, "strategy.aggregator": "none", "strategy.edge_rounds": 2, "data.num_probes": 16}
    settings |= {"trainer.callbacks": [{"class_path": name, "init_args": {"ratio": 2}}], **KEEP_ALL}
    whole = run_here(tmp_path, "whole", settings)
    resumed = run_here(tmp_path, "resumed", {**settings, "ckpt_path": str(whole.checkpoint(0))})
    own = [run.content()["elsa_own_adapters"] for run in (whole, resumed)]
    for client in CLIENTS:
        assert_equal(own[1][client], own[0][client])


def test_who_trained_alone_may_federate(tmp_path: Path, data_settings: Settings) -> None:
    """From the mean on, all clients have what the cloud publishes: figures are those of one model."""
    settings = {**data_settings, "checkpoint.save_top_k": -1}
    alone = run_here(tmp_path, "alone", {**settings, "strategy.aggregator": "none"})
    ckpt = str(alone.checkpoint(1))
    together = run_here(tmp_path, "together", {**settings, "trainer.max_epochs": 4, "ckpt_path": ckpt})
    assert together.content()["elsa_own_adapters"] == {}
    summary = together.summary()
    assert summary["test_loss"] == pytest.approx(summary["test_merged_loss"], rel=1e-5)
    ended = alone.summary()
    assert ended["test_loss"] != pytest.approx(ended["test_merged_loss"], rel=1e-3), "alone there was no one model"


class Mover(Callback):
    """Gives clients another edge and another cut from the second round on."""

    def on_assign_clients(self, trainer: "pl.Trainer", assignment: dict[str, str]) -> dict[str, str]:
        moves = {"client-0": "edge-1", "client-1": "edge-0"} if trainer.global_step else {}
        return {**assignment, **moves}

    def on_plan_clients(self, trainer: "pl.Trainer", plans: Plans, assignment: dict[str, str]) -> Plans:
        return {**plans, "client-2": (2, 1, 1)} if trainer.global_step else plans


def test_who_is_moved_or_cut_anew_keeps_what_it_trained_alone(tmp_path: Path, data_settings: Settings) -> None:
    settings = {**data_settings, "strategy.aggregator": "none", "strategy.num_edges": 2, "trainer.max_epochs": 3}
    mover = {"trainer.callbacks": [{"class_path": "tests.test_rounds.Mover"}]}
    stay, move = (run_here(tmp_path, name, {**settings, **more}) for name, more in (("stay", {}), ("move", mover)))
    own = [run.content()["elsa_own_adapters"] for run in (stay, move)]
    for client in CLIENTS:
        assert_close(own[1][client], own[0][client], atol=1e-5)
    assert move.metrics()[2]["val_loss"] == pytest.approx(stay.metrics()[2]["val_loss"], rel=1e-5)


def test_two_edges_and_edge_rounds_are_fedavg_in_two_levels(tmp_path: Path, data_settings: Settings) -> None:
    """With dropout and accumulation; an optimizer's state lives through the edge rounds of a global round."""
    settings = {
        **data_settings,
        "strategy.num_edges": 2,
        "strategy.edge_rounds": 2,
        "model.accumulate_grad_batches": 2,
        "data.batch_size": 4,
    }
    edges = [["client-0", "client-2"], ["client-1", "client-3"]]
    run, expected = run_and_fedavg(tmp_path, settings, edges, dropout=0.2, edge_rounds=2, accumulate=2)
    for epoch, adapters in enumerate(expected):
        assert_equal(run.adapters(epoch), adapters)


def test_only_participants_count(tmp_path: Path, data_settings: Settings) -> None:
    """One client in each round, so one edge stays without any answer."""
    settings = {**data_settings, "trainer.max_epochs": 3, "strategy.num_edges": 2, "strategy.participation": 0.25}
    edges = [["client-0", "client-2"], ["client-1", "client-3"]]
    run, expected = run_and_fedavg(tmp_path, settings, edges, participation=0.25)
    for epoch, adapters in enumerate(expected):
        assert_equal(run.adapters(epoch), adapters)
    assert len({client for number in range(3) for client in sample_clients(CLIENTS, 0.25, 0, number)}) > 1


def test_edge_of_moves_clients_between_edges(tmp_path: Path, data_settings: Settings) -> None:
    settings = {
        **data_settings,
        "trainer.max_epochs": 1,
        "strategy.num_edges": 2,
        "strategy.edge_rounds": 2,
        "strategy.edge_of": {"client-0": "edge-1"},
    }
    edges = [["client-2"], ["client-0", "client-1", "client-3"]]
    run, expected = run_and_fedavg(tmp_path, settings, edges, edge_rounds=2)
    assert_equal(run.adapters(), expected[0])


@pytest.mark.parametrize("participation", [0.25, 0.5, 0.75, 1.0])
def test_participants_are_drawn_by_seed_and_round(participation: float) -> None:
    draws = [sample_clients(CLIENTS, participation, 7, number) for number in range(50)]
    assert draws == [sample_clients(CLIENTS, participation, 7, number) for number in range(50)]
    assert {len(draw) for draw in draws} == {round(participation * 4)}
    assert frozenset().union(*draws) == set(CLIENTS), "nobody is left out for ever"
    if participation < 1:
        assert len(set(draws)) > 1
        assert draws != [sample_clients(CLIENTS, participation, 8, number) for number in range(50)]


def test_at_least_one_client_takes_part() -> None:
    assert len(sample_clients(CLIENTS, 1e-9, 0, 0)) == 1


def test_two_levels_are_flat_when_every_client_takes_part(tmp_path: Path, data_settings: Settings) -> None:
    """One round: later ones would blow the rounding of the first up by AdamW's division."""
    settings = {**data_settings, "trainer.max_epochs": 1}
    flat, two = (
        run_here(tmp_path, f"edges-{count}", {**settings, "strategy.num_edges": count}).adapters() for count in (1, 3)
    )
    assert_close(two, flat, atol=1e-7)
    assert moved(flat, initial_adapters(settings))


def test_plans_do_not_change_what_is_trained(tmp_path: Path, data_settings: Settings) -> None:
    """Layers meet by their global names, whichever part of which client holds them."""
    other = {
        "client-1": {"front": 2, "middle": 1, "tail": 1},
        "client-2": {"front": 1, "middle": 1, "tail": 2},
        "client-3": {"front": 2, "tail": 1},
    }
    settings = {**data_settings, "strategy.num_edges": 2, "strategy.edge_rounds": 2, "model.gradient_clip_val": 0.1}
    equal = run_here(tmp_path, "equal", settings)
    different = run_here(tmp_path, "different", {**settings, "model.client_plans": other})
    assert_equal(different.adapters(), equal.adapters())


def test_different_plans_average_to_what_they_were_when_nothing_is_trained(
    tmp_path: Path, data_settings: Settings
) -> None:
    settings = {
        **data_settings,
        "trainer.max_epochs": 1,
        "strategy.num_edges": 2,
        "strategy.edge_rounds": 2,
        "model.client_plans": {"client-1": {"front": 2, "middle": 1, "tail": 1}},
        "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0}},
    }
    run = run_here(tmp_path, "still", settings)
    assert_equal(run.adapters(), initial_adapters(settings))
