"""Runs in which fewer tokens go on behind the front."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from elsa_pl import cli
from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.pooling import TokenPooling
from elsa_pl.partition import SplitPlan
from elsa_pl.tiers import SplitModel
from elsa_pl.tiers.probes import ProbeModel
from tests.runs import (
    TINY_BERT,
    TINY_LLAMA,
    Settings,
    arguments,
    assert_close,
    assert_equal,
    make_module,
    run_forked,
    run_here,
    write_data,
    write_tickets,
)

WIDTH = 32
PLAN = SplitPlan().resolve(4)
LINKS = [
    {"class_path": "LinkProjection", "init_args": {"ratio": 4}},
    {"class_path": "LinkQuantization", "init_args": {"bits": 4, "block": 8}},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four clients on two edges, two rounds."""
    return {
        **write_data(tmp_path_factory.mktemp("data")),
        "strategy.num_edges": 2,
        "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
    }


def test_groups_of_one_token_change_nothing(base: Settings, tmp_path: Path) -> None:
    plain = run_here(tmp_path, "plain", base)
    grouped = run_here(tmp_path, "grouped", {**base, "model.token_pooling": {"uplink": 1, "downlink": 1}})
    assert_close(grouped.adapters(), plain.adapters(), atol=2e-4)
    assert grouped.summary()["bytes"]["uplink"] == plain.summary()["bytes"]["uplink"]


@pytest.mark.parametrize("link", ["uplink", "downlink"])
def test_one_state_of_each_text_crosses(base: Settings, tmp_path: Path, link: str) -> None:
    run = run_here(tmp_path, "run", {**base, "model.token_pooling": {link: "first"}})
    counted = run.summary()["bytes"]
    texts = 2 * 2 * 4 * 8  # rounds, steps, clients, batch
    assert counted["downlink"]["backward"] == texts * WIDTH * 4
    assert (counted["uplink"]["backward"] == texts * WIDTH * 4) == (link == "uplink")
    assert run.summary()["test_accuracy"] > 0


@pytest.mark.parametrize("pooling", [{"uplink": "first"}, {"uplink": 2, "downlink": "first"}])
def test_pooled_layouts_are_equal(base: Settings, tmp_path: Path, pooling: Settings) -> None:
    """With links that are fitted to pooled states, and clients that are tried on the probes by their own cuts."""
    settings = {
        **base,
        "data.num_probes": 32,
        "model.token_pooling": pooling,
        "trainer.callbacks": [*LINKS, {"class_path": "TrustScoring", "init_args": {"pictures": False}}],
    }
    single = run_here(tmp_path, "single", settings)
    full = run_forked(tmp_path, "full", {**settings, "strategy.layout": "full", "strategy.num_hosts": 2}, 5)
    assert_equal(full.adapters(), single.adapters())
    for link in ("uplink", "downlink"):
        # not forward: evaluation pads the texts of a batch alike, and hosts share batches out
        assert full.summary()["bytes"][link]["backward"] == single.summary()["bytes"][link]["backward"]
    assert full.summary()["test_loss"] == pytest.approx(single.summary()["test_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "pooling", [TokenPooling(1), TokenPooling(1, 1), TokenPooling("first"), TokenPooling(1, "first")]
)
def test_probes_go_the_way_of_the_parts(pooling: TokenPooling) -> None:
    """Through parts as through the uncut model, where each token is a group of its own."""
    module = make_module({})
    uncut, parts = (
        ProbeModel(module.build(), "classification", torch.device("cpu"), nullcontext, kind)
        for kind in (TokenPooling(), pooling)
    )
    ids = torch.arange(1, 25).view(3, 8)
    batches = [{"input_ids": ids, "attention_mask": (torch.arange(8) < torch.tensor([[8], [5], [2]])).long()}]
    plain, pooled = (model.evaluate(model.adapters(), batches, PLAN) for model in (uncut, parts))
    same = [torch.allclose(*pair, atol=1e-5) for pair in zip(plain, pooled, strict=True)]
    assert same == ["first" not in (pooling.uplink, pooling.downlink)] * 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model.token_pooling.uplink": 0}, "token_pooling"),
        ({"model.token_pooling.downlink": "first", "model.model_config": TINY_LLAMA}, "sees no other token"),
    ],
)
def test_what_does_not_fit(
    base: Settings, tmp_path: Path, settings: Settings, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(tmp_path, "wrong", {**base, **settings})) == 1
    assert reason in capfd.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_two_blocks_are_enough() -> None:
    """Of a two-part split; the default plan has three parts."""
    config = {**TINY_BERT, "num_hidden_layers": 2}
    module = SplitModel(None, config, plan=SplitPlan(1, 1, 0), token_pooling=TokenPooling("first"))
    module.prepare(4)
    assert module.resolved_plan == SplitPlan(1, 1, 0)


def test_texts_are_not_continued_from_one_state() -> None:
    with pytest.raises(ConfigurationError, match="token_pooling is for classification"):
        SplitModel(task="causal_lm", token_pooling=TokenPooling("first"))


def test_an_audit_guesses_every_token_of_a_pooled_text(base: Settings, tmp_path: Path) -> None:
    """Of a random model: from a mean of three states less is read than from each of them, and never less than blind."""
    public = tmp_path / "public.csv"
    pd.read_csv(write_tickets(tmp_path / "others.csv", 400, seed=2))[["text"]].to_csv(public, index=False)
    audit = {"num_texts": 20, "num_known": 5, "num_candidates": 4, "public_file": str(public), "pictures": False}
    more = {
        **base,
        "data.num_probes": 32,
        "data.validation_fraction": 0.2,
        "trainer.max_epochs": 1,
        "trainer.callbacks": [{"class_path": "PrivacyAudit", "init_args": audit}],
    }
    best = {}
    for pooling in (None, 3, "first"):
        run = run_here(tmp_path, str(pooling), {**more, "model.token_pooling.uplink": pooling})
        table = pd.read_csv(run.folder / "privacy.csv").query("reader == 'edge'").set_index("what")["share"]
        assert {"blind", "nearest", "inverter", "inverter, hidden layer", "procrustes", "refined"} <= set(table.index)
        assert ({"search", "whole text", "nearest texts"} <= set(table.index)) == (pooling is not None)
        best[pooling] = table.max()
        blind = table["blind"]
    assert best[None] > 0.9, "all words are public"
    assert best[None] > best[3] > best["first"] >= blind > 0
