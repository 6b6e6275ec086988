"""What a client's model says about the probes: evaluated on its adapters where they are received.

An edge judges its clients by the adapters that they submit, before any mean (after it, all its clients are the same).
So no client can claim a better face than that of what it sends, weak devices are spared the work, and probes never
cross a link, where known texts under a fixed secret would give the secret away.
"""

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from elsa_pl.functional.microbatches import IGNORE_INDEX
from elsa_pl.links import PREFIX, Codec, Link, on_states
from elsa_pl.models import Task, copy_sharing, find_blocks
from elsa_pl.partition import SplitPlan
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
    """

    def __init__(self, model: PeftModel, task: Task, device: torch.device, precision: PrecisionContext) -> None:
        self._model: nn.Module = copy_sharing(model.get_base_model(), trainable=False).to(device).eval()
        self._task, self._device, self._precision = task, device, precision
        self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._blocks = find_blocks(self._model)[1]

    def adapters(self) -> dict[str, Tensor]:
        """Copies of the adapters that it has now, by global layer name."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def evaluate(self, adapters: Mapping[str, Tensor], batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """States and predictions of the model with some adapters.

        Args:
            adapters: by global layer name.
            batches: of probes, without labels.

        Returns:
            - (Q, D): the last hidden states, averaged over the tokens of each probe;
            - (Q, C): the probabilities of the classes. In causal language modelling there are two, the geometric mean
              of the probe's own tokens' probabilities and the rest: a whole vocabulary for each token would be as
              large as the model.
        """
        with torch.no_grad():
            self._load(adapters)
            outputs = [self._evaluate(batch) for batch in batches]
        states, predictions = zip(*outputs, strict=True)
        return torch.cat(states), torch.cat(predictions)

    def fit_links(
        self,
        adapters: Mapping[str, Tensor],
        batches: Sequence[Batch],
        plan: SplitPlan,
        codecs: Mapping[Link, Codec],
    ) -> None:
        """Fit the codecs of a client that is cut so to the states of the probes; the downlink after the uplink.

        Args:
            adapters: by global layer name.
            batches: of probes, without labels.
            plan: with the middle filled in.
            codecs: fitted in place.
        """
        assert plan.middle is not None
        with torch.no_grad():
            self._load(adapters)
            uplink = codecs.get("uplink")
            if uplink is not None:
                uplink.fit(self._states_after(plan.front, batches))
                for name, value in uplink.tensors().items():
                    if name in adapters and adapters[name].isfinite().all():  # it has trained since
                        value.copy_(adapters[name])
            if "downlink" in codecs:
                with _replaced(self._blocks[plan.front - 1], uplink):
                    codecs["downlink"].fit(self._states_after(plan.front + plan.middle, batches), uplink)

    def _states_after(self, num_blocks: int, batches: Sequence[Batch]) -> Tensor:
        """Hidden states after so many blocks, a row for each token that is no padding."""
        found: list[Tensor] = []

        def note(states: Tensor) -> None:
            found.append(states[batch["attention_mask"].to(states.device).bool()].float().cpu())

        handle = on_states(self._blocks[num_blocks - 1], note)
        try:
            for batch in batches:
                self._evaluate(batch)
        finally:
            handle.remove()
        return torch.cat(found)

    def _load(self, adapters: Mapping[str, Tensor]) -> None:
        for name, value in adapters.items():
            if not name.startswith(PREFIX):  # probes cross no link
                self._parameters[name].copy_(value)

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = {name: value.to(self._device) for name, value in batch.items() if name not in ("labels", "rows")}
        with self._precision():
            output = self._model(**inputs, output_hidden_states=True)
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        states = (output.hidden_states[-1].float() * mask).sum(1) / mask.sum(1)
        logits = output.logits.float()
        if self._task == "classification":
            return states.cpu(), logits.softmax(-1).cpu()
        targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE_INDEX)[:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1].mT, targets, ignore_index=IGNORE_INDEX, reduction="none")
        likely = (-losses.sum(1) / (targets != IGNORE_INDEX).sum(1)).exp()
        return states.cpu(), torch.stack([likely, 1 - likely], dim=1).cpu()


@contextmanager
def _replaced(block: nn.Module, codec: Codec | None) -> Iterator[None]:
    """What a block says becomes what a receiver would have of it."""
    if codec is None:
        yield
        return
    handle = on_states(block, lambda states: codec(states.float().cpu()).to(states))
    try:
        yield
    finally:
        handle.remove()


class ProbeDesk:
    """Evaluates the clients of this process' edges on the probes, several at the same time.

    Args:
        models: replicas to try adapters on, with those of before any training.
        batches: of probes.
    """

    def __init__(self, models: Sequence[ProbeModel], batches: Sequence[Batch]) -> None:
        self._models, self._batches = models, batches
        self._initial = models[0].adapters()

    def base(self) -> tuple[Tensor, Tensor]:
        """States (Q, D) and predictions (Q, C) of the model before any training."""
        return self._models[0].evaluate(self._initial, self._batches)

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
            self._models[0].fit_links(adapters, self._batches, plan, codecs)
            for codec in codecs.values():
                fitted |= {name: value.detach().clone() for name, value in codec.tensors().items()}
        return fitted

    def evaluate(self, adapters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """States (Q, D) and predictions (Q, C) by client, from the adapters of each."""
        free: queue.SimpleQueue[ProbeModel] = queue.SimpleQueue()
        for model in self._models:
            free.put(model)

        def evaluate(client: str) -> tuple[Tensor, Tensor]:
            model = free.get()
            try:
                return model.evaluate(adapters[client], self._batches)
            finally:
                free.put(model)

        with ThreadPoolExecutor(len(self._models), "elsa-probe") as pool:
            return dict(zip(adapters, pool.map(evaluate, adapters), strict=True))


def num_workers() -> int:
    """Replicas that evaluate clients at the same time: one for each core, up to a few."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
