"""One client: its front and tail, and the step that crosses its edge.

    client                                edge
    [1] front(batch) ----- uplink ------> [2] middle
    [3] tail(hidden) <---- downlink -----
    [4] dist_autograd.backward: gradients cross the same links the other way
    [5] optimizer step                    [5] optimizer step, same gradients' context

Every client steps in a thread of its own with its own autograd context and optimizer, which keeps client and edge
busy at the same time; one context for all would make each wait for the slowest.
"""

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor

from elsa_pl.errors import RemoteError, TrainingDiverged
from elsa_pl.rpc.remote import PendingCall, call, start_call
from elsa_pl.tiers.front import FrontModule
from elsa_pl.tiers.tail import TailModule
from elsa_pl.tiers.tier import StepKey

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Bounds on a step's gradients over front, middle and tail together."""

    norm: float | None = None
    """Largest Euclidean norm of all gradients; None for no bound."""
    value: float | None = None
    """Largest absolute value of an element; None for no bound."""


@dataclass(frozen=True)
class EdgeAddress:
    """Where a client's edge is served, and how long one call to it may take."""

    worker: str
    service: str
    timeout_s: float


@dataclass(frozen=True)
class StepResult:
    """One local step of one client: mean loss of the step, and the examples in it."""

    loss: float
    num_examples: int


@dataclass
class Traffic:
    """Payload bytes by ``link/direction``; gradients arrive on autograd's threads, hence the lock."""

    num_bytes: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, link: str, direction: str, *tensors: Tensor) -> None:
        """Count tensors sent over a link."""
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        with self._lock:
            self.num_bytes[f"{link}/{direction}"] += total

    def take(self) -> Counter[str]:
        """Return the counts so far and start again."""
        with self._lock:
            taken, self.num_bytes = self.num_bytes, Counter()
        return taken


class Client:
    """A client of the federation, as the process that hosts it sees it.

    Args:
        name: client name.
        front: its front.
        tail: its tail.
        edge: where its middle runs.
        device: where front and tail compute.
        device_to_device: the edge takes CUDA tensors straight from this device.
    """

    def __init__(
        self,
        name: str,
        front: FrontModule,
        tail: TailModule,
        edge: EdgeAddress,
        *,
        device: torch.device,
        device_to_device: bool = False,
    ) -> None:
        self.name, self.front, self.tail, self.edge = name, front, tail, edge
        self.traffic = Traffic()
        self._device = device
        self._wire = device if device_to_device else torch.device("cpu")

    def step(
        self, batches: Sequence[Batch], *, place: tuple[int, int, int], lr_factor: float, clipping: Clipping
    ) -> StepResult:
        """One optimizer step of front, middle and tail on the mean loss of ``batches``.

        Args:
            batches: micro-batches whose gradients are averaged.
            place: the run's seed, the round and the step in it; fixes the dropout draws.
            lr_factor: the schedule's factor on the learning rate.
            clipping: bounds on the gradients.

        Returns:
            The mean loss and the number of examples.

        Raises:
            TrainingDiverged: the loss is not finite. Nothing was stepped.
            RemoteError: the edge did not do its part.
        """
        seed, round_number, step = place
        losses = []
        deferred = clipping.norm is not None or len(batches) > 1
        edge_norms: list[float] = []
        for micro, batch in enumerate(batches):
            with dist_autograd.context() as context_id:
                output = self._forward(batch, (seed, round_number, self.name, step, micro))
                loss = output.loss
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise TrainingDiverged(
                        f"the loss of {self.name} is {losses[-1]} in round {round_number}, step {step}: lower the"
                        " learning rate, clip gradients (gradient_clip_val), or look at this client's data"
                    )
                self._backward(context_id, loss / len(batches))
                if deferred:
                    pending = self._start("collect", context_id)
                else:
                    pending = self._start("collect_and_step", context_id, lr_factor, clipping.value)
                gradients = dist_autograd.get_gradients(context_id)
                self.front.collect_gradients(gradients)
                self.tail.collect_gradients(gradients)
                edge_norms = pending.wait()  # inside the context: leaving it frees the gradients over there too
        scale = 1.0
        if clipping.norm is not None:
            norms = self.front.gradient_norms() + edge_norms + self.tail.gradient_norms()
            # the same arithmetic as torch.nn.utils.clip_grad_norm_ on the uncut model
            total = torch.linalg.vector_norm(torch.tensor(norms))
            scale = min(1.0, (clipping.norm / (total + 1e-6)).item())
        stepping = self._start("step_optimizer", lr_factor, scale, clipping.value) if deferred else None
        self.front.step_optimizer(lr_factor, scale, clipping.value)
        self.tail.step_optimizer(lr_factor, scale, clipping.value)
        if stepping is not None:
            stepping.wait()
        return StepResult(sum(losses) / len(losses), sum(len(batch["input_ids"]) for batch in batches))

    def _backward(self, context_id: int, loss: Tensor) -> None:
        """Run remote autograd, which reports an edge that is gone as any error: asking the edge tells the two apart."""
        try:
            dist_autograd.backward(context_id, [loss])
        except RuntimeError as error:
            try:
                call(self.edge.worker, "pulse", "ping", timeout_s=self.edge.timeout_s)
            except RemoteError as gone:
                if not gone.kind:
                    raise gone from error
            raise

    def evaluate(self, batch: Batch) -> Any:
        """The model's output (`loss`, `logits`) on a batch through the whole pipeline, without gradients."""
        return self._forward(batch, None)

    def _forward(self, batch: Batch, key: StepKey) -> Any:
        batch = {name: value.to(self._device) for name, value in batch.items()}
        mask = batch["attention_mask"].to(self._wire, torch.bool)
        with self.front.computing(key):
            sent = self.front(batch).to(self._wire)
        self._count("uplink", sent, mask)
        received = call(
            self.edge.worker,
            self.edge.service,
            "forward",
            self.name,
            sent,
            mask,
            key,
            timeout_s=self.edge.timeout_s,
        )
        self._count("downlink", received)
        with self.tail.computing(key):
            return self.tail(received.to(self._device), batch)

    def _count(self, link: str, hidden: Tensor, *others: Tensor) -> None:
        self.traffic.add(link, "forward", hidden, *others)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.traffic.add(link, "backward", gradient))

    def _start(self, method: str, *args: object) -> PendingCall:
        edge = self.edge
        return start_call(edge.worker, edge.service, method, self.name, *args, timeout_s=edge.timeout_s)

    def adapters(self) -> dict[str, Tensor]:
        """Copies of the adapters of front and tail, by global layer name."""
        return {**self.front.adapters(), **self.tail.adapters()}

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Take over the adapters of front and tail."""
        self.front.load(adapters)
        self.tail.load(adapters)

    def reset_optimizers(self) -> None:
        """Forget the optimizer state of front and tail; the edge does so for the middle."""
        self.front.reset_optimizer()
        self.tail.reset_optimizer()
