"""What an edge server offers to its clients: forward passes of their sessions, optimizer steps, and a board.

The backward pass needs no method: remote autograd runs it along the recorded messages.
"""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor

from elsa_pl.functional.factors import to_rank
from elsa_pl.links import crossing
from elsa_pl.rpc.board import Board
from elsa_pl.rpc.remote import exposed


class Session(Protocol):
    """A client's middle, as the edge uses it: a `elsa_pl.tiers.middle.MiddleModule`, or a `RestModule` beside it."""

    def __call__(self, hidden: Tensor, attention_mask: Tensor, *labels: Tensor | None) -> Any: ...
    def computing(self, key: tuple[int | str, ...] | None) -> AbstractContextManager[None]: ...
    def collect_gradients(self, number: int, gradients: Mapping[Tensor, Tensor]) -> None: ...
    def gradient_norms(self) -> list[float]: ...
    def step_optimizer(self, lr_factor: float, scale: float, clip_value: float | None) -> None: ...
    def adapters(self) -> dict[str, Tensor]: ...
    def load(self, adapters: Mapping[str, Tensor]) -> None: ...
    def reset_optimizer(self) -> None: ...


class EdgeService:
    """One edge server.

    Args:
        name: edge name, under which it is served.
        sessions: the middle of each of its clients.
        device: where the middles compute.
        device_to_device: clients send CUDA tensors straight to this edge's device (device maps are set).
    """

    def __init__(
        self, name: str, sessions: dict[str, Any], device: torch.device, *, device_to_device: bool = False
    ) -> None:
        self.name = name
        self.sessions: dict[str, Session] = sessions
        self.board = Board(name)
        self._sent: tuple[Any, dict[str, Tensor] | None] = (None, None)
        self._given: tuple[int, dict[str, Tensor]] | None = None
        self._waiting: list[tuple[Any, tuple[str, ...], int | None, torch.futures.Future[Any]]] = []
        self._mean_lock = threading.Lock()
        self._device = device
        self._wire = device if device_to_device else torch.device("cpu")

    @exposed
    def forward(
        self,
        client: str,
        hidden: Tensor,
        attention_mask: Tensor,
        key: tuple[int | str, ...] | None,
        number: int,
        slots: Tensor | None,
    ) -> Tensor:
        """Run a client's middle.

        Args:
            client: whose session.
            hidden: (B, T, D), or what the link's stages make of it.
            attention_mask: (B, T), bool.
            key: place of the step in the run, for dropout draws; None for evaluation.
            number: of the pass over the links.
            slots: what the sender says about each text, if the uplink remembers any. [B]

        Returns:
            (B, T, D), or what the link's stages make of it; inside a remote autograd context it carries gradients back.
        """
        session = self.sessions[client]
        with session.computing(key), crossing(number, attention_mask, slots):
            out: Tensor = session(hidden.to(self._device), attention_mask.to(self._device, torch.long))
            return out.to(self._wire)

    @exposed
    def finish(
        self,
        client: str,
        hidden: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        key: tuple[int | str, ...] | None,
        number: int,
        slots: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run all that follows a client's front: see `elsa_pl.tiers.rest.RestModule`.

        Args:
            client: whose session.
            hidden: (B, T, D), or what the link's stages make of it.
            attention_mask: (B, T), bool.
            labels: (B,) or (B, T), if there are any.
            key: place of the step in the run, for dropout draws; None for evaluation.
            number: of the pass over the links.
            slots: what the sender says about each text, if the uplink remembers any. [B]

        Returns:
            The mean loss, which carries gradients back inside a remote autograd context, and in evaluation the logits.
        """
        session = self.sessions[client]
        with session.computing(key), crossing(number, attention_mask, slots):
            mask = attention_mask.to(self._device, torch.long)
            at_edge = None if labels is None else labels.to(self._device)
            loss, logits = session(hidden.to(self._device), mask, at_edge)
            return None if loss is None else loss.to(self._wire), None if logits is None else logits.to(self._wire)

    @exposed
    def collect(self, client: str, number: int, context_id: int) -> None:
        """Keep the gradients of a finished backward pass, which is number ``number`` of the client's step."""
        self.sessions[client].collect_gradients(number, dist_autograd.get_gradients(context_id))

    @exposed
    def gradient_norms(self, client: str) -> list[float]:
        """Norms of the summed gradients of the client's step."""
        return self.sessions[client].gradient_norms()

    @exposed
    def step_optimizer(self, client: str, lr_factor: float, scale: float, clip_value: float | None) -> None:
        """Step the optimizer of a client's session with the collected gradients."""
        self.sessions[client].step_optimizer(lr_factor, scale, clip_value)

    @exposed
    def collect_and_step(self, client: str, context_id: int, lr_factor: float, clip_value: float | None) -> None:
        """Both in one call, for a step of one pass without clipping by norm."""
        session = self.sessions[client]
        session.collect_gradients(0, dist_autograd.get_gradients(context_id))
        session.step_optimizer(lr_factor, 1.0, clip_value)

    def adapters_of(self, client: str) -> dict[str, Tensor]:
        """The adapters that a client has here, by global layer name; none where it computes all by itself."""
        return self.sessions[client].adapters() if client in self.sessions else {}

    @exposed
    def mean(self, key: Any, names: tuple[str, ...], rank: int | None) -> Any:
        """Answer, later, with this edge's mean of the round ``key``: the named adapters as sent, or None.

        Args:
            key: global round and edge round.
            names: of adapters.
            rank: of what the client trains of each, where that is less than the whole.
        """
        answer: torch.futures.Future[Any] = torch.futures.Future()
        with self._mean_lock:
            self._waiting.append((key, names, rank, answer))
        self._answer()
        return answer

    def publish_mean(self, key: Any, mean: dict[str, Tensor] | None, sent: dict[str, Tensor] | None) -> None:
        """Make the mean of the round ``key`` known; it replaces the one before.

        Args:
            key: of the round.
            mean: None without any update.
            sent: the form in which it is sent.
        """
        with self._mean_lock:
            self._sent = (key, sent)
            if mean is not None:  # without one its clients go on from what they have
                self._given = (key[0], mean)
        self._answer()

    def given(self, round_number: int) -> dict[str, Tensor] | None:
        """The mean that its clients went on from last in a global round; None before the first one of the round."""
        with self._mean_lock:
            return self._given[1] if self._given is not None and self._given[0] == round_number else None

    def _answer(self) -> None:
        with self._mean_lock:
            known, sent = self._sent
            ready = [waiting for waiting in self._waiting if waiting[0] == known]
            self._waiting = [waiting for waiting in self._waiting if waiting[0] != known]
        for _, names, rank, answer in ready:
            asked = None if sent is None else {name: sent[name] for name in names}
            answer.set_result(asked if asked is None or rank is None else to_rank(asked, rank))
