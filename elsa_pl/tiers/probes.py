"""What a client's model says about the probes: evaluated on its adapters where they are received.

An edge judges its clients by the adapters that they submit, before any mean (after it, all its clients are the same).
So no client can claim a better face than that of what it sends, weak devices are spared the work, and probes never
cross a link, where known texts under a fixed secret would give the secret away.
"""

import os
import queue
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from elsa_pl.functional.factors import to_rank
from elsa_pl.functional.microbatches import IGNORE_INDEX
from elsa_pl.functional.pooling import TokenPooling, pool_batch, pool_states
from elsa_pl.links import PREFIX, Codec, Link, on_states
from elsa_pl.models import Task, copy_sharing
from elsa_pl.partition import Part, SplitPlan, cut, find_blocks
from elsa_pl.tiers.client import Batch
from elsa_pl.tiers.tier import PrecisionContext

# Shapes: Q probes, B batch, T tokens, D hidden, C classes.

_MOST_WORKERS = 4


class ProbeModel:
    """A replica of the uncut model that shares its frozen weights, to try clients' adapters on.

    Args:
        model: the uncut model with adapters.
        task: decides what counts as a prediction.
        device: where it computes.
        precision: enters the precision of the run.
        pooling: of tokens, at the two cuts.
        merged: names of frozen weights that change between rounds.
    """

    def __init__(
        self,
        model: PeftModel,
        task: Task,
        device: torch.device,
        precision: PrecisionContext,
        pooling: TokenPooling = TokenPooling(),  # noqa: B008  # frozen
        merged: Collection[str] = (),
    ) -> None:
        self._model: nn.Module = copy_sharing(model.get_base_model(), trainable=False).to(device).eval()
        self._task, self._device, self._precision = task, device, precision
        settings: Any = model.peft_config["default"]
        self._rank: int = settings.r
        self._parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad or n in merged}
        self._pooling = pooling
        self._parts: dict[SplitPlan, tuple[Part, ...]] = {}

    def adapters(self) -> dict[str, Tensor]:
        """Copies of the adapters that it has now, by global layer name, and of frozen weights that change."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def evaluate(
        self, adapters: Mapping[str, Tensor], batches: Sequence[Batch], plan: SplitPlan
    ) -> tuple[Tensor, Tensor]:
        """States and predictions of the model with some adapters.

        Args:
            adapters: by global layer name; of a lower rank, too.
            batches: of probes, without labels.
            plan: where tokens are pooled, if they are.

        Returns:
            - (Q, D): the last hidden states, averaged over the tokens of each probe;
            - (Q, C): the probabilities of the classes. In causal language modelling there are two, the geometric mean
              of the probe's own tokens' probabilities and the rest: a whole vocabulary for each token would be as
              large as the model.
        """
        with torch.no_grad():
            self.load(adapters)
            outputs = [self._evaluate(batch, plan) for batch in batches]
        states, predictions = zip(*outputs, strict=True)
        return torch.cat(states), torch.cat(predictions)

    def fit_links(
        self,
        adapters: Mapping[str, Tensor],
        untrained: Mapping[str, Tensor],
        batches: Sequence[Batch],
        plan: SplitPlan,
        codecs: Mapping[Link, Codec],
    ) -> None:
        """Fit the codecs of a client that is cut so to the states of the probes; the downlink after the uplink.

        Args:
            adapters: by global layer name.
            untrained: those of before any training.
            batches: of probes, without labels.
            plan: with the middle filled in.
            codecs: fitted in place.
        """
        front, middle = self._parts_for(plan)[:2]  # who has links is cut
        uplink, downlink = codecs.get("uplink"), codecs.get("downlink")
        behind = [pool_batch(self._moved(batch), self._pooling.uplink) for batch in batches]
        with torch.no_grad(), self._precision():
            before = None
            if uplink is not None and uplink.fits_untrained:
                self.load(untrained)
                before = _rows([self._entering(front, self._moved(batch)) for batch in batches], behind)
            self.load(adapters)
            sent = [self._entering(front, self._moved(batch)) for batch in batches]
            if uplink is not None:
                uplink.fit(_rows(sent, behind), untrained=before)
                for name, value in uplink.tensors().items():
                    if name in adapters and adapters[name].isfinite().all():  # it has trained since
                        value.copy_(adapters[name])
                sent = [uplink(states.float().cpu()).to(states) for states in sent]
            if downlink is not None:
                outputs = [self._leaving(middle, batch, states) for batch, states in zip(behind, sent, strict=True)]
                downlink.fit(_rows(outputs, [pool_batch(batch, self._pooling.downlink) for batch in behind]), uplink)

    def _parts_for(self, plan: SplitPlan) -> tuple[Part, ...]:
        """The parts, which share this model's weights."""
        if plan not in self._parts:
            self._parts[plan] = tuple(part.eval() for part in cut(self._model, plan))
        return self._parts[plan]

    def _moved(self, batch: Batch) -> dict[str, Tensor]:
        return {name: value.to(self._device) for name, value in batch.items() if name not in ("labels", "rows")}

    def _entering(self, front: Part, batch: Batch) -> Tensor:
        """What goes on at the first cut."""
        return pool_states(front(batch), batch["attention_mask"], self._pooling.uplink)

    def _leaving(self, middle: Part, batch: Batch, states: Tensor) -> Tensor:
        """What goes on at the second one."""
        return pool_states(middle(batch, states), batch["attention_mask"], self._pooling.downlink)

    def _last(self, batch: Batch) -> Batch:
        """What the tail sees of a batch."""
        return pool_batch(pool_batch(batch, self._pooling.uplink), self._pooling.downlink)

    def load(self, adapters: Mapping[str, Tensor]) -> None:
        """Take over adapters, of any rank."""
        with torch.no_grad():
            for name, value in to_rank(adapters, self._rank).items():
                if not name.startswith(PREFIX):  # probes cross no link
                    self._parameters[name].copy_(value)

    def _evaluate(self, batch: Batch, plan: SplitPlan) -> tuple[Tensor, Tensor]:
        inputs = self._moved(batch)
        with self._precision():
            output, last = self._pass_through_parts(inputs, plan) if self._pooling else self._pass(inputs)
        mask = self._last(inputs)["attention_mask"].unsqueeze(-1).float()
        states = (last.float() * mask).sum(1) / mask.sum(1)
        logits = output.logits.float()
        if self._task == "classification":
            return states.cpu(), logits.softmax(-1).cpu()
        targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE_INDEX)[:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1].mT, targets, ignore_index=IGNORE_INDEX, reduction="none")
        likely = (-losses.sum(1) / (targets != IGNORE_INDEX).sum(1)).exp()
        return states.cpu(), torch.stack([likely, 1 - likely], dim=1).cpu()

    def _pass(self, inputs: Batch) -> tuple[Any, Tensor]:
        """Output and last hidden states."""
        output = self._model(**inputs, output_hidden_states=True)
        return output, output.hidden_states[-1]

    def _pass_through_parts(self, inputs: Batch, plan: SplitPlan) -> tuple[Any, Tensor]:
        front, *middles, last = self._parts_for(plan)
        behind = pool_batch(inputs, self._pooling.uplink)
        states = self._entering(front, inputs)
        for middle in middles:
            states = self._leaving(middle, behind, states)
        found: list[Tensor] = []
        handle = on_states(find_blocks(last.model)[1][-1], found.append)
        try:
            output = last(self._last(inputs), states)
        finally:
            handle.remove()
        return output, found[0]


def _rows(states: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """A row for each token that is no padding."""
    found = [values[batch["attention_mask"].bool()].float() for values, batch in zip(states, batches, strict=True)]
    return torch.cat(found).cpu()


class ProbeDesk:
    """Evaluates the clients of this process' edges on the probes, several at the same time.

    Args:
        models: replicas to try adapters on, with those of before any training.
        batches: of probes.
        plan: where the model before any training is cut.
    """

    def __init__(self, models: Sequence[ProbeModel], batches: Sequence[Batch], plan: SplitPlan) -> None:
        self._models, self._batches, self._plan = models, batches, plan
        self._initial = models[0].adapters()

    def base(self) -> tuple[Tensor, Tensor]:
        """States (Q, D) and predictions (Q, C) of the model before any training."""
        model = self._models[0]
        now = model.adapters()
        found = model.evaluate(self._initial, self._batches, self._plan)
        model.load(now)  # others share its frozen weights
        return found

    def fit_links(
        self, adapters: Mapping[str, Tensor], plans: Iterable[SplitPlan], make: Callable[[SplitPlan], dict[Link, Codec]]
    ) -> dict[str, Tensor]:
        """Codecs fitted to the probes, for clients that are cut so: what is fitted, by name.

        Args:
            adapters: the global ones.
            plans: without repetitions.
            make: new codecs for a plan.
        """
        fitted: dict[str, Tensor] = {}
        for plan in plans:
            codecs = make(plan)
            self._models[0].fit_links(adapters, self._initial, self._batches, plan, codecs)
            for codec in codecs.values():
                fitted |= {name: value.detach().clone() for name, value in codec.tensors().items()}
        return fitted

    def evaluate(
        self, adapters: Mapping[str, Mapping[str, Tensor]], plans: Mapping[str, SplitPlan]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """States (Q, D) and predictions (Q, C) by client, from the adapters of each and the plan by which it is cut."""
        free: queue.SimpleQueue[ProbeModel] = queue.SimpleQueue()
        for model in self._models:
            free.put(model)

        def evaluate(client: str) -> tuple[Tensor, Tensor]:
            model = free.get()
            try:
                return model.evaluate(adapters[client], self._batches, plans[client])
            finally:
                free.put(model)

        with ThreadPoolExecutor(len(self._models), "elsa-probe") as pool:
            return dict(zip(adapters, pool.map(evaluate, adapters), strict=True))


def num_workers() -> int:
    """Replicas that evaluate clients at the same time: one for each core, up to a few."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
