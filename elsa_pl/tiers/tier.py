"""What front, middle and tail have in common: adapters, an optimizer of their own, and how they compute.

A tier is one client's replica of one part of the model. It runs in threads (a client's own, or one that serves RPC),
and autocast, grad mode and dropout draws are thread-local, so each computation enters them itself: without that,
bf16 would be ignored in silence, validation would build graphs and dropout would depend on scheduling.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_pl.functional.pooling import Pooling, pool_states
from elsa_pl.links import LinkEnd
from elsa_pl.lora import dropout_key
from elsa_pl.partition import Part

OptimizerFactory = Callable[[list[torch.nn.Parameter]], Optimizer]
PrecisionContext = Callable[[], AbstractContextManager[object]]

# (seed, round, client, step, micro-batch): where a draw stands in the run. None means evaluation.
StepKey = tuple[int | str, ...] | None


class Tier(L.LightningModule):
    """One part of the model for one client, with the optimizer of its adapters.

    Args:
        part: a replica whose adapters belong to this client alone.
        make_optimizer: builds the optimizer from a list of parameters.
        precision: enters the precision of the run, for example autocast to bf16.
        device: where the part computes.
        decode: this side of the link on which states arrive; None: as they are.
        encode: this side of the link on which states leave; None: as they are.
        pooling: what becomes of the tokens behind the part; see `elsa_pl.functional.pooling`.
    """

    def __init__(
        self,
        part: Part,
        make_optimizer: OptimizerFactory,
        precision: PrecisionContext = nullcontext,
        device: torch.device | str = "cpu",
        *,
        decode: LinkEnd | None = None,
        encode: LinkEnd | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.part = part.to(device)
        self._link_ends = nn.ModuleDict()
        if decode is not None:
            self._link_ends["decode"] = decode.to(device)
        if encode is not None:
            self._link_ends["encode"] = encode.to(device)
        self._compute_device = torch.device(device)
        self._make_optimizer = make_optimizer
        self._precision, self._pooling = precision, pooling
        self._trained = [*part.adapters().values(), *(value for end in self._ends for value in end.trained().values())]
        # by number of the pass: the passes of a step end in any order, and sums are made in order
        self._collected: dict[int, list[Tensor | None]] = {}
        self.reset_optimizer()

    @property
    def _ends(self) -> list[LinkEnd]:
        return [end for end in self._link_ends.values() if isinstance(end, LinkEnd)]

    def link_tensors(self) -> set[str]:
        """Names of what its ends of links are fitted to or train."""
        return {name for end in self._ends for name in end.tensors()}

    def decoded(self, received: Tensor) -> Tensor:
        """The states [B, T, D] that arrived."""
        return self._link_ends["decode"](received) if "decode" in self._link_ends else received

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """What goes on of states [B, T, D] of tokens, 1 in the mask [B, T], or padding: [B, G, D]."""
        return pool_states(states, mask, self._pooling)

    def encoded(self, states: Tensor) -> Tensor:
        """What is sent of states [B, T, D]."""
        return self._link_ends["encode"](states) if "encode" in self._link_ends else states

    def reset_optimizer(self) -> None:
        """Forget the optimizer's state, as at the start of a global round."""
        self._optimizer = self._make_optimizer(self._trained) if self._trained else None
        self._initial_lrs = [group["lr"] for group in self._optimizer.param_groups] if self._optimizer else []

    def forget_sent(self) -> None:
        """Have links remember no states any more, as when the other end is a new one."""
        for end in self._ends:
            end.forget()

    def take_over(self, other: "Tier") -> None:
        """Go on with the optimizer's state of another replica of the same part, and with what its links remember."""
        for end, theirs in zip(self._ends, other._ends, strict=True):
            end.take_memory(theirs)
        if self._optimizer is not None and other._optimizer is not None:
            # a copy: load_state_dict would share the tensors
            self._optimizer.load_state_dict(copy.deepcopy(other._optimizer.state_dict()))

    @contextmanager
    def computing(self, key: StepKey) -> Iterator[None]:
        """Enter precision, grad mode and dropout draws for this thread; ``key=None`` is evaluation."""
        training = key is not None
        if self.part.training != training:
            self.part.train(training)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(training))
            stack.enter_context(self._precision())
            if key is not None:
                stack.enter_context(dropout_key(*key))
            yield

    def collect_gradients(self, number: int, gradients: Mapping[Tensor, Tensor]) -> None:
        """Keep the gradients of one pass of the step.

        Args:
            number: of the pass in the step.
            gradients: parameter to gradient, as `torch.distributed.autograd.get_gradients` returns them.
        """
        found = [gradients.get(parameter) for parameter in self._trained]
        # copies, because the autograd context frees its gradients with itself
        self._collected[number] = [None if gradient is None else gradient.clone() for gradient in found]

    def _summed(self) -> list[Tensor | None]:
        """The gradients of the step for each adapter: sums over the passes, always in the same order."""
        total: list[Tensor | None] = [None] * len(self._trained)
        for number in sorted(self._collected):
            for index, gradient in enumerate(self._collected[number]):
                if gradient is not None:
                    before = total[index]
                    total[index] = gradient if before is None else before + gradient
        return total

    def gradient_norms(self) -> list[float]:
        """Euclidean norms of the step's gradients, one for each adapter that has one."""
        gradients = [gradient for gradient in self._summed() if gradient is not None]
        if not gradients:
            return []
        norms: list[float] = torch.stack(torch._foreach_norm(gradients)).tolist()
        return norms

    def step_optimizer(self, lr_factor: float, scale: float = 1.0, clip_value: float | None = None) -> None:
        """Step the optimizer with the collected gradients, and forget them.

        Args:
            lr_factor: the schedule's factor on the initial learning rates.
            scale: factor on all gradients (clipping by norm).
            clip_value: bound on each element (clipping by value).
        """
        if self._optimizer is None:
            return
        for parameter, gradient in zip(self._trained, self._summed(), strict=True):
            if gradient is not None and scale != 1.0:
                gradient = gradient * scale
            if gradient is not None and clip_value is not None:
                gradient = gradient.clamp(-clip_value, clip_value)
            parameter.grad = gradient
        for group, initial in zip(self._optimizer.param_groups, self._initial_lrs, strict=True):
            group["lr"] = initial * lr_factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._collected = {}

    def adapters(self) -> dict[str, Tensor]:
        """Copies of the adapters on the CPU, by global layer name."""
        own = self.part.adapters()
        for end in self._ends:
            own |= end.trained()
        return {name: value.detach().cpu().clone() for name, value in own.items()}

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Take over those of ``adapters`` that this part and its ends of links have; a missing one is an error.

        Raises:
            KeyError: an adapter of this part is not among them.
        """
        self.part.load_adapters(adapters)
        for end in self._ends:
            end.load(adapters)
