"""Runs that average products of factors, and whose clients have ranks of their own."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.factors import factor_pairs, to_rank
from elsa_pl.lora import LoraSettings
from elsa_pl.models import uncut
from elsa_pl.tiers import SplitModel
from tests.runs import (
    TINY_BERT,
    Run,
    Settings,
    assert_equal,
    initial_adapters,
    make_data,
    make_module,
    moved,
    run_forked,
    run_here,
    write_data,
)

EXACT = {"strategy.aggregator": "exact", "model.lora": {"rank": 4}}
RANKS = {"client-0": 1, "client-2": 2, "client-3": 3}
UNEQUAL = {**EXACT, "model.client_ranks": RANKS}
CLIENTS = ["client-0", "client-1", "client-2", "client-3"]


@pytest.fixture(scope="module")
def data_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


def products(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the adapters of each layer add to its weight, and all other tensors."""
    pairs = factor_pairs(adapters)
    factors = {name for pair in pairs for name in pair}
    dense = {a: adapters[b].double() @ adapters[a].double() for a, b in pairs}
    return dense | {name: value for name, value in adapters.items() if name not in factors}


def num_bytes(adapters: Mapping[str, Tensor], factors: bool) -> int:
    return 4 * sum(value.numel() for name, value in adapters.items() if (".lora_" in name) == factors)


def test_two_levels_are_flat_when_every_client_takes_part(tmp_path: Path, data_settings: Settings) -> None:
    """Edges send all that their means need; with ranks of 4 at the edges, the cloud's would be another."""
    settings = {**data_settings, **EXACT, "trainer.max_epochs": 1}
    runs: list[Run] = [
        run_here(tmp_path, f"edges-{count}", {**settings, "strategy.num_edges": count}) for count in (1, 3)
    ]
    flat, two = (products(run.adapters()) for run in runs)
    for name, value in flat.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6, msg=name)
    before = products(initial_adapters(settings))
    assert moved(flat, before)

    sent = runs[0].adapters()
    factors, rest = (num_bytes(sent, which) for which in (True, False))
    clients = [run.summary()["bytes"]["adapters"]["up"] for run in runs]
    # 4 clients of rank 4 each are behind what the edges send to the cloud, however many edges there are; of the 4
    # clients' own, the edge holds the middle, 2 of 4 blocks
    assert clients[0] == 4 * (factors // 2 + rest) + 4 * factors + rest
    assert clients[1] == 4 * (factors // 2 + rest) + 4 * factors + 3 * rest


def test_exact_differs_from_the_mean_and_goes_on(tmp_path: Path, data_settings: Settings) -> None:
    settings = {**data_settings, **EXACT, "strategy.edge_rounds": 2, "strategy.num_edges": 2}
    exact, mean = (
        run_here(tmp_path, name, {**settings, "strategy.aggregator": name}).adapters() for name in ("exact", "mean")
    )
    assert moved(products(exact), products(mean))
    assert {name: value.shape for name, value in exact.items()} == {name: value.shape for name, value in mean.items()}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_exact_in_tiers(tmp_path: Path, data_settings: Settings) -> None:
    settings = {**data_settings, **EXACT, "strategy.edge_rounds": 2, "strategy.num_edges": 2}
    single = run_here(tmp_path / "single", "run", settings)
    tiers = run_forked(tmp_path / "runs", "run", {**settings, "strategy.layout": "tiers"}, 2)
    assert_equal(tiers.adapters(), single.adapters())
    assert tiers.summary()["bytes"] == single.summary()["bytes"]


# ---- ranks of single clients -----------------------------------------------------------------------------------------


def test_equal_ranks_change_nothing(tmp_path: Path, data_settings: Settings) -> None:
    settings = {**data_settings, **EXACT, "strategy.edge_rounds": 2}
    plain = run_here(tmp_path, "plain", settings)
    equal = run_here(tmp_path, "equal", {**settings, "model.client_ranks": dict.fromkeys(CLIENTS, 4)})
    assert_equal(equal.adapters(), plain.adapters())
    assert equal.summary()["bytes"] == plain.summary()["bytes"]


def dense_rounds(data_settings: Settings, num_rounds: int) -> dict[str, Tensor]:
    """The same on the uncut model, whose factors are padded with zeros, and with dense means that numpy decomposes."""
    data, module = make_data(data_settings), make_module(data_settings)
    module.lora = LoraSettings(rank=4)
    model = module.build().train()
    parameters = {name: p for name, p in uncut(model).named_parameters() if p.requires_grad}
    current = {name: p.detach().clone() for name, p in parameters.items()}
    pairs = factor_pairs(current)
    weights = [data.client_sizes[client] / sum(data.client_sizes[name] for name in CLIENTS) for client in CLIENTS]
    for number in range(num_rounds):
        sent = []
        for client in CLIENTS:
            with torch.no_grad():
                for name, value in to_rank(to_rank(current, RANKS.get(client, 4)), 4).items():
                    parameters[name].copy_(value)
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
            for step in range(2):
                optimizer.zero_grad()
                model(**data.train_batch(client, 2 * number + step)).loss.backward()
                optimizer.step()
            sent.append({name: p.detach().double().clone() for name, p in parameters.items()})
        summed = {
            name: torch.stack([weight * each[name] for weight, each in zip(weights, sent, strict=True)]).sum(0)
            for name in current
        }
        for a, b in pairs:
            dense = sum(weight * each[b] @ each[a] for weight, each in zip(weights, sent, strict=True))
            assert isinstance(dense, Tensor)
            u, values, vt = np.linalg.svd(dense.numpy())
            roots = torch.from_numpy(np.sqrt(values[:4]))
            summed[a] = roots[:, None] * torch.from_numpy(vt[:4])
            summed[b] = torch.from_numpy(u[:, :4]) * roots
        current = {name: value.float() for name, value in summed.items()}
    return current


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory, data_settings: Settings) -> Run:
    settings = {**data_settings, **UNEQUAL, "checkpoint.save_top_k": -1}
    return run_here(tmp_path_factory.mktemp("unequal"), "run", settings)


def test_unequal_ranks_are_the_uncut_model_with_zeros(unequal: Run, data_settings: Settings) -> None:
    expected = products(dense_rounds(data_settings, 2))
    got = products(unequal.adapters())
    for name, value in expected.items():
        difference = (got[name] - value).abs().max().item()
        assert difference <= 2e-3 * value.abs().max().item(), name
    (factor,) = [name for name in got if "layer.0" in name and "query" in name]
    assert got[factor].abs().max() > 1e-4, "something was trained"


def test_figures_are_those_of_the_global_model(unequal: Run) -> None:
    """Whoever evaluates: all directions, as in the merged model."""
    summary = unequal.summary()
    assert summary["test_loss"] == pytest.approx(summary["test_merged_loss"], rel=1e-5)
    assert summary["test_accuracy"] == summary["test_merged_accuracy"]


def test_bytes_are_those_of_the_clients_ranks(unequal: Run) -> None:
    sent = unequal.adapters()
    factors, rest = (num_bytes(sent, which) for which in (True, False))
    ranks = [RANKS.get(client, 4) for client in CLIENTS]
    ends = sum(factors // 2 * rank // 4 + rest for rank in ranks)
    counted = unequal.summary()["bytes"]["adapters"]
    assert counted["up"] == 2 * (ends + factors * sum(ranks) // 4 + rest)
    assert counted["down"] == 2 * (ends + factors + rest)


def test_bytes_within_a_round(tmp_path: Path, data_settings: Settings, unequal: Run) -> None:
    run = run_here(tmp_path, "run", {**data_settings, **UNEQUAL, "strategy.edge_rounds": 2, "trainer.max_epochs": 1})
    sent = unequal.adapters()
    factors, rest = (num_bytes(sent, which) for which in (True, False))
    ends = sum(factors // 2 * RANKS.get(client, 4) // 4 + rest for client in CLIENTS)
    assert run.summary()["bytes"]["adapters"]["down"] == 2 * ends + factors + rest


def test_unequal_ranks_go_on_from_a_checkpoint(tmp_path: Path, data_settings: Settings, unequal: Run) -> None:
    settings = {**data_settings, **UNEQUAL, "ckpt_path": str(unequal.checkpoint(0))}
    resumed = run_here(tmp_path, "run", settings)
    assert_equal(resumed.adapters(), unequal.adapters())
    assert resumed.summary()["bytes"] == unequal.summary()["bytes"]


MANY = {
    **UNEQUAL,
    "strategy.num_edges": 2,
    "strategy.edge_rounds": 2,
    "strategy.participation": 0.75,
    "model.lora": {"rank": 4, "dropout": 0.1},
    "model.client_plans": {
        "client-0": {"front": 4, "middle": 0, "tail": 0},
        "client-2": {"front": 2, "middle": 1, "tail": 1},
        "client-3": {"front": 1, "middle": 3, "tail": 0},
    },
    "data.num_probes": 16,
    "trainer.max_epochs": 3,
    "trainer.callbacks": [
        {
            "class_path": "elsa_pl.callbacks.TrustScoring",
            "init_args": {"warmup_rounds": 1, "every_n_rounds": 1, "pictures": False},
        },
    ],
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, data_settings: Settings) -> Run:
    return run_here(tmp_path_factory.mktemp("many"), "run", {**data_settings, **MANY})


def test_plans_trust_and_absence_beside_ranks(many: Run) -> None:
    assert many.summary()["rounds"] == 3
    trust = {name: value for name, value in many.metrics()[2].items() if name.startswith("trust/")}
    assert len(trust) >= 3
    assert all(0 <= value <= 1 for value in trust.values())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("hosts", [1, 2])
def test_unequal_ranks_in_tiers(hosts: int, tmp_path: Path, data_settings: Settings, many: Run) -> None:
    settings = {**data_settings, **MANY, "strategy.layout": "tiers", "strategy.num_hosts": hosts}
    tiers = run_forked(tmp_path / "runs", "run", settings, 1 + hosts)
    assert_equal(tiers.adapters(), many.adapters())
    for figure in ("adapters", "behaviour"):
        assert tiers.summary()["bytes"][figure] == many.summary()["bytes"][figure]
    assert tiers.summary()["test_accuracy"] == many.summary()["test_accuracy"]
    assert tiers.metrics()[2]["val_loss"] == pytest.approx(many.metrics()[2]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("rank", [0, 5])
def test_ranks_out_of_range(rank: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"client-1: {rank} with lora.rank=4.*raise model.lora.rank"):
        SplitModel(None, TINY_BERT, lora=LoraSettings(rank=4), client_ranks={"client-0": 4, "client-1": rank})


@pytest.mark.parametrize("aggregator", ["mean", "median", "trimmed_mean", "krum"])
def test_other_aggregators_refuse_unequal_ranks(aggregator: str) -> None:
    module = SplitModel(None, TINY_BERT, client_ranks={"client-1": 4})
    module.prepare(2)
    module.check_aggregator("exact")
    with pytest.raises(ConfigurationError, match=f"expected .*exact.* got '{aggregator}'.*'client-1': 4.*lora.rank=8"):
        module.check_aggregator(aggregator)
    equal = SplitModel(None, TINY_BERT, client_ranks={"client-1": 8})
    equal.prepare(2)
    equal.check_aggregator(aggregator)


def test_products_of_convolutions_are_refused() -> None:
    config = {**TINY_BERT, "model_type": "squeezebert", "embedding_size": 32}
    module = SplitModel(None, config, lora=LoraSettings(target_modules=["query"]))
    module.num_labels = 2
    module._held = [module.build()]
    module.check_aggregator("mean")
    with pytest.raises(ConfigurationError, match=r"query.lora_A.*\(8, 32, 1\): leave the layer out"):
        module.check_aggregator("exact")
