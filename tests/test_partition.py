"""A cut model computes what the uncut model computes, bit for bit, whatever the family."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertEncoder
from transformers.utils.output_capturing import _active_collector

from elsa_pl.errors import UnsupportedModelError
from elsa_pl.functional.factors import to_rank
from elsa_pl.lora import LoraSettings, add_lora, dropout_key
from elsa_pl.models import Task, load_model, uncut
from elsa_pl.partition import Part, SplitPlan, check_cut, cut, find_blocks, num_blocks, replicate
from elsa_pl.strategies.placement import Placement, decide
from elsa_pl.tiers import SplitModel

BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
GQA = {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
# Masks that alternate in a way that a cut after one block shifts, and windows that 24 tokens overflow.
ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "electra": {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 4},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "modernbert": {
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 6,
        "global_attn_every_n_layers": 3,
    },
    "gpt2": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
    },
    "gpt_neox": {},
    "gptj": {**GPT2, "rotary_dim": 4},
    "gpt_bigcode": GPT2,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"alibi": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64},
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 5},
    "mixtral": {**GQA, "num_local_experts": 4, "sliding_window": 5},
    "qwen2": {**GQA, **ALTERNATING, "use_sliding_window": True},
    "qwen3": {**GQA, **ALTERNATING, "use_sliding_window": True, "head_dim": 8},
    "gemma": {**GQA, "head_dim": 8},
    "gemma2": {**GQA, **ALTERNATING, "head_dim": 8},
    "gemma3_text": {**GQA, **ALTERNATING, "head_dim": 8},
    "phi": {},
    "phi3": {"sliding_window": 5},
    "olmo2": GQA,
    "granite": GQA,
    "stablelm": GQA,
    "cohere": GQA,
    "smollm3": {**GQA, **ALTERNATING, "use_sliding_window": True, "no_rope_layers": [1, 0, 1, 1]},
    "starcoder2": {**GQA, "sliding_window": 5},
    "gpt_oss": {**GQA, **ALTERNATING, "head_dim": 8, "num_local_experts": 4},
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "modernbert")
NO_CLASSIFIER = ("granite", "cohere")
CASES: list[tuple[str, Task]] = [(family, "classification") for family in FAMILIES if family not in NO_CLASSIFIER]
CASES += [(family, "causal_lm") for family in FAMILIES if family not in ENCODERS]
PLAN = SplitPlan(front=1, middle=2, tail=1)


def build(family: str, task: Task = "classification", dropout: float = 0.0, **fields: Any) -> PeftModel:
    """A tiny model with adapters that are not at their start, where half of all gradients would be zero."""
    config = {"model_type": family, **BASE, **FAMILIES.get(family, {}), **fields}
    model = load_model(None, config, task, 3 if task == "classification" else None, seed=0)
    peft_model = add_lora(model, LoraSettings(rank=2, dropout=dropout), task, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return peft_model.train()


def make_batch(task: Task = "classification", seed: int = 0) -> dict[str, Tensor]:
    """Three texts of 24, 17 and 9 tokens."""
    ids = torch.randint(3, 99, (3, 24), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(24) < torch.tensor([[24], [17], [9]])).long()
    ids = ids * mask
    labels = torch.tensor([0, 2, 1]) if task == "classification" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def whole_step(model: PeftModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in uncut(model).named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.loss.detach(), output.logits.detach(), gradients


def split_step(parts: Sequence[Part], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A step as over a network: each part backpropagates on its own, only tensors are handed over."""
    *inner, last = parts
    sent: list[Tensor] = []
    received: list[Tensor] = []
    for part in inner:
        seen = {"attention_mask": batch["attention_mask"]} if received else batch
        sent.append(part(seen, *received[-1:]))
        received.append(sent[-1].detach().requires_grad_())
    output = last(batch, *received[-1:])
    output.loss.backward()
    for states, arrived in zip(reversed(sent), reversed(received), strict=True):
        states.backward(arrived.grad)
    gradients = {n: p.grad.clone() for part in parts for n, p in part.adapters().items() if p.grad is not None}
    for part in parts:
        part.zero_grad()
    return output.loss.detach(), output.logits.detach(), gradients


def assert_same(
    got: tuple[Tensor, Tensor, dict[str, Tensor]], expected: tuple[Tensor, Tensor, dict[str, Tensor]]
) -> None:
    assert torch.equal(got[0], expected[0]), "loss"
    assert torch.equal(got[1], expected[1]), "logits"
    assert got[2].keys() == expected[2].keys()
    different = [name for name, gradient in expected[2].items() if not torch.equal(got[2][name], gradient)]
    assert not different, different


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in module.parameters())


@pytest.mark.parametrize(("family", "task"), CASES)
def test_split_equals_uncut(family: str, task: Task) -> None:
    model, batch = build(family, task), make_batch(task)
    parts = cut(model, PLAN)
    expected = whole_step(model, batch)
    trainable = {n for n, p in uncut(model).named_parameters() if p.requires_grad}
    assert expected[2].keys() == trainable, "every adapter must get a gradient, or the comparison is empty"
    assert all(gradient.abs().max() > 0 for name, gradient in expected[2].items()), "nor zeros only"
    assert_same(split_step(parts, batch), expected)
    check_cut(model, PLAN)


def test_the_tests_windows_matter() -> None:
    """Were the windows wider than the texts, alternating layers would be alike and the test above blind."""
    batch = make_batch("causal_lm")
    narrow = build("gemma2", "causal_lm")
    wide = build("gemma2", "causal_lm", sliding_window=64)
    assert not torch.equal(narrow(**batch).logits, wide(**batch).logits)


@pytest.mark.parametrize("fields", [{"alibi": False}, {"alibi": False, "new_decoder_architecture": True}])
def test_falcon_without_alibi(fields: dict[str, Any]) -> None:
    model, batch = build("falcon", "causal_lm", **fields), make_batch("causal_lm")
    parts = cut(model, PLAN)
    assert_same(split_step(parts, batch), whole_step(model, batch))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradient_checkpointing(family: str) -> None:
    """transformers checkpoints inside a block's hooks, so recomputation neither enters nor leaves a part."""
    model, batch = build(family, "causal_lm"), make_batch("causal_lm")
    expected = whole_step(model, batch)
    uncut(model).gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(split_step(cut(model, PLAN), batch), expected)


@pytest.mark.parametrize("family", ["bert", "gemma2"])
def test_dropout_is_that_of_the_uncut_model(family: str) -> None:
    model, batch = build(family, dropout=0.3), make_batch()
    with dropout_key(7, "step", 1):
        expected = whole_step(model, batch)
        assert_same(split_step(cut(model, PLAN), batch), expected)
    with dropout_key(7, "step", 2):
        assert not torch.equal(whole_step(model, batch)[1], expected[1])


def test_token_types_reach_the_front() -> None:
    model, batch = build("bert"), make_batch()
    typed = {**batch, "token_type_ids": (torch.arange(24) >= 12).long().expand(3, 24)}
    expected = whole_step(model, typed)
    assert_same(split_step(cut(model, PLAN), typed), expected)
    assert not torch.equal(expected[1], whole_step(model, batch)[1])


def test_cut_leaves_the_model_as_it_was() -> None:
    model, batch = build("gemma2"), make_batch()
    expected, described = whole_step(model, batch), str(model)
    before = uncut(model).config.to_dict()  # taken late: a first forward writes problem_type into it
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    cut(model, PLAN)
    check_cut(model, PLAN)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert uncut(model).config.to_dict() == before
    assert str(model) == described
    assert_same(whole_step(model, batch), expected)


@pytest.mark.parametrize("family", ["bert", "electra", "opt", "gpt2", "bloom", "modernbert", "gemma3_text"])
def test_parts_hold_only_their_share(family: str) -> None:
    model = build(family)
    parts = cut(model, PLAN)
    names = [{id(p) for p in part.parameters()} for part in parts]
    whole = {id(p) for p in model.parameters()}
    assert set().union(*names) == whole, "every weight is in some part, and none is a copy"
    assert sum(map(len, names)) == len(whole), "and in no other"
    assert sum(map(parameter_bytes, parts)) == parameter_bytes(model)
    blocks = find_blocks(model)[1]
    assert parameter_bytes(parts[1]) == parameter_bytes(blocks[1]) + parameter_bytes(blocks[2])


def test_a_tied_head_stays_in_the_tail() -> None:
    model = build("gpt2", "causal_lm", tie_word_embeddings=True)
    front, middle, tail = cut(model, PLAN)
    embeddings = uncut(model).get_input_embeddings().weight
    assert [any(p is embeddings for p in part.parameters()) for part in (front, middle, tail)] == [
        True,
        False,
        True,
    ]
    assert_same(split_step((front, middle, tail), make_batch("causal_lm")), whole_step(model, make_batch("causal_lm")))


def test_adapters_have_the_names_of_the_uncut_model() -> None:
    model = build("bert")
    parts = cut(model, PLAN)
    named = dict(uncut(model).named_parameters())
    for part in parts:
        for name, parameter in part.adapters().items():
            assert named[name] is parameter
    assert "bert.encoder.layer.3.attention.self.query.lora_A.default.weight" in parts[2].adapters()
    assert "classifier.modules_to_save.default.weight" in parts[2].adapters()
    assert all(".layer.1." in name or ".layer.2." in name for name in parts[1].adapters())


def test_load_adapters() -> None:
    parts = cut(build("bert"), PLAN)
    middle = replicate(parts[1])
    values = {name: torch.full_like(p, 0.5) for part in parts for name, p in part.adapters().items()}
    held = middle.adapters()
    middle.load_adapters(values)
    assert all(held[name] is p and (p == 0.5).all() for name, p in middle.adapters().items())
    name = next(iter(held))
    with pytest.raises(ValueError, match="same model and rank"):
        middle.load_adapters({**values, name: torch.zeros(7)})
    del values[name]
    with pytest.raises(KeyError, match=name):
        middle.load_adapters(values)


def test_replicas_share_frozen_storage_only() -> None:
    parts = cut(build("bert"), PLAN)
    batch = make_batch()
    expected = split_step(parts, batch)
    replicas = tuple(replicate(part) for part in parts)
    for part, replica in zip(parts, replicas, strict=True):
        for (name, one), (_, other) in zip(part.named_parameters(), replica.named_parameters(), strict=True):
            assert (one is other) == (not one.requires_grad), name
            assert (one.data_ptr() == other.data_ptr()) == (not one.requires_grad), name
        assert all(a is b for a, b in zip(part.buffers(), replica.buffers(), strict=True))
    front, middle, tail = replicas
    assert_same(split_step((front, middle, tail), batch), expected)
    with torch.no_grad():
        for parameter in middle.adapters().values():
            parameter.zero_()
    assert_same(split_step(parts, batch), expected)
    assert not torch.equal(split_step((front, middle, tail), batch)[1], expected[1])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_replica_of_lower_rank_trains_the_first_directions(family: str) -> None:
    """And evaluates with all of them, however often it changes between the two."""
    parts, batch = cut(build(family), PLAN), make_batch()
    values = {name: p.detach() + 0.1 for part in parts for name, p in part.adapters().items()}
    first = to_rank(values, 1)
    limited = [replicate(part, 1) for part in parts]
    for part in limited:
        before = part.adapters()
        part.load_adapters(values)
        for mode in (False, True, True, False, False):
            part.train(mode)
            held = part.adapters()
            assert [(name, id(p)) for name, p in held.items()] == [(name, id(p)) for name, p in before.items()]
            assert all(torch.equal(p, first[name]) for name, p in held.items())
        part.load_adapters(values)  # while it evaluates
    for part in parts:
        part.load_adapters(values)
    loss, logits = run(parts, batch)
    assert torch.equal(run(limited, batch)[1], logits)

    for part in parts:
        part.load_adapters(to_rank(first, 2))
    for part in limited:
        part.train()
    expected = split_step(parts, batch)
    got = split_step(limited, batch)
    torch.testing.assert_close(got[1], expected[1])
    assert (got[1] - logits).abs().max() > 1e-3, "the second direction matters"
    assert got[0] != loss
    assert got[2].keys() == expected[2].keys()
    for name, gradient in to_rank(expected[2], 1).items():
        torch.testing.assert_close(got[2][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def run(parts: Sequence[Part], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and logits."""
    hidden = None
    with torch.no_grad():
        for part in parts:
            output: Any = part(batch, hidden)
            hidden = output
    return output.loss, output.logits


@pytest.mark.parametrize("family", ["bert", "gemma2"])
def test_threads_share_parts(family: str) -> None:
    """Eight threads through the same three objects, each with its own text and key."""
    parts = cut(build(family, dropout=0.3), PLAN)

    def forward(seed: int) -> Tensor:
        batch = make_batch(seed=seed)
        with dropout_key(seed), torch.no_grad():
            hidden = parts[1]({"attention_mask": batch["attention_mask"]}, parts[0](batch))
            logits: Tensor = parts[2](batch, hidden).logits
        assert _active_collector.get() is None, "transformers still collects outputs"
        return logits

    expected = [forward(seed) for seed in range(8)]
    got: dict[int, list[Tensor]] = {seed: [] for seed in range(8)}
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        for _ in range(5):
            got[seed].append(forward(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(8):
        assert len(got[seed]) == 5
        assert all(torch.equal(logits, expected[seed]) for logits in got[seed])


def test_the_middle_sees_no_ids() -> None:
    """Its model gets the mask and placeholder ids only, even if a caller hands it the whole batch."""
    front, middle, _ = cut(build("gemma2"), PLAN)
    batch, seen = make_batch(), {}
    middle.model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    middle(batch, front(batch))
    assert seen.keys() == {"input_ids", "attention_mask", "return_dict"}
    assert not seen["input_ids"].any()


def test_missing_inputs() -> None:
    front, middle, tail = cut(build("bert"), PLAN)
    batch = make_batch()
    mask = {"attention_mask": batch["attention_mask"]}
    hidden = front(batch)
    with pytest.raises(ValueError, match="takes no hidden states"):
        middle(mask)
    with pytest.raises(ValueError, match="takes no hidden states"):
        front(batch, hidden)
    with pytest.raises(ValueError, match="input_ids"):
        tail(mask, hidden)
    assert tail({**mask, "input_ids": batch["input_ids"]}, middle(mask, hidden)).loss is None


class _CountingEncoder(BertEncoder):
    """Blocks that depend on a position counted by the loop around them, as no list in a config tells."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]  # the rest
        for index, layer in enumerate(self.layer):
            output = layer(hidden_states * (1 + index), attention_mask)
            hidden_states = output[0] if isinstance(output, tuple) else output
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)


def test_check_cut_catches_a_model_that_counts_its_blocks() -> None:
    model: Any = load_model(None, {"model_type": "bert", **BASE}, "classification", 3, seed=0)
    check_cut(model, PLAN)
    model.bert.encoder.__class__ = _CountingEncoder
    with pytest.raises(UnsupportedModelError, match=r"'bert' \(BertForSequenceClassification\)"):
        check_cut(model, PLAN)


def test_a_chosen_plan_is_checked_too() -> None:
    """Where callbacks choose plans, of the model that the check above catches."""
    module = SplitModel(None, {"model_type": "bert", **BASE}, task="classification", plan=PLAN, seed=0)
    module.prepare(3)
    before = Placement({"client-7": "edge-0"}, {"client-7": module.plan_of("client-7")})

    class Chooser(Callback):
        def on_plan_clients(self, trainer: Any, plans: Any, assignment: Any) -> dict[str, tuple[int, int, int]]:
            return {"client-7": (2, 1, 1)}

    trainer: Any = Trainer(callbacks=[Chooser()], logger=False, enable_checkpointing=False, accelerator="cpu")
    assert decide(trainer, before, module.check_plan).plans["client-7"] == SplitPlan(2, 1, 1)
    model: Any = module._held[0].get_base_model()
    model.bert.encoder.__class__ = _CountingEncoder
    assert decide(trainer, before, module.check_plan).plans["client-7"] == SplitPlan(2, 1, 1), "it was checked before"
    module._checked.clear()
    with pytest.raises(UnsupportedModelError, match=r"the plan 2\|1\|1 that was chosen for client-7 .* 'bert'"):
        decide(trainer, before, module.check_plan)


def test_trainable_tensors_of_two_parts_are_refused() -> None:
    model = load_model(None, {"model_type": "gpt2", **BASE, **GPT2}, "causal_lm", None, seed=0)
    with pytest.raises(ValueError, match=r"lm_head\.weight is trainable and in two parts"):
        cut(model, PLAN)


def test_plans() -> None:
    assert SplitPlan(front=2, tail=1).resolve(6) == SplitPlan(front=2, middle=3, tail=1)
    assert num_blocks(build("gpt2")) == 4
    assert [SplitPlan(*plan).kind for plan in ((4, 0, 0), (1, 3, 0), (1, 2, 1))] == ["uncut", "two-part", "three-part"]
    for wrong in ({"front": 0}, {"tail": -1}, {"middle": 0}, {"front": 0, "middle": 0, "tail": 0}):
        with pytest.raises(ValueError, match="1 <= front"):
            SplitPlan(**wrong)
    with pytest.raises(ValueError, match="front=4, middle=None, tail=3, num_layers=6: lower front or tail"):
        SplitPlan(front=4, tail=3).resolve(6)
    with pytest.raises(ValueError, match="== num_layers"):
        SplitPlan(front=1, middle=2, tail=1).resolve(6)


@pytest.mark.parametrize("plan", [SplitPlan(*p) for p in ((1, 1, 2), (2, 1, 1), (1, 2, 1), (1, 3, 0), (4, 0, 0))])
def test_any_plan(plan: SplitPlan) -> None:
    model, batch = build("qwen2", "causal_lm"), make_batch("causal_lm")
    assert_same(split_step(cut(model, plan), batch), whole_step(model, batch))
