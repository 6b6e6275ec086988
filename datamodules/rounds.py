"""Loaders whose pass over the data is one global round, and what they ask of the strategy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Protocol

from elsa_pl.datamodules.batches import Batch

if TYPE_CHECKING:
    from elsa_pl.datamodules.federated import FederatedTextDataModule

EvalSplit = Literal["validation", "test"]


class Federation(Protocol):
    """What the data module asks of the strategy.

    ``setup`` reads only ``own_client`` and ``holds_data``; the loaders read the rest when they are iterated.
    """

    own_client: str | None
    """The one client whose own file this process reads; None where the data is partitioned."""
    holds_data: bool
    """Whether this process reads data at all."""
    local_clients: tuple[str, ...]
    """The clients whose data this process holds."""
    steps_per_round: int
    batches_per_step: int
    eval_shard: tuple[int, int] | None
    """(shard, num_shards) of the evaluation data; None if this process evaluates nothing."""

    def participants(self, round: int) -> frozenset[str]:
        """Return the clients that train in ``round``."""
        ...


class RoundLoader:
    """The steps of the trainer's current round: one item is ``{client: its batches of the step}``.

    A process without clients gets empty mappings, so that every rank makes the same number of steps.
    """

    def __init__(self, data: "FederatedTextDataModule", federation: Federation) -> None:
        self._data = data
        self._federation = federation

    def __len__(self) -> int:
        return self._federation.steps_per_round

    def __iter__(self) -> Iterator[dict[str, list[Batch]]]:
        assert self._data.trainer is not None
        round = self._data.trainer.current_epoch
        participants = self._federation.participants(round)
        active = [client for client in self._federation.local_clients if client in participants]
        count = self._federation.batches_per_step
        for step in range(len(self)):
            first = (round * len(self) + step) * count
            yield {client: [self._data.train_batch(client, first + k) for k in range(count)] for client in active}


class EvalLoader:
    """This process's share of a split, at least one item.

    A process that evaluates nothing gets one empty batch: Lightning skips the whole evaluation, its hooks
    included, for an empty loader, and in those hooks the ranks wait for each other. There is no length,
    because the share may not be known before the loader is iterated.
    """

    def __init__(self, data: "FederatedTextDataModule", federation: Federation, split: EvalSplit) -> None:
        self._data = data
        self._federation = federation
        self._split = split

    def __iter__(self) -> Iterator[Batch]:
        shard = self._federation.eval_shard
        batches = self._data.eval_batches(self._split, *shard) if shard is not None else []
        yield from batches or [{}]


class PredictLoader:
    """The examples to predict, all of them in one process, so that one file can be written in their order.

    Empty batches as in `EvalLoader`.
    """

    def __init__(self, data: "FederatedTextDataModule", federation: Federation) -> None:
        self._data = data
        self._federation = federation

    def __iter__(self) -> Iterator[Batch]:
        shard = self._federation.eval_shard
        predicts = shard is not None and shard[0] == 0
        yield from self._data.predict_batches() if predicts else [{}]
