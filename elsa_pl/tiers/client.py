"""One client: its front and tail, and the passes that cross its edge. `elsa_pl.tiers.step` makes steps of them.

- three-part: front, then the middle at the edge, then the tail, with the labels;
- two-part: front, then all the rest at the edge, to which the labels go, and which answers with the loss;
- uncut: the front is the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from elsa_pl.errors import RemoteError
from elsa_pl.functional.pooling import TokenPooling, pool_batch
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.links import Traffic, crossing
from elsa_pl.rpc.remote import PendingCall, call, start_call
from elsa_pl.tiers.front import FrontModule
from elsa_pl.tiers.tail import TailModule
from elsa_pl.tiers.tier import StepKey, Tier

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class EdgeAddress:
    """Where a client's edge is served, and how long one call to it may take."""

    worker: str
    service: str
    timeout_s: float


@dataclass(frozen=True)
class Exposed:
    """What one pass shows.

    Attributes:
        mask: of the uplink, after pooling: 1 for tokens and 0 for padding. [B, G]
        states: of the front, before the link's stages. [B, G, D]
        sent: what the link carries of them.
        number: of the pass over the links.
        mask_down: of the downlink. [B, H]
        outputs: of the middle. [B, H, D]
        gradients: of the loss with respect to `outputs`, which the edge receives. [B, H, D]
    """

    mask: Tensor
    states: Tensor
    sent: Tensor
    number: int
    mask_down: Tensor
    outputs: Tensor
    gradients: Tensor


class Client:
    """A client of the federation, as the process that hosts it sees it.

    Args:
        name: client name.
        front: its front.
        tail: its tail; None where the edge has the head, or the front is the whole model.
        edge: where its middle runs.
        device: where front and tail compute.
        pooling: of tokens, at the two cuts.
        device_to_device: the edge takes CUDA tensors straight from this device.
    """

    def __init__(
        self,
        name: str,
        front: FrontModule,
        tail: TailModule | None,
        edge: EdgeAddress,
        *,
        device: torch.device,
        pooling: TokenPooling = TokenPooling(),  # noqa: B008  # frozen
        device_to_device: bool = False,
    ) -> None:
        self.name, self.front, self.tail, self.edge = name, front, tail, edge
        self.traffic = Traffic()
        self._pooling, self._device = pooling, device
        self._wire = device if device_to_device else torch.device("cpu")

    @property
    def uncut(self) -> bool:
        """Whether the front is the whole model, so that no pass crosses the edge."""
        return self.front.part.last

    @property
    def rank(self) -> int | None:
        """Rank of what it trains of each adapter, where that is less than the whole."""
        return self.front.part.rank

    @property
    def tiers(self) -> list[Tier]:
        """What this client computes."""
        return [self.front] if self.tail is None else [self.front, self.tail]

    def backward(self, context_id: int, loss: Tensor) -> None:
        """Run remote autograd: gradients of all three parts, in the context.

        Raises:
            RemoteError: the edge is gone. Autograd reports that as any error; asking the edge tells the two apart.
        """
        try:
            dist_autograd.backward(context_id, [loss])
        except RuntimeError as error:
            try:
                call(self.edge.worker, "pulse", "ping", timeout_s=self.edge.timeout_s)
            except RemoteError as gone:
                if not gone.kind:
                    raise gone from error
            raise

    def evaluate(self, batch: Batch, place: tuple[int | str, ...]) -> Any:
        """The model's output (`loss`, `logits`) on a batch through the whole pipeline, without gradients.

        Args:
            batch: as for `forward`.
            place: of the pass in the run, another for each.
        """
        return self.forward(batch, None, place)

    def forward(
        self, batch: Batch, key: StepKey, place: tuple[int | str, ...] = (), slots: Tensor | None = None
    ) -> Any:
        """The model's output on a batch through the whole pipeline; in a two-part split training has no `logits`.

        Args:
            batch: `input_ids`, `attention_mask` and `labels`.
            key: place of the pass in the run, for dropout draws; None for evaluation.
            place: that of an evaluation.
            slots: of the texts, if the uplink remembers any. [B]
        """
        batch = {name: value.to(self._device) for name, value in batch.items()}
        if self.uncut:
            with self.front.computing(key):
                return self.front.part(batch)
        behind = pool_batch(batch, self._pooling.uplink)
        mask = behind["attention_mask"].to(self._wire, torch.bool)
        number = derive_seed(*(("evaluation", *place) if key is None else key))
        with self.front.computing(key), crossing(number, mask, slots) as passing:
            sent = self.front(batch).to(self._wire)
        beside = [mask] if passing.slots is None else [mask, passing.slots]
        if self.tail is None:
            labels = batch["labels"].to(self._wire) if "labels" in batch else None
            self.traffic.crossed("uplink", sent, *beside, *([] if labels is None else [labels]))
            loss, logits = self.ask_edge("finish", sent, mask, labels, key, number, passing.slots).wait()
            self.traffic.crossed("downlink", *(value for value in (loss, logits) if value is not None))
            return SequenceClassifierOutput(loss=loss, logits=logits)
        self.traffic.crossed("uplink", sent, *beside)
        received = self.ask_edge("forward", sent, mask, key, number, passing.slots).wait()
        self.traffic.crossed("downlink", received)
        with self.tail.computing(key), crossing(number):
            return self.tail(received.to(self._device), pool_batch(behind, self._pooling.downlink))

    def states(self, batch: Batch) -> Tensor:
        """What the front computes of a batch, [B, G, D], before the link's stages; on the CPU."""
        with self.front.computing(None):
            return self.front.states({name: value.to(self._device) for name, value in batch.items()}).float().cpu()

    def expose(self, batch: Batch, place: tuple[int | str, ...]) -> Exposed:
        """A pass over a batch with labels, with all that a curious edge gets to see of it.

        Raises:
            RemoteError: the edge is gone.
        """
        assert self.tail is not None, "PrivacyAudit refuses other cuts"
        batch = {name: value.to(self._device) for name, value in batch.items()}
        number = derive_seed("audit", *place)
        behind = pool_batch(batch, self._pooling.uplink)
        last = pool_batch(behind, self._pooling.downlink)
        mask = behind["attention_mask"].to(self._wire, torch.bool)
        with self.front.computing(None), crossing(number, mask):
            states = self.front.states(batch)
            sent = self.front.encoded(states)
        received = self.ask_edge("forward", sent.to(self._wire), mask, None, number, None).wait()
        with self.tail.computing(None), crossing(number), torch.enable_grad():
            outputs = self.tail.decoded(received.to(self._device)).detach().requires_grad_()
            (gradients,) = torch.autograd.grad(self.tail.part(last, outputs).loss, outputs)
        return Exposed(
            mask=mask.cpu(),
            states=states.float().cpu(),
            sent=sent.cpu(),
            number=number,
            mask_down=last["attention_mask"].bool().cpu(),
            outputs=outputs.detach().float().cpu(),
            gradients=gradients.float().cpu(),
        )

    def ask_edge(self, method: str, *args: object) -> PendingCall:
        """Start a call to this client's session at its edge."""
        edge = self.edge
        return start_call(edge.worker, edge.service, method, self.name, *args, timeout_s=edge.timeout_s)

    def adapters(self) -> dict[str, Tensor]:
        """Copies of the adapters of front and tail, by global layer name."""
        return {name: value for tier in self.tiers for name, value in tier.adapters().items()}

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Take over the adapters of front and tail."""
        for tier in self.tiers:
            tier.load(adapters)

    def link_tensors(self) -> set[str]:
        """Names of what its ends of links are fitted to or train."""
        return {name for tier in self.tiers for name in tier.link_tensors()}

    def reset_optimizers(self) -> None:
        """Forget the optimizer state of front and tail; the edge does so for the middle."""
        for tier in self.tiers:
            tier.reset_optimizer()
