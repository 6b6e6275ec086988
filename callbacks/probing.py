"""How callbacks get to see what each client's model says about public probes, here and in other projects.

Under `elsa_pl.strategies.HierarchicalStrategy` the edges evaluate what their clients submit and call
``on_clients_probed`` before any mean. In any other Lightning project every rank counts as a client: the callback
evaluates the rank's own model at the end of the epoch, before the LightningModule's own ``on_train_epoch_end``, where a
project that trains locally would average.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Protocol, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.updates import hashed_update
from elsa_pl.links import Traffic, codecs_in

# Shapes: Q probes, B batch, D hidden, C classes, K width of a hashed update.

Probed = Mapping[str, tuple[Tensor, Tensor, Tensor]]
"""By client: states [Q, D], predictions [Q, C], and the hashed update [K] of `elsa_pl.functional.updates`."""
Named = dict[str, tuple[Tensor, ...]]
Value = TypeVar("Value")
Companion = TypeVar("Companion", bound=Callback)


class Probes(Protocol):
    """What a LightningModule needs for these callbacks in a project of its own."""

    def probe_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Representations [B, D] and class probabilities [B, C] of a batch of probes."""
        ...


class ProbingCallback(Callback):
    """A callback that looks at all clients' models through the same probes.

    Args:
        probes: batches of public inputs, the same on every rank, for ``probe_step`` of the LightningModule; None under
            `elsa_pl`'s strategy, where the data module has them.
        warmup_rounds: rounds (epochs) before the first look: before any training all clients behave alike.
        every_n_rounds: looks after that.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, probes: Iterable[Any] | None, warmup_rounds: int, every_n_rounds: int) -> None:
        if warmup_rounds < 1 or every_n_rounds < 1:
            raise ValueError(
                f"warmup_rounds and every_n_rounds must be at least 1; got {warmup_rounds} and {every_n_rounds}"
            )
        self._probes, self._warmup, self._every = probes, warmup_rounds, every_n_rounds
        # what the model said before any training, for a resumed run; elsa_pl's strategy asks the model anew
        self._said_first: tuple[Tensor, Tensor] | None = None
        self._given: dict[str, Tensor] = {}  # the rank's trained parameters when the epoch began

    def probes_due(self, trainer: "pl.Trainer") -> bool:
        """Whether this callback looks at the clients in the current round."""
        since = trainer.current_epoch + 1 - self._warmup
        return since >= 0 and since % self._every == 0

    def check_probes(self, num_probes: int, num_classes: int) -> None:
        """Refuse, before anything starts, a number of probes that is too small for so many classes.

        Raises:
            ValueError: with the least number.
        """

    def on_base_probed(self, trainer: "pl.Trainer", states: Tensor, predictions: Tensor) -> None:
        """Take note of what the model says before any training, the same in every process."""

    def on_clients_probed(self, trainer: "pl.Trainer", probed: Probed) -> None:
        """Look at clients. Called in every process, with those that it evaluated."""
        raise NotImplementedError

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not is_federated(trainer):
            if self._said_first is None:
                self._said_first = agree(trainer, self._evaluate(pl_module))
            self.on_base_probed(trainer, *self._said_first)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not is_federated(trainer):
            self._given = {name: value.detach().clone() for name, value in _trained(pl_module)}

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not is_federated(trainer) and self.probes_due(trainer):
            update = hashed_update(self._given, dict(_trained(pl_module)))
            self.on_clients_probed(trainer, {f"rank-{trainer.global_rank}": (*self._evaluate(pl_module), update)})

    def _evaluate(self, module: "pl.LightningModule") -> tuple[Tensor, Tensor]:
        if self._probes is None or not hasattr(module, "probe_step"):
            missing = "probes" if self._probes is None else "a method probe_step(batch) of the LightningModule"
            raise ValueError(
                f"{type(self).__name__} needs {missing}: give it batches of public inputs, and the LightningModule a"
                " probe_step that returns representations [B, D] and class probabilities [B, C]"
            )
        with evaluating(module):
            outputs = [probe(module, batch) for batch in self._probes]
        states, predictions = zip(*outputs, strict=True)
        return torch.cat(states).float(), torch.cat(predictions).float()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without gradients and as in evaluation, and apart from what a run sends: link stages do not count it.

    Each part goes back to its own mode, since a project may freeze some.
    """
    modes = {part: part.training for part in module.modules()}
    counted = {codec: codec.traffic for codec in codecs_in(module)}
    for codec in counted:
        codec.traffic = Traffic()
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        for codec, traffic in counted.items():
            codec.traffic = traffic


def probe(module: "pl.LightningModule", batch: Any) -> Any:
    """What ``probe_step`` of the LightningModule says about a batch."""
    return cast(Any, module).probe_step(module.transfer_batch_to_device(batch, module.device, 0))


def submodule(module: "pl.LightningModule", name: str, callback: str) -> nn.Module:
    """The part of the LightningModule that a callback was given by its name.

    Raises:
        ConfigurationError: there is none; with names that there are.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        names = [other for other, _ in module.named_modules() if other]
        near = get_close_matches(name, names, n=3, cutoff=0) or names[:3]
        raise ConfigurationError(
            f"{callback}: expected a submodule of {type(module).__name__}; got {name!r}, which is none: take a name of"
            f" named_modules(), such as {', '.join(near)}"
        ) from error


def gather(trainer: "pl.Trainer", found: Mapping[str, tuple[Tensor, ...]]) -> Named | None:
    """Bring tensors of all clients together, under `elsa_pl`'s strategy at the cloud only (elsewhere None)."""
    strategy: Any = trainer.strategy
    if is_federated(trainer):
        return cast(Named | None, strategy.gather_clients(dict(found)))
    if trainer.world_size == 1:
        return dict(found)
    parts: list[Named] = [{}] * trainer.world_size
    torch.distributed.all_gather_object(parts, {name: tuple(map(Tensor.cpu, found[name])) for name in found})
    return {name: values for part in parts for name, values in part.items()}


def companion(trainer: "pl.Trainer", kind: type[Companion]) -> Companion | None:
    """The trainer's callback of a kind, if it has one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it in a connector
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def log_agreed(trainer: "pl.Trainer", values: Mapping[str, float]) -> None:
    """Log what is the same in every process."""
    # another strategy's ranks would be told to synchronise; ours need not, and each value would cost a collective
    sync = not is_federated(trainer)
    trainer.lightning_module.log_dict(dict(values), on_step=False, on_epoch=True, batch_size=1, sync_dist=sync)


def agree(trainer: "pl.Trainer", value: Value) -> Value:
    """The first process' value, in all of them: what is decided once must not differ by rounding."""
    return trainer.strategy.broadcast(value, 0)


def is_federated(trainer: "pl.Trainer") -> bool:
    """Whether it runs under `elsa_pl`'s strategy."""
    return hasattr(trainer.strategy, "gather_clients")


def _trained(module: "pl.LightningModule") -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
