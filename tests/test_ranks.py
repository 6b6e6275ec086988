"""Runs that average products of factors."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.factors import factor_pairs
from tests.runs import Run, Settings, assert_equal, initial_adapters, moved, run_forked, run_here, write_data

EXACT = {"strategy.aggregator": "exact", "model.lora": {"rank": 4}}


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
