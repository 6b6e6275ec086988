"""Cut a Hugging Face model into front, middle and tail without code for any one family.

Each part is the model's own module tree and runs the model's own ``forward``, without all but a slice of its
blocks: the code that knows how makes masks, rotary positions and scalings. The slice stands for the whole:

1. A pre-hook on the first block kept puts the received hidden states in place of the computed ones.
2. A hook on the last block kept leaves ``forward`` by raising `_Leave`, which carries the hidden states out,
   so nothing after it runs. It is a ``BaseException``, as a model must not catch it. What transformers 5 puts
   around ``forward`` (``capture_outputs``, ``merge_with_config_defaults``) keeps state in context variables
   and undoes it in ``finally`` blocks; the tests run parts in threads and look for leftovers.
3. Several families look up what a block needs by its index, say in ``config.layer_types``, in the loop around
   the blocks. That loop now counts from 0 at block `start`, so the modules around the blocks get a config in
   which each such list is sliced too. The blocks keep the whole config and their own index.
4. Weights that cannot reach a part's output are dropped. To find them the part is run once and its autograd
   graph walked. That is also right for what is used in unexpected places (every part needs DeBERTa's relative
   positions) and for tied weights.

Hooks find the hidden states in a context variable and ``forward`` stores nothing: threads can share a part.
"""

import copy
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from elsa_pl.errors import UnsupportedModelError
from elsa_pl.functional.factors import to_rank
from elsa_pl.models import copy_sharing, find_blocks, num_blocks, sample_batch, uncut

__all__ = ["Part", "SplitPlan", "check_cut", "check_reads_ahead", "cut", "find_blocks", "num_blocks", "replicate"]

# Shapes: B batch, T tokens, D hidden width.


@dataclass(frozen=True)
class SplitPlan:
    """How many blocks each part gets. The last part that has any also has the head.

    With a tail, labels stay on the client. Two other ways to divide a model are there to compare with: without a tail
    the edge has the head, and labels are sent to it (two-part split: SplitLoRA, Lin et al. 2024, arXiv 2407.00952);
    without a middle too the client computes all, as in federated averaging.
    """

    front: int = 1
    """Blocks on the client after the embeddings, at least 1."""

    middle: int | None = None
    """Blocks on the edge; None takes what front and tail leave, at least 1. 0: the front is the whole model."""

    tail: int = 1
    """Blocks on the client before the head. 0: the head is on the edge, or with the front if that is all there is."""

    def __post_init__(self) -> None:
        parted = self.middle is None or self.middle >= 1
        if self.front < 1 or self.tail < 0 or not (parted or (self.middle == 0 and self.tail == 0)):
            raise ValueError(
                "a plan must satisfy 1 <= front, 1 <= middle, 0 <= tail, or 1 <= front, middle == tail == 0; "
                f"got front={self.front}, middle={self.middle}, tail={self.tail}"
            )

    @property
    def kind(self) -> Literal["uncut", "two-part", "three-part"]:
        """Which parts there are."""
        if self.middle == 0:
            return "uncut"
        return "three-part" if self.tail else "two-part"

    def resolve(self, num_layers: int) -> "SplitPlan":
        """Return the plan with its middle filled in, checked against a model of `num_layers` blocks.

        Raises:
            ValueError: the parts do not add up to the model.

        Example:
            >>> SplitPlan(front=1, tail=2).resolve(6)
            SplitPlan(front=1, middle=3, tail=2)
        """
        got = f"got front={self.front}, middle={self.middle}, tail={self.tail}, num_layers={num_layers}"
        if self.middle is None:
            if self.front + self.tail >= num_layers:
                raise ValueError(f"a plan must satisfy front + tail < num_layers; {got}: lower front or tail")
            return SplitPlan(self.front, num_layers - self.front - self.tail, self.tail)
        if self.front + self.middle + self.tail != num_layers:
            raise ValueError(f"a plan must satisfy front + middle + tail == num_layers; {got}: leave middle out")
        return self


class _Leave(BaseException):
    """Carries the hidden states of the last block kept out of the model's forward."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


_received: ContextVar[Tensor | None] = ContextVar("received", default=None)


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the first block kept: see [1] in the module docstring."""
    hidden = _received.get()
    assert hidden is not None, "a part's model runs through Part.forward only"
    if args:
        return (hidden, *args[1:]), kwargs
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    raise UnsupportedModelError(f"{type(block).__name__} takes its hidden states in none of the usual ways")


def _leave(block: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
    """Forward hook of the last block kept: see [2] in the module docstring."""
    raise _Leave(output[0] if isinstance(output, tuple) else output)


class _Null(nn.Module):
    """Stands for an embedding (or a layer on the way to the blocks) whose output would be replaced anyway."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self.width = width
        # Follows the part to its device and precision, as weights would.
        self.register_buffer("like", like.new_empty(0), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros of the shape that the model expects, (B, T, width)."""
        shape = _leading_shape(args, kwargs)
        assert shape is not None
        assert isinstance(self.like, Tensor)
        return self.like.new_zeros(*shape, self.width)


def _leading_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (B, T) of the first argument that has them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value.shape[0], value.shape[1]
    return None


class Part(nn.Module):
    """Blocks [start, stop) of a model, made by `cut` or `replicate`.

    Args:
        model: a copy of the uncut model that the part may take apart.
        start: first block kept.
        stop: first block not kept.

    Attributes:
        rank: of what it trains of each adapter, where that is less than the whole.
    """

    def __init__(self, model: PreTrainedModel, start: int, stop: int) -> None:
        super().__init__()
        self._blocks_name, blocks = find_blocks(model)
        self.start = start
        self.stop = stop
        self.first = start == 0
        self.last = stop == len(blocks)
        kept = nn.ModuleList(list(blocks)[start:stop])
        parent, _, child = self._blocks_name.rpartition(".")
        setattr(model.get_submodule(parent), child, kept)
        _slice_configs(model, kept, start, stop, len(blocks))
        if not self.first:
            kept[0].register_forward_pre_hook(_enter, with_kwargs=True)
        if not self.last:
            kept[-1].register_forward_hook(_leave)
        self._takes_token_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self.model = model
        self.rank: int | None = None
        # of adapters that are not trained as a whole, by local name: what is trained, and what is evaluated
        self._first: dict[str, nn.Parameter] = {}
        self._whole: dict[str, nn.Parameter] = {}

    def forward(self, batch: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor | ModelOutput:
        """Run this part's share of the model.

        Args:
            batch: ``attention_mask`` (B, T), which is all that the middle looks at; ``input_ids`` (B, T) for
                the first and the last. The first also takes ``token_type_ids`` (B, T), the last ``labels``.
            hidden: (B, T, D) from the part before; None for the first.

        Returns:
            Hidden states (B, T, D), or for the last part what the uncut model returns (loss, logits).

        Raises:
            ValueError: something is missing.
        """
        if self.first != (hidden is None):
            raise ValueError("the first part takes no hidden states, each other needs those before it")
        inputs = self._inputs(batch)
        token = _received.set(hidden)
        try:
            output = self.model(**inputs, return_dict=True)
        except _Leave as leave:
            return leave.hidden
        finally:
            _received.reset(token)
        assert isinstance(output, ModelOutput)
        return output

    def adapters(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors by their names in the uncut Hugging Face model."""
        parameters = {name: self._first.get(name, value) for name, value in self.model.named_parameters()}
        return {self._global_name(name): value for name, value in parameters.items() if value.requires_grad}

    def limit_rank(self, rank: int) -> None:
        """Train the first ``rank`` directions of each adapter only; the part evaluates with all that it is given.

        Which are all of the global adapters: figures are of the model that the run trains, whoever computes them. The
        adapters' scale stays as it is, so that their products mean the same at any rank.
        """
        self.rank = rank
        adapters = {name: parameter.detach() for name, parameter in self.adapters().items()}
        first = to_rank(adapters, rank)
        for name in list(dict(self.model.named_parameters())):
            place = self._global_name(name)
            if place in first and first[place] is not adapters[place]:
                self._first[name] = nn.Parameter(first[place])
                self._whole[name] = nn.Parameter(adapters[place].clone(), requires_grad=False)
        self._use(self._first)

    def train(self, mode: bool = True) -> Self:
        self._use(self._first if mode else self._whole)  # first: another thread may look at `training`
        return super().train(mode)

    def _use(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            module, _, leaf = name.rpartition(".")
            self.model.get_submodule(module)._parameters[leaf] = parameter

    def load_adapters(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the trainable tensors, in place, so that optimizers keep their hold on them.

        Args:
            tensors: values by the names of `adapters`; names of other parts are ignored. A part of limited rank takes
                adapters of any rank. Frozen weights may be among them: all replicas that share one get it.

        Raises:
            KeyError: a value is missing.
            ValueError: a value has another shape.
        """
        own = self.adapters()
        if missing := sorted(own.keys() - tensors.keys()):
            raise KeyError(f"expected a value for {missing[0]}; got none, nor for {len(missing) - 1} more")
        given = {name: tensors[name] for name in own}
        trained = given if self.rank is None else to_rank(given, self.rank)
        for name, parameter in own.items():
            if trained[name].shape != parameter.shape:
                shapes = f"expected shape {tuple(parameter.shape)}; got {tuple(trained[name].shape)}"
                raise ValueError(f"{name}: {shapes}: were both made with the same model and rank?")
        frozen = {self._global_name(name): value for name, value in self.model.named_parameters()}
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(trained[name])
            for name in (frozen.keys() & tensors.keys()) - own.keys():
                frozen[name].copy_(tensors[name])
        for name, parameter in self._first.items():
            whole = given[self._global_name(name)].detach().to(parameter, copy=True)
            self._whole[name] = nn.Parameter(whole, requires_grad=False)
        self._use(self._first if self.training else self._whole)

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Select what this part may see and its model takes."""
        needed = ["attention_mask"] + ["input_ids"] * (self.first or self.last)
        if missing := [key for key in needed if key not in batch]:
            raise ValueError(f"blocks [{self.start}, {self.stop}) need {missing}; got {sorted(batch)}")
        inputs = {key: batch[key] for key in needed}
        inputs.setdefault("input_ids", torch.zeros_like(batch["attention_mask"], dtype=torch.long))
        if self.first and "token_type_ids" in batch and self._takes_token_types:
            inputs["token_type_ids"] = batch["token_type_ids"]
        if self.last and batch.get("labels") is not None:
            inputs["labels"] = batch["labels"]
        return inputs

    def _global_name(self, local: str) -> str:
        prefix = f"{self._blocks_name}."
        if not local.startswith(prefix):
            return local
        index, _, rest = local.removeprefix(prefix).partition(".")
        return f"{prefix}{int(index) + self.start}.{rest}"


def cut(model: nn.Module, plan: SplitPlan) -> tuple[Part, ...]:
    """Cut a model into front, middle and tail, which share its weights; the model stays as it is.

    Parts without blocks are not among them.

    Args:
        model: an uncut Hugging Face model, with adapters (then only those are trained) or without.
        plan: where to cut.

    Raises:
        ValueError: the plan does not fit, or one trainable tensor would be in two parts.
        UnsupportedModelError: the model cannot be cut.
    """
    base = uncut(model)
    resolved = plan.resolve(num_blocks(base))
    assert resolved.middle is not None
    first_cut, second_cut = resolved.front, resolved.front + resolved.middle
    bounds = ((0, first_cut), (first_cut, second_cut), (second_cut, second_cut + resolved.tail))
    parts = tuple(Part(copy_sharing(base), start, stop) for start, stop in bounds if stop > start)
    hidden = None
    seen: set[nn.Parameter] = set()
    for part in parts:
        hidden = _drop_unused(part, sample_batch(base), hidden)
        # Not by name, since the two sides of a tied weight have different ones.
        if shared := [name for name, parameter in part.adapters().items() if parameter in seen]:
            raise ValueError(f"{shared[0]} is trainable and in two parts, where it would drift apart: freeze it")
        seen.update(part.adapters().values())
    return parts


def replicate(part: Part, rank: int | None = None) -> Part:
    """Return a part with trainable tensors of its own (same values) and the same frozen tensors.

    Args:
        part: made by `cut`.
        rank: of what it trains of each adapter; None for the whole.
    """
    replica = copy_sharing(part, trainable=False)
    if rank is not None:
        replica.limit_rank(rank)
    return replica


def check_cut(model: nn.Module, plan: SplitPlan) -> None:
    """Run a small random batch through the model and through its parts, and compare.

    Raises:
        UnsupportedModelError: the logits differ by more than 1e-5 of their largest magnitude.
    """
    base = uncut(model)
    batch = sample_batch(base)
    parts = cut(model, plan)
    whole = copy_sharing(base).eval()
    with torch.no_grad():
        expected = whole(**batch).logits
        output: Any = None
        for part in parts:
            output = part.eval()(batch, output)
    difference = ((output.logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= 1e-5:
        raise UnsupportedModelError(
            f"{base.config.model_type!r} ({type(base).__name__}) computes something else when cut: expected "
            f"a difference of at most 1e-5 of the logits; got {difference:.1e}: this family cannot be split"
        )


def check_reads_ahead(model: nn.Module, plan: SplitPlan) -> None:
    """Check that the first token's state tells of the others, so that it can stand for the text.

    Args:
        model: an uncut Hugging Face model.
        plan: of two parts or three; the states are those behind its front.

    Raises:
        UnsupportedModelError: each token sees only those before it.
    """
    base = uncut(model)
    batch = {name: value[:1] for name, value in sample_batch(base).items()}  # the text without padding
    other = {**batch, "input_ids": batch["input_ids"].roll(-1, dims=1)}
    other["input_ids"][:, 0] = batch["input_ids"][:, 0]
    front = cut(base, plan)[0].eval()
    with torch.no_grad():
        first, again = (front(inputs)[:, 0] for inputs in (batch, other))
    if torch.equal(first, again):
        raise UnsupportedModelError(
            f"token_pooling keeps the first token's state, and in {base.config.model_type!r} that sees no other token:"
            " take an encoder, or leave token_pooling out"
        )


def _slice_configs(model: PreTrainedModel, kept: nn.ModuleList, start: int, stop: int, num_layers: int) -> None:
    """Give the modules around the blocks a config of the layers kept: see [3] in the module docstring."""
    inside = set(kept.modules())
    sliced: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        for attribute, config in list(vars(module).items()):
            if not isinstance(config, PreTrainedConfig):
                continue
            config.use_cache = False
            if module in inside:
                continue
            if id(config) not in sliced:
                sliced[id(config)] = _slice_config(config, start, stop, num_layers)
            setattr(module, attribute, sliced[id(config)])


def _slice_config(config: PreTrainedConfig, start: int, stop: int, num_layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for key, value in list(vars(text).items()):
        per_layer = isinstance(value, list | tuple) and len(value) == num_layers
        if per_layer and "token_id" not in key and key != "architectures":
            setattr(text, key, value[start:stop])
    text.num_hidden_layers = stop - start
    return config


def _drop_unused(part: Part, batch: Mapping[str, Tensor], hidden: Tensor | None) -> Tensor | None:
    """Drop the weights that `part` does not need and return its hidden states: see [4] at the top."""
    blocks_name = f"model.{part._blocks_name}"
    inside = set(part.get_submodule(blocks_name).modules())
    # Under tie_weights=False each name has a tensor of its own: a tied head keeps no embeddings alive.
    outside = {
        name: parameter.detach().requires_grad_()
        for name, parameter in part.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{blocks_name}.")
    }
    widths: dict[nn.Module, int | None] = {}

    def note_width(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        replaceable = isinstance(output, Tensor) and output.shape[:-1] == _leading_shape(args, kwargs)
        widths[module] = output.shape[-1] if replaceable else None

    around = [module for module in part.model.modules() if module not in inside]
    handles = [module.register_forward_hook(note_width, with_kwargs=True) for module in around]
    training = [module for module in part.modules() if module.training]
    if part.first and part._takes_token_types:
        batch = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    part.eval()
    try:
        with torch.enable_grad():
            output = functional_call(part, outside, (batch, hidden), tie_weights=False)
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    reached = _leaves(output.logits if part.last else output)
    needed = {name for name, leaf in outside.items() if leaf in reached}
    _replace_unused(part, "", inside, needed, widths)
    return None if part.last else output.detach()


def _leaves(output: Tensor) -> set[Tensor]:
    """Return the tensors that a backward pass from `output` would leave a gradient on."""
    nodes: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return {node.variable for node in nodes if hasattr(node, "variable")}


def _replace_unused(
    module: nn.Module,
    prefix: str,
    inside: set[nn.Module],
    needed: set[str],
    widths: Mapping[nn.Module, int | None],
) -> None:
    """Replace the largest modules whose weights are all unneeded, going down where some are needed.

    `widths` tells the modules that ran, and the width of their output where `_Null` can stand in for them.
    """
    for child_name, child in list(module.named_children()):
        name = f"{prefix}{child_name}"
        weight = next(child.parameters(), None)
        if child in inside or weight is None:
            continue
        if any(key.startswith(f"{name}.") for key in needed) or not inside.isdisjoint(child.modules()):
            if not isinstance(child, AuxiliaryTrainingWrapper | BaseTunerLayer):
                _replace_unused(child, f"{name}.", inside, needed, widths)
        elif child not in widths:
            setattr(module, child_name, None)
        elif (width := widths[child]) is not None:
            setattr(module, child_name, _Null(width, weight))
        else:
            _replace_unused(child, f"{name}.", inside, needed, widths)
