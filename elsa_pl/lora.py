"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) through peft, equal in every process that adds them.

peft chooses well but draws from the global generator, both when it initialises the adapters and when their
dropout runs. In a split model the two sides of a cut are in different processes, and a host runs its clients
in threads: the masks would depend on who came first. Here the initial draw has a seed of its own, and dropout
masks depend only on a key set by the caller and on the layer's name in the uncut model.
"""

import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from elsa_pl.functional.seeding import derive_seed
from elsa_pl.models import find_blocks, seeded

_USUAL_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("att_proj",),
    ("in_proj",),
)
"""Names of attention projections, for families that peft does not know; the first set found is taken."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What is trained besides the head."""

    rank: int = 8
    """Rank R of every adapter: two matrices of R rows and R columns per adapted layer."""

    alpha: float = 16
    """The adapter's output is scaled by alpha / rank."""

    dropout: float = 0.0
    """Rate of dropout on the input of the adapters, 0 <= dropout < 1; see `dropout_key`."""

    target_modules: tuple[str, ...] | list[str] | None = None
    """Names of the layers to adapt, such as ["query", "value"]; None chooses by model family."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"expected rank >= 1; got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"expected alpha > 0; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1; got {self.dropout}")
        if self.target_modules is None:
            return
        if isinstance(self.target_modules, str) or not self.target_modules:
            raise ValueError(
                f"expected target_modules to be a list of layer names, or None; got {self.target_modules!r}"
            )
        object.__setattr__(self, "target_modules", tuple(self.target_modules))


def add_lora(model: PreTrainedModel, settings: LoraSettings, task: str, seed: int) -> PeftModel:
    """Freeze `model` and put LoRA adapters into it, in place.

    For classification everything with weights outside the base model (a classifier and what leads to it) is
    trained in full beside the adapters, through peft's ``modules_to_save``.

    Args:
        model: an uncut model from `elsa_pl.models.load_model`.
        settings: rank, scale, dropout and layers.
        task: "classification" or "causal_lm".
        seed: decides the initial adapters.

    Raises:
        ValueError: the layers to adapt are not in the model, or cannot be guessed.
    """
    targets = _choose_targets(model, settings)
    layers = [module for name, module in model.named_modules() if _matches(name, targets)]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if task == "classification" else TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft annotates int and computes with any number
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=_head_names(model) if task == "classification" else None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
    )
    with seeded(derive_seed(seed, "lora")), warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 renames; goes once peft reads the new name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            for adapter, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    module.lora_dropout[adapter] = KeyedDropout(dropout.p, name)
    return peft_model


class KeyedDropout(nn.Module):
    """Dropout whose mask depends on the current `dropout_key` and on the layer's name, and on nothing else.

    Within one key the same layer always draws the same mask, so a key names everything that a mask should
    differ by: step, client, micro-batch. Each kind of device has its own generator: a CPU and a GPU disagree.

    Args:
        p: rate, 0 <= p < 1.
        name: the layer's dotted name in the uncut Hugging Face model.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability p and scale the others by 1 / (1 - p), when training."""
        if not self.training or self.p == 0:
            return x
        key: tuple[int | str, ...] | None = getattr(_current, "key", None)
        if key is None:
            raise RuntimeError(
                f"dropout={self.p} in {self.name} needs a key: run it in `with dropout_key(...):`, on the "
                "same thread, with the same coordinates for every part of the model"
            )
        generator = torch.Generator(x.device).manual_seed(derive_seed(*key, self.name))
        # Drawn in fp32 whatever x is, so that precision does not change the mask.
        mask = torch.rand(x.shape, generator=generator, device=x.device) >= self.p
        return x * mask / (1 - self.p)

    def extra_repr(self) -> str:
        """Show the rate and the name in ``print(model)``."""
        return f"p={self.p}, name={self.name}"


_current = threading.local()


@contextmanager
def dropout_key(*coordinates: int | str) -> Iterator[None]:
    """Set what the dropout masks of this thread depend on, besides the layer.

    Args:
        coordinates: what one forward pass differs from another by, such as
            ``(seed, round, step, client, micro_batch)``; the same for every part of the model.

    Example:
        >>> layer, x = KeyedDropout(0.5, "block"), torch.ones(2, 8)
        >>> with dropout_key(0, "round", 3):
        ...     here = layer(x)
        >>> with dropout_key(0, "round", 3):
        ...     print(torch.equal(here, layer(x)))
        True
    """
    outer = getattr(_current, "key", None)
    _current.key = coordinates
    try:
        yield
    finally:
        _current.key = outer


def _choose_targets(model: PreTrainedModel, settings: LoraSettings) -> list[str] | str:
    """Return the names given, else peft's for the family, else usual ones that are there."""
    if settings.target_modules is not None:
        absent = [
            target
            for target in settings.target_modules
            if not any(_matches(n, [target]) for n, _ in model.named_modules())
        ]
        if absent:
            raise ValueError(
                f"target_modules {absent} match no layer of {model.config.model_type!r}: {_choices(model)}"
            )
        return list(settings.target_modules)
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    if known is not None and any(_matches(name, known) for name, _ in model.named_modules()):
        return known if isinstance(known, str) else list(known)
    layers = _block_layers(model)
    for group in _USUAL_TARGETS:
        if set(group) <= {name.rpartition(".")[2] for name in layers}:
            return list(group)
    raise ValueError(f"no layers to adapt are known for {model.config.model_type!r}: {_choices(model)}")


def _matches(name: str, targets: Sequence[str]) -> bool:
    """Apply peft's rule: a string is a pattern for the whole name, a list holds last components."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _block_layers(model: PreTrainedModel) -> list[str]:
    """Return the names, within a block, of the layers that LoRA can adapt."""
    names = (
        name
        for block in find_blocks(model)[1]
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    )
    return list(dict.fromkeys(names))


def _choices(model: PreTrainedModel) -> str:
    return f"set target_modules to some of {_block_layers(model)}, the linear layers of a block"


def _head_names(model: PreTrainedModel) -> list[str]:
    """Return the children with weights that stand beside the base model."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]
