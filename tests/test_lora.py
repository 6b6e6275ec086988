"""Adapters and their dropout are the same wherever they are made."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from elsa_pl.lora import KeyedDropout, LoraSettings, add_lora, dropout_key
from elsa_pl.models import Task, load_model

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(model_type: str = "bert", task: Task = "classification", **fields: Any) -> PreTrainedModel:
    config = {"model_type": model_type, **TINY, **fields}
    return load_model(None, config, task, 3 if task == "classification" else None, seed=0)


def trainable(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_same_seed_same_adapters_whatever_was_drawn_before() -> None:
    one = trainable(add_lora(tiny(), LoraSettings(), "classification", seed=3))
    torch.rand(7)
    state = torch.get_rng_state()
    other = trainable(add_lora(tiny(), LoraSettings(), "classification", seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    third = trainable(add_lora(tiny(), LoraSettings(), "classification", seed=4))
    assert one.keys() == other.keys() == third.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], third[name])}
    assert changed == {name for name in one if "lora_A" in name}


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("bert", {}, {"query", "value"}),
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}, {"c_attn"}),
        ("llama", {}, {"q_proj", "v_proj"}),
        # peft knows nothing of these.
        ("distilbert", {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}, {"q_lin", "v_lin"}),
        ("modernbert", {"cls_token_id": 1, "sep_token_id": 2}, {"Wqkv"}),
        ("phi3", {}, {"qkv_proj"}),
        ("olmo2", {}, {"q_proj", "v_proj"}),
    ],
)
def test_chosen_layers(model_type: str, fields: dict[str, Any], expected: set[str]) -> None:
    model = add_lora(tiny(model_type, **fields), LoraSettings(rank=2), "classification", seed=0)
    names = [name.split(".lora_")[0] for name in trainable(model) if ".lora_" in name]
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(set(names)) == 2 * len(expected), "in both blocks"


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("bert", {}, {"classifier"}),
        ("llama", {}, {"score"}),
        ("deberta-v2", {}, {"pooler", "classifier"}),
        ("modernbert", {"cls_token_id": 1, "sep_token_id": 2}, {"head", "classifier"}),
        (
            "distilbert",
            {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
            {"pre_classifier", "classifier"},
        ),
    ],
)
def test_heads_are_trained_in_full(model_type: str, fields: dict[str, Any], expected: set[str]) -> None:
    model = add_lora(tiny(model_type, **fields), LoraSettings(rank=2), "classification", seed=0)
    heads = {name for name in trainable(model.get_base_model()) if ".lora_" not in name}
    assert {name.split(".")[0] for name in heads} == expected
    assert all(".modules_to_save.default." in name for name in heads)


def test_causal_lm_trains_adapters_only() -> None:
    model = add_lora(tiny("llama", "causal_lm"), LoraSettings(), "causal_lm", seed=0)
    assert all(".lora_" in name for name in trainable(model))


def test_given_layers() -> None:
    settings = LoraSettings(rank=2, target_modules=["key", "output.dense"])
    model = add_lora(tiny(), settings, "classification", seed=0)
    adapted = {name.split(".lora_")[0].split(".", 5)[-1] for name in trainable(model) if ".lora_" in name}
    assert adapted == {"0.attention.self.key", "0.attention.output.dense", "0.output.dense"} | {
        "1.attention.self.key",
        "1.attention.output.dense",
        "1.output.dense",
    }


def test_unknown_layers_name_the_choices() -> None:
    settings = LoraSettings(target_modules=["query", "q_proj"])
    with pytest.raises(ValueError, match=r"\['q_proj'\] match no layer of 'bert'.*attention\.self\.query"):
        add_lora(tiny(), settings, "classification", seed=0)


def test_a_family_without_usual_names_names_the_choices() -> None:
    model: Any = tiny()
    model.config.model_type = "stranger"
    for block in model.bert.encoder.layer:
        attention = block.attention.self
        attention.asks = attention.query
        del attention.query
    with pytest.raises(ValueError, match=r"known for 'stranger': set target_modules to some of .*self\.asks"):
        add_lora(model, LoraSettings(), "classification", seed=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"alpha": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"target_modules": []},
        {"target_modules": "query"},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"expected .*{next(iter(wrong))}"):
        LoraSettings(**wrong)


def test_dropout_depends_on_key_and_name_only() -> None:
    x = torch.ones(50, 40)
    layer, twin, other = KeyedDropout(0.4, "a"), KeyedDropout(0.4, "a"), KeyedDropout(0.4, "b")
    with dropout_key(1, "step", 2):
        mask = layer(x)
        assert torch.equal(mask, layer(x))
        torch.rand(3)
        assert torch.equal(mask, twin(x))
        assert not torch.equal(mask, other(x))
        with dropout_key(1, "step", 3):
            assert not torch.equal(mask, layer(x))
        assert torch.equal(mask, layer(x)), "the outer key is back"
    assert set(mask.unique().tolist()) == {0.0, (x / (1 - 0.4))[0, 0].item()}
    assert (mask == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert mask.mean().item() == pytest.approx(1.0, abs=0.1)


def test_dropout_needs_a_key_in_training_only() -> None:
    layer, x = KeyedDropout(0.5, "bert.encoder.layer.0.query"), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"bert\.encoder\.layer\.0\.query needs a key"):
        layer(x)
    assert layer.eval()(x) is x
    assert KeyedDropout(0.0, "a").train()(x) is x


def test_a_key_is_that_of_its_thread() -> None:
    layer, x = KeyedDropout(0.5, "a"), torch.ones(64)
    found: list[str] = []

    def work() -> None:
        try:
            layer(x)
        except RuntimeError:
            found.append("no key")

    with dropout_key(1):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == ["no key"]


def test_adapters_have_keyed_dropout() -> None:
    model = add_lora(tiny(), LoraSettings(dropout=0.2), "classification", seed=0).get_base_model()
    dropouts = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    assert {d.name for d in dropouts} == {
        f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")
    }
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.0}, "and nothing else drops anything"
