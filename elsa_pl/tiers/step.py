"""One optimizer step of a client, as passes that may run at the same time.

    client                                edge
    [1] front(batch) ----- uplink ------> [2] middle
    [3] tail(hidden) <---- downlink -----
    [4] dist_autograd.backward: gradients cross the same links the other way
    [5] collect the gradients             [5] collect the gradients
        ... all passes of the step ...
    [6] optimizer step                    [6] optimizer step

In other cuts the edge answers with the loss (no tail), or has no part in it (no middle).

A pass is one micro-batch. Each runs in a thread of its own with an autograd context of its own, which keeps client and
edge busy at the same time; one context for all would make each wait for the slowest. Gradients are summed in the order
of the passes, whichever ends first, so that two runs are equal bit for bit.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed.autograd as dist_autograd

from elsa_pl.errors import TrainingDiverged
from elsa_pl.functional.microbatches import split_batch
from elsa_pl.tiers.client import Batch, Client


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Bounds on a step's gradients over front, middle and tail together."""

    norm: float | None = None
    """Largest Euclidean norm of all gradients; None for no bound."""
    value: float | None = None
    """Largest absolute value of an element; None for no bound."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What the steps of all clients have in common."""

    seed: int
    """The run's."""
    round: int
    """Global round, and with `step` the place of the dropout draws."""
    step: int
    """Number of the step in the round."""
    lr_factor: float = 1.0
    """The schedule's factor on the learning rate."""
    clipping: Clipping = Clipping()
    """Bounds on the gradients."""
    micro_batches: int = 1
    """Micro-batches of each batch."""
    causal_lm: bool = False
    """The loss is a mean over tokens."""


@dataclass(frozen=True)
class StepResult:
    """One local step of one client.

    Attributes:
        loss: mean over the step's examples.
        num_examples: in all of its batches.
        num_tokens: in them, padding included.
    """

    loss: float
    num_examples: int
    num_tokens: int


class Step:
    """One step of one client on the mean loss of some batches.

    Args:
        client: whose step.
        batches: their gradients are averaged.
        settings: of the step.
    """

    def __init__(self, client: Client, batches: Sequence[Batch], settings: StepSettings) -> None:
        self._client, self._settings, self._num_batches = client, settings, len(batches)
        self._num_examples = sum(len(batch["input_ids"]) for batch in batches)
        self._passes = [
            micro
            for batch in batches
            for micro in split_batch(batch, settings.micro_batches, causal_lm=settings.causal_lm)
        ]
        self._slots = client.front.slots([batch for batch, _ in self._passes])
        self._losses: dict[int, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of passes."""
        return len(self._passes)

    def run(self, number: int) -> StepResult | None:
        """Run one of the passes. Whichever ends last steps the optimizers and returns the result; the others None.

        Raises:
            TrainingDiverged: the loss is not finite. Nothing was stepped.
            RemoteError: the edge did not do its part.
        """
        loss = self._collect_gradients(number)
        with self._lock:
            self._losses[number] = loss
            if len(self._losses) < len(self):
                return None
        self._step_optimizers()
        mean = sum(self._losses[index] * share for index, (_, share) in enumerate(self._passes)) / self._num_batches
        num_tokens = sum(batch["input_ids"].numel() for batch, _ in self._passes)
        return StepResult(mean, self._num_examples, num_tokens)

    @property
    def _edge_steps_at_once(self) -> bool:
        """Whether the edge can collect and step in one call, which saves a round trip."""
        return len(self) == 1 and self._settings.clipping.norm is None

    def _collect_gradients(self, number: int) -> float:
        client, settings = self._client, self._settings
        batch, share = self._passes[number]
        with dist_autograd.context() as context_id:
            key = (settings.seed, settings.round, client.name, settings.step, number)
            slots = None if self._slots is None else self._slots[number]
            loss = client.forward(batch, key, slots=slots).loss
            value: float = loss.item()
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"the loss of {client.name} is {value} in round {settings.round}, step {settings.step}: lower the"
                    " learning rate, clip gradients (gradient_clip_val), or look at this client's data"
                )
            client.backward(context_id, loss * share / self._num_batches)
            pending = None
            if client.uncut:
                pass
            elif self._edge_steps_at_once:
                pending = client.ask_edge("collect_and_step", context_id, settings.lr_factor, settings.clipping.value)
            else:
                pending = client.ask_edge("collect", number, context_id)
            gradients = dist_autograd.get_gradients(context_id)
            for tier in client.tiers:
                tier.collect_gradients(number, gradients)
            if pending is not None:
                pending.wait()  # inside the context: leaving it frees the gradients over there too
        return value

    def _step_optimizers(self) -> None:
        client, clipping = self._client, self._settings.clipping
        scale = 1.0
        if clipping.norm is not None:
            norms = client.front.gradient_norms()
            if not client.uncut:
                norms += client.ask_edge("gradient_norms").wait()
            if client.tail is not None:
                norms += client.tail.gradient_norms()
            # the same arithmetic as torch.nn.utils.clip_grad_norm_ on the uncut model
            total = torch.linalg.vector_norm(torch.tensor(norms))
            scale = min(1.0, (clipping.norm / (total + 1e-6)).item())
        how = (self._settings.lr_factor, scale, clipping.value)
        at_edge = not client.uncut and not self._edge_steps_at_once
        stepping = client.ask_edge("step_optimizer", *how) if at_edge else None
        for tier in client.tiers:
            tier.step_optimizer(*how)
        if stepping is not None:
            stepping.wait()
