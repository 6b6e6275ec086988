"""The stages of a link one after the other, and the half of them that each side holds.

Tensors have names that say where they belong, ``links.uplink.1-4-1.decoder.0.weight``: link, blocks of front, middle
and tail, side, number of the stage. So they are published, averaged and saved next to the adapters.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from elsa_pl.errors import ConfigurationError, TrainingDiverged
from elsa_pl.links.reuse import Memory, ReuseStage, Sender
from elsa_pl.links.stages import NOBODY, Ends, Link, Seen, Stage
from elsa_pl.links.traffic import Traffic

PREFIX = "links."
Side = Literal["encoder", "decoder"]


class LinkEnd(nn.Module):
    """What one side of a link does to states: encode what it sends, or decode what it receives.

    Args:
        name: of the link and the plan, such as ``uplink.1-4-1``.
        side: which.
        ends: of the stages that have something to do, by their number.
        fits: the numbers of the stages that must be fitted first.
    """

    def __init__(self, name: str, side: Side, ends: Mapping[int, nn.Module], fits: Sequence[int]) -> None:
        super().__init__()
        self._prefix, self._side = f"{PREFIX}{name}.{side}.", side
        self.ends = nn.ModuleDict({str(number): end for number, end in ends.items()})
        self._order = sorted(ends, reverse=side == "decoder")
        self._missing = [number for number in fits if any(True for _ in ends[number].parameters())]

    def forward(self, states: Tensor) -> Tensor:
        """Encode or decode, in full precision: what is sent is never narrower than float32, also under autocast.

        Raises:
            RuntimeError: a stage is not fitted yet; with its number and the link.
            TrainingDiverged: states to encode that are not finite; with the link.
            ValueError: what a stage does not take; with the stage and the link.
        """
        if self._missing:
            raise RuntimeError(
                f"stage {self._missing[0]} of {self._prefix}* is not calibrated yet: no probes were seen"
            )
        if self._side == "encoder" and not states.isfinite().all():
            raise TrainingDiverged(
                f"states that are not finite at {self._prefix}*: lower the learning rate, clip gradients"
                " (gradient_clip_val), or look at this client's data"
            )
        with torch.autocast(states.device.type, enabled=False):
            if self._side == "encoder":
                states = states.to(torch.promote_types(states.dtype, torch.float32))
            for number in self._order:
                try:
                    states = self.ends[str(number)](states)
                except ValueError as error:
                    raise ValueError(f"stage {number} of {self._prefix}*: {error}") from error
        return states

    def tensors(self) -> dict[str, nn.Parameter]:
        """What is fitted or trains, by name."""
        return {f"{self._prefix}{name}": value for name, value in self.ends.named_parameters()}

    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name."""
        return {name: value for name, value in self.tensors().items() if value.requires_grad}

    def slots(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor] | None:
        """Slots for the texts of a step, see `Sender`; None where nothing is remembered."""
        sender = next((end for end in self._memories() if isinstance(end, Sender)), None)
        return None if sender is None else sender.slots(batches)

    def forget(self) -> None:
        """Remember no states any more."""
        for end in self._memories():
            end.forget()

    def take_memory(self, other: "LinkEnd") -> None:
        """Remember what another end of the same link does, which is not used any more."""
        for end, theirs in zip(self._memories(), other._memories(), strict=True):
            end.take(theirs)

    def _memories(self) -> list[Memory]:
        return [end for end in self.ends.values() if isinstance(end, Memory)]

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over those of ``tensors`` that this end has. What is fitted only may be missing, and stays as it is.

        Raises:
            KeyError: something that trains is missing.
        """
        with torch.no_grad():
            for name, value in self.tensors().items():
                if name in tensors or value.requires_grad:
                    value.copy_(tensors[name])
        if all(name in tensors for name in self.tensors()):
            self._missing = []


class Codec(nn.Module):
    """All stages of one link, both sides.

    Args:
        name: of the link and the plan, such as ``uplink.1-4-1``.
        link: which of the two.
        stages: in the order of the sender.
        width: D.
        client: whose; None for a codec that is made to fit those of all clients.

    Raises:
        ConfigurationError: stages that do not fit the width or each other; with the stage and the link.
    """

    def __init__(self, name: str, link: Link, stages: Sequence[Stage], width: int, client: str | None = None) -> None:
        super().__init__()
        self.name, self.link, self._stages, self._fitted = name, link, stages, False
        self._num_inputs = width
        self.traffic = Traffic()
        self.ends = nn.ModuleList()
        for number, stage in enumerate(stages):
            where = f"stage {number} of {name} ({stage.describe()})"
            if number and stages[number - 1].last and not stage.takes_bits:
                raise ConfigurationError(
                    f"{where} comes after {stages[number - 1].describe()}, whose numbers are bits: put it before"
                )
            if stage.fits and not stage.trains and any(before.trains for before in stages[:number]):
                raise ConfigurationError(
                    f"{where} is calibrated to what arrives, and a stage before it trains: leave one of them out, or"
                    " set learn to false"
                )
            learning = next((other for other in stages if other.trains), None)
            if isinstance(stage, ReuseStage) and learning is not None:
                raise ConfigurationError(
                    f"{where} has the edge go on with what earlier values of {learning.describe()} made of a text:"
                    " leave one of them out, or set learn to false"
                )
            hiding = next((other for other in stages if other.hides), None)
            if isinstance(stage, ReuseStage) and hiding is not None:
                raise ConfigurationError(
                    f"{where} shows when a text comes again, and has the edge go on with what it was sent before, which"
                    f" {hiding.describe()} is against: leave one of them out"
                )
            if number and stage.first:
                raise ConfigurationError(f"{where} comes after {stages[number - 1].describe()}: put it before")
            try:
                made = stage.ends(width, link, client)
            except ValueError as error:
                raise ConfigurationError(f"{where}: {error}") from error
            self.ends.append(made)
            width = made.width
        self.width = width

    def forward(self, states: Tensor) -> Tensor:
        """What the receiver computes with: decode(encode(states))."""
        sent = self.side("encoder")(states)
        self.traffic.crossed(self.link, sent)
        decoded: Tensor = self.side("decoder")(sent)
        return decoded

    def side(self, side: Side) -> LinkEnd:
        """One side's half, which shares its tensors with this."""
        ends = {number: getattr(ends, side) for number, ends in enumerate(self.ends)}
        fits = [number for number, stage in enumerate(self._stages) if stage.fits and not self._fitted]
        return LinkEnd(self.name, side, ends, fits)

    def fit(self, states: Tensor, uplink: "Codec | None" = None, *, untrained: Tensor | None = None) -> None:
        """Fit all stages, each to what arrives at it.

        Args:
            states: of public texts at this cut, padding left out. [Q, D]
            uplink: of a downlink, the same client's uplink, fitted already.
            untrained: what the states were before any training, where it `fits_untrained`; None: there was none. [Q, D]

        Raises:
            ConfigurationError: a stage cannot be fitted to them; with the stage and the link.
        """
        seen = Seen.of(states, untrained)
        for number, stage in enumerate(self._stages):
            ends = self._ends_of(stage)
            assert ends is not None
            try:
                if stage.fits:
                    stage.fit(ends, seen, None if uplink is None else uplink._ends_of(stage))
                if any(later.fits for later in self._stages[number + 1 :]):
                    seen = stage.pass_on(ends, seen)
            except ValueError as error:
                raise ConfigurationError(f"stage {number} of {self.name} ({stage.describe()}): {error}") from error
        self._fitted = True

    def _ends_of(self, stage: Stage) -> Ends | None:
        if stage not in self._stages:
            return None
        ends = self.ends[self._stages.index(stage)]
        assert isinstance(ends, Ends)
        return ends

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what was fitted or has trained, of both sides.

        Raises:
            KeyError: something is missing.
        """
        with torch.no_grad():
            for name, value in self.tensors().items():
                value.copy_(tensors[name])
        self._fitted = True

    def without_secrets(self) -> "Codec":
        """What somebody has of it who knows all that is public."""
        known = Codec(self.name, self.link, self._stages, self._num_inputs, NOBODY)
        known.load(self.tensors())
        return known

    def describe(self) -> list[str]:
        """What the stages do, in their order."""
        return [stage.describe() for stage in self._stages]

    @property
    def fits_untrained(self) -> bool:
        """Whether it must see the states of before any training as well."""
        return any(stage.fits_untrained for stage in self._stages)

    @property
    def subspace(self) -> Tensor | None:
        """In which SS-OP turns, [D, r]; None without it. It is public."""
        return next((value for name, value in self.named_parameters() if name.endswith("subspace")), None)

    def tensors(self) -> dict[str, nn.Parameter]:
        """What is fitted or trains, of both sides, by name."""
        return {**self.side("encoder").tensors(), **self.side("decoder").tensors()}


def codecs_in(module: nn.Module) -> list[Codec]:
    """Those that stand at submodules of a module."""
    return [found for found in module.modules() if isinstance(found, Codec)]
