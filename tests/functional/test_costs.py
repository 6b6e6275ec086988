import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from elsa_pl.functional.costs import (
    BYTES_PER_NUMBER,
    ModelShape,
    StepCosts,
    Workload,
    block_costs,
    shape_of,
    step_costs,
)
from elsa_pl.functional.pooling import TokenPooling
from elsa_pl.lora import LoraSettings, add_lora
from elsa_pl.models import Task, find_blocks, load_model, uncut
from elsa_pl.partition import Part, SplitPlan, cut, replicate

FIRST = TokenPooling(downlink="first")
BATCH_SIZE, NUM_TOKENS, RANK = 4, 12, 4
WIDTHS = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 160},
    "roberta": {"intermediate_size": 160},
    "distilbert": {"hidden_dim": 160},
    "gpt2": {},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "falcon": {},
    "llama": {"intermediate_size": 160, "num_key_value_heads": 2},
    "gemma": {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 16},
    "qwen3": {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 32},
    "mixtral": {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}
MINILM = ModelShape(
    num_layers=6,
    hidden_size=384,
    intermediate_size=1536,
    num_heads=12,
    num_kv_heads=12,
    head_size=32,
    vocab_size=30522,
    num_positions=512,
    num_classes=6,
)


def build(family: str, task: Task = "classification") -> torch.nn.Module:
    config = {"model_type": family, "pad_token_id": 0, **WIDTHS, **FAMILIES[family]}
    model = load_model(None, config, task, 3, seed=0)
    return add_lora(model, LoraSettings(rank=RANK), task, seed=0)


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1, 300, (BATCH_SIZE, NUM_TOKENS), generator=draw),
        "attention_mask": torch.ones(BATCH_SIZE, NUM_TOKENS, dtype=torch.long),
        "labels": torch.randint(3, (BATCH_SIZE,), generator=draw),
    }


def workload(model: torch.nn.Module) -> Workload:
    return Workload(shape=shape_of(uncut(model).config), batch_size=BATCH_SIZE, num_tokens=NUM_TOKENS, lora_rank=RANK)


@pytest.fixture(scope="module", name="bert")
def _bert() -> torch.nn.Module:
    return build("bert")


def parts_of(model: torch.nn.Module, plan: tuple[int, int, int]) -> list[Part]:
    return [replicate(part).train() for part in cut(model, SplitPlan(*plan))]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_block(family: str) -> None:
    config = {"model_type": family, "pad_token_id": 0, **WIDTHS, **FAMILIES[family]}
    model = load_model(None, config, "classification", 3, seed=0)
    shape = shape_of(model.config)
    held = sum(parameter.nbytes for parameter in find_blocks(model)[1][0].parameters())
    assert block_costs(shape, NUM_TOKENS).parameter_bytes == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", {"intermediate_size": 160, "gated_mlp": False, "num_kv_heads": 4, "num_positions": 512}),
        ("distilbert", {"intermediate_size": 160, "gated_mlp": False, "num_positions": 512}),
        ("gpt2", {"intermediate_size": 256, "gated_mlp": False, "num_positions": 1024}),
        ("falcon", {"num_kv_heads": 1, "num_positions": 0}),
        ("llama", {"gated_mlp": True, "num_kv_heads": 2, "num_positions": 0}),
        ("gemma", {"gated_mlp": True, "head_size": 16, "tied_head": True}),
        ("qwen3", {"gated_mlp": True, "head_size": 32}),
        ("mixtral", {"num_experts": 4, "num_active_experts": 2, "intermediate_size": 96}),
    ],
)
def test_shapes_of_families(family: str, expected: dict[str, object]) -> None:
    config = AutoConfig.for_model(family, **WIDTHS, **FAMILIES[family])
    shape = shape_of(config, causal_lm=True)
    assert {name: getattr(shape, name) for name in expected} == expected
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (4, 64, 300)
    assert shape.num_classes is None
    config.num_labels = 5
    assert shape_of(config).num_classes == 5


def counted_flops(part: Part, inputs: Mapping[str, Tensor], hidden: Tensor | None) -> int:
    """Forward and backward pass, counted by torch from every matrix product that it runs."""
    with FlopCounterMode(display=False) as counter:
        output: Any = part(inputs, hidden)
        if part.last:
            output.loss.backward()
        else:
            output.backward(torch.ones_like(output))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("plan", [(1, 2, 1), (2, 1, 1), (1, 1, 2)])
def test_flops_equal_what_torch_counts(family: str, plan: tuple[int, int, int]) -> None:
    model = build(family)
    costs = step_costs(workload(model), plan)
    hidden = None
    inputs = batch()
    for part, flops in zip(
        parts_of(model, plan), (costs.front_flops, costs.middle_flops, costs.tail_flops), strict=True
    ):
        assert counted_flops(part, inputs, hidden) == pytest.approx(flops, rel=0.05)
        hidden = torch.zeros(BATCH_SIZE, NUM_TOKENS, 64, requires_grad=True)


def kept_bytes(part: Part, inputs: Mapping[str, Tensor], hidden: Tensor | None) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in part.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = part(inputs, hidden)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


@pytest.mark.parametrize("plan", [(1, 2, 1), (2, 1, 1), (1, 1, 2)])
def test_memory_equals_what_the_parts_hold(bert: torch.nn.Module, plan: tuple[int, int, int]) -> None:
    costs = step_costs(workload(bert), plan)
    front, _, tail = parts_of(bert, plan)
    inputs = batch()
    hidden = torch.zeros(BATCH_SIZE, NUM_TOKENS, 64, requires_grad=True)
    kept = kept_bytes(front, inputs, None) + kept_bytes(tail, inputs, hidden)
    assert costs.activation_bytes == pytest.approx(kept, rel=0.02)
    held = sum(p.nbytes * (4 if p.requires_grad else 1) for part in (front, tail) for p in part.parameters())
    assert costs.parameter_bytes == pytest.approx(held, rel=0.02)
    assert costs.link_bytes == 4 * hidden.nbytes
    assert costs.client_bytes == costs.parameter_bytes + costs.activation_bytes + costs.link_bytes


def test_bytes_on_the_links() -> None:
    tokens, plain = 16 * 64, 384 * BYTES_PER_NUMBER
    work: dict[str, Any] = {"shape": MINILM, "batch_size": 16, "num_tokens": 64}
    costs = step_costs(Workload(**work), (1, 4, 1))
    assert (costs.up_bytes, costs.down_bytes) == (tokens * (2 * plain + 1), tokens * 2 * plain)
    packed = step_costs(Workload(**work, uplink_bytes_per_token=48, downlink_bytes_per_token=96), (1, 4, 1))
    assert (packed.up_bytes, packed.down_bytes) == (tokens * (48 + 96 + 1), tokens * (48 + 96))
    assert packed.client_flops == costs.client_flops


def total(costs: StepCosts) -> float:
    return costs.front_flops + costs.middle_flops + costs.tail_flops


def test_cuts_move_work_and_make_none() -> None:
    work = Workload(shape=MINILM, batch_size=8, num_tokens=48)
    costs = {plan: step_costs(work, plan) for plan in itertools.product(range(1, 5), repeat=3) if sum(plan) == 6}
    assert len(costs) == 10
    assert {round(total(cost)) for cost in costs.values()} == {round(total(costs[1, 4, 1]))}
    for (front, middle, tail), cost in costs.items():
        assert cost.middle_flops == pytest.approx(middle * costs[1, 1, 4].middle_flops)
        assert cost.client_bytes == pytest.approx(costs[tail, middle, front].client_bytes)
    assert costs[1, 4, 1].client_bytes < costs[2, 3, 1].client_bytes < costs[2, 2, 2].client_bytes


def test_frozen_weights_halve_the_backward_pass() -> None:
    block = block_costs(MINILM, num_tokens=16)
    assert 1.0 < block.backward_flops / block.forward_flops < 1.1
    assert block.first_backward_flops < 0.8 * block.backward_flops


def test_a_language_models_head() -> None:
    own = replace(MINILM, num_classes=None)
    tied = replace(MINILM, num_classes=None, tied_head=True)
    work: dict[str, Any] = {"batch_size": 2, "num_tokens": 8}
    classifier = step_costs(Workload(shape=MINILM, **work), (1, 4, 1))
    language, shared = (step_costs(Workload(shape=shape, **work), (1, 4, 1)) for shape in (own, tied))
    embeddings = 384 * 30522 * BYTES_PER_NUMBER
    assert language.parameter_bytes - shared.parameter_bytes == embeddings
    assert language.tail_flops - classifier.tail_flops == pytest.approx(4 * 384 * 30522 * 16, rel=0.01)
    assert language.activation_bytes - classifier.activation_bytes > 2 * 30522 * 16 * BYTES_PER_NUMBER * 0.99


def test_without_a_tail_or_a_middle() -> None:
    work = Workload(shape=MINILM, batch_size=8, num_tokens=48)
    three, two, whole = (step_costs(work, plan) for plan in ((1, 4, 1), (1, 5, 0), (6, 0, 0)))
    assert round(total(two)) == round(total(whole)) == round(total(three))
    assert whole.client_flops == pytest.approx(total(whole))
    assert whole.up_bytes == whole.down_bytes == whole.link_bytes == whole.num_messages == 0
    # half of what crosses, but for the mask
    assert two.down_bytes == three.down_bytes / 2
    assert two.up_bytes - three.up_bytes / 2 == pytest.approx(8 * 48 / 2)
    assert two.tail_flops == 0
    assert two.client_bytes < three.client_bytes < whole.client_bytes


@pytest.mark.parametrize("plan", [(0, 5, 1), (1, 0, 5), (5, 0, 1), (7, 0, -1), (1, 1, 1), (2, 4, 2)])
def test_plans_that_do_not_fit(plan: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"all in the front, 6 in all; got \({plan[0]}, {plan[1]}, {plan[2]}\)"):
        step_costs(Workload(shape=MINILM, batch_size=1, num_tokens=1), plan)


@pytest.mark.parametrize("name", ["batch_size", "num_tokens", "lora_rank"])
def test_workloads_without_work(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected {name} >= 1; got 0"):
        replace(Workload(shape=MINILM, batch_size=1, num_tokens=1), **{name: 0})  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize(("pooling", "left"), [("first", 1), (5, 8), (None, 40)])
def test_pooled_tokens_cost_nothing_behind_the_front(pooling: Any, left: int) -> None:
    work: dict[str, Any] = {"shape": MINILM, "batch_size": 8, "pooling": TokenPooling(pooling)}
    pooled = step_costs(Workload(num_tokens=36 if pooling == 5 else 40, **work), (1, 4, 1))
    del work["pooling"]
    whole, few = (step_costs(Workload(num_tokens=number, **work), (1, 4, 1)) for number in (40, left))
    assert pooled.middle_flops == few.middle_flops
    assert pooled.up_bytes == few.up_bytes
    assert pooled.link_bytes == few.link_bytes
    if pooling != 5:
        assert pooled.front_flops == whole.front_flops
    assert pooled.activation_bytes <= whole.activation_bytes


def test_tokens_that_are_pooled_late_cost_the_tail_and_the_downlink_nothing() -> None:
    work: dict[str, Any] = {"shape": MINILM, "batch_size": 8, "num_tokens": 40}
    whole, pooled = (step_costs(Workload(pooling=kind, **work), (1, 4, 1)) for kind in (TokenPooling(), FIRST))
    few = step_costs(Workload(**{**work, "num_tokens": 1}), (1, 4, 1))
    assert (pooled.front_flops, pooled.middle_flops) == (whole.front_flops, whole.middle_flops)
    assert pooled.tail_flops == few.tail_flops
    assert pooled.up_bytes == (whole.up_bytes - 320 + few.up_bytes - 8) / 2 + 320, "the mask is that of the uplink"
    assert pooled.link_bytes == (whole.link_bytes + few.link_bytes) / 2
