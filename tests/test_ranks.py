"""Runs that average products of factors, whose clients have ranks of their own, or whose rounds end in the weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from elsa_pl import cli
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.factors import SUFFIX, factor_pairs, fresh_rows, frozen_weight, to_rank
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.lora import LoraSettings
from elsa_pl.models import uncut
from elsa_pl.strategies import HierarchicalStrategy
from elsa_pl.tiers import SplitModel
from tests.runs import (
    TINY_BERT,
    Run,
    Settings,
    arguments,
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


def train_on_the_uncut_model(
    settings: Settings, merge: Callable[[list[dict[str, Tensor]], list[float], int, nn.Module], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Two rounds, one client after the other, of factors that are padded with zeros; returns all parameters."""
    data, module = make_data(settings), make_module(settings)
    module.lora = LoraSettings(rank=4)
    model = module.build().train()
    parameters = {name: p for name, p in uncut(model).named_parameters() if p.requires_grad}
    current = {name: p.detach().clone() for name, p in parameters.items()}
    weights = [data.client_sizes[client] / sum(data.client_sizes[name] for name in CLIENTS) for client in CLIENTS]

    def load(adapters: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in adapters.items():
                parameters[name].copy_(value)

    for number in range(2):
        sent = []
        for client in CLIENTS:
            load(to_rank(to_rank(current, RANKS.get(client, 4)), 4))
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
            for step in range(2):
                optimizer.zero_grad()
                model(**data.train_batch(client, 2 * number + step)).loss.backward()
                optimizer.step()
            sent.append({name: p.detach().double().clone() for name, p in parameters.items()})
        current = merge(sent, weights, number, uncut(model))
    load(current)
    return {name: p.detach().clone() for name, p in uncut(model).named_parameters()}


def summed(sent: list[dict[str, Tensor]], weights: list[float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense products by the name of their first factor, and all tensors each for itself."""
    dense = {
        a: torch.stack([weight * each[b] @ each[a] for weight, each in zip(weights, sent, strict=True)]).sum(0)
        for a, b in factor_pairs(sent[0])
    }
    return dense, {
        name: torch.stack([weight * each[name] for weight, each in zip(weights, sent, strict=True)]).sum(0)
        for name in sent[0]
    }


def decomposed(sent: list[dict[str, Tensor]], weights: list[float], number: int, model: nn.Module) -> dict[str, Tensor]:
    """The dense means' best approximations, by numpy."""
    dense, current = summed(sent, weights)
    for a, b in factor_pairs(current):
        u, values, vt = np.linalg.svd(dense[a].numpy())
        roots = torch.from_numpy(np.sqrt(values[:4]))
        current[a] = roots[:, None] * torch.from_numpy(vt[:4])
        current[b] = torch.from_numpy(u[:, :4]) * roots
    return {name: value.float() for name, value in current.items()}


def added(sent: list[dict[str, Tensor]], weights: list[float], number: int, model: nn.Module) -> dict[str, Tensor]:
    """The dense means become part of the frozen weights."""
    dense, current = summed(sent, weights)
    for a, b in factor_pairs(current):
        weight = model.get_parameter(frozen_weight(a))
        with torch.no_grad():
            weight.add_(dense[a].float() * 16 / 4)
        current[a] = fresh_rows(4, weight.shape[1], derive_seed(0, "fresh adapters", number, a))
        current[b] = torch.zeros_like(current[b])
    return {name: value.float() for name, value in current.items()}


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory, data_settings: Settings) -> Run:
    settings = {**data_settings, **UNEQUAL, "checkpoint.save_top_k": -1}
    return run_here(tmp_path_factory.mktemp("unequal"), "run", settings)


def test_unequal_ranks_are_the_uncut_model_with_zeros(unequal: Run, data_settings: Settings) -> None:
    got = products(unequal.adapters())
    parameters = train_on_the_uncut_model(data_settings, decomposed)
    expected = products({name: parameters[name] for name in unequal.adapters()})
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


MANY: dict[str, Any] = {
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
    module.check_aggregator("exact", 32)
    with pytest.raises(ConfigurationError, match=f"expected .*exact.* got '{aggregator}'.*'client-1': 4.*lora.rank=8"):
        module.check_aggregator(aggregator, 32)
    equal = SplitModel(None, TINY_BERT, client_ranks={"client-1": 8})
    equal.prepare(2)
    equal.check_aggregator(aggregator, 32)
    with pytest.raises(ConfigurationError, match=r"=32 with aggregator=exact .* got 8: .* leave adapter_bits out"):
        module.check_aggregator("exact", 8)
    with pytest.raises(ConfigurationError, match=r"adapter_bits=32 with aggregator=stacked .* leave adapter_bits out"):
        equal.check_aggregator("stacked", 8)
    equal.check_aggregator("exact", 8)


def test_products_of_convolutions_are_refused() -> None:
    config = {**TINY_BERT, "model_type": "squeezebert", "embedding_size": 32}
    module = SplitModel(None, config, lora=LoraSettings(target_modules=["query"]))
    module.num_labels = 2
    module._held = [module.build()]
    module.check_aggregator("mean", 32)
    with pytest.raises(ConfigurationError, match=r"query.lora_A.*\(8, 32, 1\): leave the layer out"):
        module.check_aggregator("exact", 32)


# ---- rounds that end in the frozen weights -------------------------------------------------------------------------

TINY_GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 30522}
STACKED = {**UNEQUAL, "strategy.aggregator": "stacked"}


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory, data_settings: Settings) -> Run:
    settings = {**data_settings, **STACKED, "checkpoint.save_top_k": -1}
    return run_here(tmp_path_factory.mktemp("stacked"), "run", settings)


def test_stacked_adds_the_mean_to_the_weights(stacked: Run, data_settings: Settings) -> None:
    got = stacked.adapters()
    expected = train_on_the_uncut_model(data_settings, added)
    began = dict(uncut(make_module(data_settings).build()).named_parameters())
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
        if name.endswith(SUFFIX):
            change = expected[name] - began[name]
            assert (value - expected[name]).norm() < 0.01 * change.norm(), name
        if "lora_B" in name:
            assert not value.any()
    assert sum(name.endswith(SUFFIX) for name in got) == 2 * TINY_BERT["num_hidden_layers"]  # type: ignore[operator]


def test_the_stacked_models_figures_agree(stacked: Run, data_settings: Settings) -> None:
    assert_figures_agree(stacked, data_settings)


def test_the_export_has_the_rank_of_what_was_stacked(stacked: Run) -> None:
    """Rounds of clients of ranks 1, 4, 2 and 3; the rounding of the weights is of full rank, which is 32."""
    config = json.loads((stacked.folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == stacked.summary()["tested_round"] * (1 + 4 + 2 + 3)


def test_stacked_knows_which_way_weights_lie(tmp_path: Path, data_settings: Settings) -> None:
    """Those of GPT-2 are [I, O]."""
    fast = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}}
    settings = {**data_settings, "model.model_config": TINY_GPT2, "trainer.max_epochs": 1, "model.optimizer": fast}
    assert_figures_agree(run_here(tmp_path, "run", {**settings, **STACKED}), settings)


def assert_figures_agree(run: Run, settings: Settings) -> None:
    """Through the pipeline, merged, and exported as adapters of the model that the run began with."""
    summary = run.summary()
    assert summary["test_loss"] == pytest.approx(summary["test_merged_loss"], rel=1e-5)
    losses = []
    for exported in (True, False):
        model: nn.Module = make_module(settings).build().unload()
        if exported:
            model = PeftModel.from_pretrained(model, str(run.folder / "adapter"))
        loss = count = 0.0
        for batch in make_data(settings).eval_batches("test"):
            loss += model.eval()(**batch).loss.item() * len(batch["labels"])
            count += len(batch["labels"])
        losses.append(loss / count)
    assert losses[0] == pytest.approx(summary["test_loss"], rel=1e-4)
    assert losses[1] != pytest.approx(summary["test_loss"], rel=1e-3)


def test_bytes_of_stacked_are_those_of_the_stack(stacked: Run, unequal: Run) -> None:
    """Fresh adapters and weights cost nothing: a seed and the stack tell both."""
    sent = unequal.adapters()
    factors, rest = (num_bytes(sent, which) for which in (True, False))
    stack = factors * (1 + 4 + 2 + 3) // 4
    counted = stacked.summary()["bytes"]["adapters"]
    assert counted["up"] == unequal.summary()["bytes"]["adapters"]["up"]
    assert counted["down"] == 2 * (stack + rest + len(CLIENTS) * (stack // 2 + rest))


def test_a_client_that_is_cut_anew_gets_the_weights_of_its_new_layer(tmp_path: Path, data_settings: Settings) -> None:
    """Its front gets a second block: of that the adapters and weights, and a round later the stack."""
    settings = {**data_settings, **EXACT, "strategy.aggregator": "stacked", "strategy.num_edges": 2}
    mover = {"trainer.callbacks": [{"class_path": "tests.test_rounds.Mover"}]}
    stay, move = (run_here(tmp_path, name, {**settings, **more}) for name, more in (("stay", {}), ("move", mover)))
    down = [run.summary()["bytes"]["adapters"]["down"] for run in (stay, move)]
    width, layers, ranks = 32, 2, 4 + 4 * len(CLIENTS)
    assert down[1] - down[0] == 4 * layers * (width * width + ranks * 2 * width)


COMPARED = {
    "class_path": "elsa_pl.callbacks.BehaviorClustering",
    "init_args": {"warmup_rounds": 1, "every_n_rounds": 1, "pictures": False, "width": 4},
}


@pytest.fixture(scope="module")
def stacked_many(tmp_path_factory: pytest.TempPathFactory, data_settings: Settings) -> Run:
    return run_here(tmp_path_factory.mktemp("many"), "run", {**data_settings, **STACKED_MANY})


STACKED_MANY = {
    **MANY,
    "strategy.aggregator": "stacked",
    "trainer.callbacks": [*MANY["trainer.callbacks"], COMPARED],
    "checkpoint.save_top_k": -1,
}


@pytest.mark.parametrize("epoch", [0, 1])
def test_stacked_goes_on_from_a_checkpoint(
    epoch: int, tmp_path: Path, data_settings: Settings, stacked_many: Run
) -> None:
    settings = {**data_settings, **STACKED_MANY, "ckpt_path": str(stacked_many.checkpoint(epoch))}
    resumed = run_here(tmp_path, "run", settings)
    assert_equal(resumed.adapters(), stacked_many.adapters())
    got, expected = resumed.metrics()[2], stacked_many.metrics()[2]
    assert any(name.startswith("trust/") for name in expected)
    assert {name: got[name] for name in expected if "seconds/" not in name} == {
        name: value for name, value in expected.items() if "seconds/" not in name
    }
    assert resumed.summary()["bytes"] == stacked_many.summary()["bytes"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stacked_in_tiers(tmp_path: Path, data_settings: Settings, stacked_many: Run) -> None:
    settings = {**data_settings, **STACKED_MANY, "strategy.layout": "tiers"}
    tiers = run_forked(tmp_path / "runs", "run", settings, 2)
    assert_equal(tiers.adapters(), stacked_many.adapters())
    assert tiers.summary()["bytes"] == stacked_many.summary()["bytes"]


def test_a_checkpoint_of_another_aggregator_is_refused(
    tmp_path: Path, data_settings: Settings, stacked: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**data_settings, **UNEQUAL, "ckpt_path": str(stacked.checkpoint(0))}
    assert cli.main(arguments(tmp_path, "run", settings)) == 1
    assert "strategy.aggregator is 'stacked' in the checkpoint and None in the settings" in capsys.readouterr().err


@pytest.mark.parametrize("aggregator", ["exact", "stacked"])
def test_other_factors_do_not_keep_optimizer_states(aggregator: str) -> None:
    with pytest.raises(ConfigurationError, match="reset_optimizer=false"):
        HierarchicalStrategy(aggregator=aggregator, reset_optimizer=False)


def test_stacked_refuses_embeddings() -> None:
    """A tied head would change with them."""
    module = SplitModel(None, TINY_BERT, lora=LoraSettings(target_modules=["query", "word_embeddings"]))
    module.num_labels = 2
    module._held = [module.build()]
    module.check_aggregator("exact", 32)
    with pytest.raises(ConfigurationError, match=r"linear layers with .*stacked, got .*lora_embedding_A"):
        module.check_aggregator("stacked", 32)


def test_stacked_refuses_a_tied_head() -> None:
    """Embeddings and head are in different processes: only one of them would change."""
    tied = {**TINY_GPT2, "tie_word_embeddings": True, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    module = SplitModel(None, tied, task="causal_lm", lora=LoraSettings(target_modules=["c_attn", "lm_head"]))
    module._held = [module.build()]
    module.check_aggregator("exact", 32)
    with pytest.raises(ConfigurationError, match=r"weights of their own .*got lm_head.base_layer.weight"):
        module.check_aggregator("stacked", 32)
    own = SplitModel(None, tied, task="causal_lm", lora=LoraSettings(target_modules=["c_attn"]))
    own._held = [own.build()]
    own.check_aggregator("stacked", 32)
