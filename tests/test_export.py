"""The adapter that a run exports, in plain transformers and peft, is the model that was trained and tested."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from elsa_pl.models import load_model, resolve_model, uncut
from tests.runs import TINY_LLAMA, TOKENIZER, Run, Settings, make_data, make_module, run_here, write_data


@pytest.fixture(scope="module")
def data_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


@torch.no_grad()  # not as a block, which would be left open at each yield: of two at a time, one leaves gradients off
def outputs(model: Any, settings: Settings, task: str) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """A model's outputs on the test data."""
    for batch in make_data(settings, task).eval_batches("test"):
        yield batch, model.eval()(**batch)


def best_adapters(run: Run) -> dict[str, Tensor]:
    (best,) = (run.folder / "checkpoints").glob("epoch=*.ckpt")
    return run.adapters(int(best.name.removeprefix("epoch=").split("-")[0]))


def merged(run: Run, settings: Settings, num_labels: int | None) -> Any:
    """The run's best adapters merged into the model that the run built."""
    model = make_module(settings, num_labels).build()
    parameters = dict(uncut(model).named_parameters())
    with torch.no_grad():
        for name, value in best_adapters(run).items():
            parameters[name].copy_(value)
    return model.merge_and_unload()


def assert_same_logits(one: Any, other: Any, settings: Settings, task: str) -> None:
    pairs = zip(outputs(one, settings, task), outputs(other, settings, task), strict=True)
    for (batch, got), (_, expected) in pairs:
        real = batch["attention_mask"].bool() if task == "causal_lm" else slice(None)
        scale = expected.logits[real].abs().max().item()
        torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=0, atol=1e-5 * max(1.0, scale))


def test_minilm_classifier(tmp_path: Path, data_settings: Settings) -> None:
    settings = {
        **data_settings,
        "model.model": TOKENIZER,
        "model.model_config": None,
        "model.plan": {"front": 1, "middle": 4, "tail": 1},
        "strategy.num_edges": 2,
        "strategy.local_steps": 4,
        "trainer.max_epochs": 3,
        "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
    }
    run = run_here(tmp_path, "run", settings)
    base = AutoModelForSequenceClassification.from_pretrained(resolve_model(TOKENIZER), num_labels=4)
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter"))
    assert_same_logits(model, merged(run, settings, 4), settings, "classification")

    correct, loss, count = 0, 0.0, 0
    for batch, output in outputs(model, settings, "classification"):
        correct += int((output.logits.argmax(-1) == batch["labels"]).sum())
        loss += output.loss.item() * len(batch["labels"])
        count += len(batch["labels"])
    summary = run.summary()
    assert count == 30
    assert summary["test_accuracy"] == pytest.approx(correct / count, abs=1e-7)
    assert summary["test_loss"] == pytest.approx(loss / count, abs=1e-5)
    assert correct / count > 0.4, "it has learned something, so that an untrained adapter would show"


def test_tiny_causal_lm(tmp_path: Path, data_settings: Settings) -> None:
    """From a folder of pretrained weights, which random ones stand for."""
    folder = tmp_path / "base"
    load_model(None, TINY_LLAMA, "causal_lm", None, seed=3).save_pretrained(folder)
    settings = {
        **data_settings,
        "model.model": str(folder),
        "model.model_config": None,
        "model.task": "causal_lm",
        "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "data.partition": "iid",
    }
    run = run_here(tmp_path, "run", settings)
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter"))
    assert_same_logits(model, merged(run, settings, None), settings, "causal_lm")

    loss, count = 0.0, 0
    for batch, output in outputs(model, settings, "causal_lm"):
        targets = batch["labels"][:, 1:]
        sums = torch.nn.functional.cross_entropy(output.logits[:, :-1].mT, targets, reduction="sum")
        loss, count = loss + sums.item(), count + int((targets != -100).sum())
    summary = run.summary()
    assert summary["test_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert summary["test_perplexity"] == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-4)
    assert summary["test_accuracy"] is None
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        batch = make_data(settings, "causal_lm").eval_batches("test")[0]
        difference = (plain(**batch).logits - model(**batch).logits).abs().max()
    assert difference > 1e-3, "the adapter does something"
