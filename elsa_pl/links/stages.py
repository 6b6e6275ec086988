"""What a stage of a link is: two ends, and how they are fitted to the states of public texts.

    sender                                                              receiver
    states [*, D] -> encoder of stage 0 -> encoder of stage 1 -> link -> decoder 1 -> decoder 0 -> states [*, D]
                     <- gradients come the same way back, and what crosses is as small <-

Each end is a module that holds only what its side needs, because the sides are in different processes: a decoder that
is fitted to public texts lives with the receiver alone, and what trains is stepped where it lives.

Shapes: D hidden, K transmitted width, * any number of leading dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from elsa_pl.functional import sketch
from elsa_pl.functional.projection import principal_projection
from elsa_pl.functional.quantization import BlockFormat, from_wire, to_wire
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.functional.states import linear, moments

Link = Literal["uplink", "downlink"]
"""From a client to its edge, or back."""
LINKS: tuple[Link, ...] = get_args(Link)
SketchDecoding = Literal["calibrated", "median", "mean"]
NOBODY = ""
"""Client name of ends that hide nothing: those of an attacker who looks at public texts."""


@dataclass
class Crossing:
    """One pass over the links.

    Attributes:
        number: both ends number it alike.
        mask: 1 for tokens and 0 for padding. [B, G]
        slots: of each text, for `elsa_pl.links.reuse`; None where nothing is remembered, as in evaluations. The sender
            marks which of the texts it leaves out, and its receiver needs them with the states. [B]
    """

    number: int = 0
    mask: Tensor | None = None
    slots: Tensor | None = None


_crossing: ContextVar[Crossing | None] = ContextVar("crossing", default=None)


@contextmanager
def crossing(number: int, mask: Tensor | None = None, slots: Tensor | None = None) -> Iterator[Crossing]:
    """What this thread sends and receives belongs to one pass over the links; see `Crossing`."""
    passing = Crossing(number, mask, slots)
    token = _crossing.set(passing)
    try:
        yield passing
    finally:
        _crossing.reset(token)


def current_crossing() -> Crossing:
    """The pass under way in this thread; outside of any, one that nothing is known of."""
    return _crossing.get() or Crossing()


@dataclass(frozen=True)
class Seen:
    """States of public texts as they arrive at a stage.

    Attributes:
        states: a row for each token; None where only their moments are known. [Q, K]
        mean: [K]
        covariance: [K, K]
        untrained: what the states were before any training, where the first stage asks for it. [Q, K]
    """

    states: Tensor | None
    mean: Tensor
    covariance: Tensor
    untrained: Tensor | None = None

    @staticmethod
    def of(states: Tensor, untrained: Tensor | None = None) -> "Seen":
        """With the moments computed."""
        return Seen(states, *moments(states), untrained)


class Ends(nn.Module):
    """Encoder and decoder of a stage for states of one width.

    Attributes:
        encoder: [*, D] -> [*, K].
        decoder: [*, K] -> [*, D].
        width: K.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.width = encoder, decoder, width


class Stage(ABC):
    """One thing that is done to the states of a link, as both ends know it from the configuration.

    Attributes:
        fits: it must see states of public texts before it can be used.
        fits_untrained: it must see those of before any training as well; it is the first stage then.
        trains: it has parameters that train with the adapters.
        first: nothing can come before it.
        last: nothing that computes with numbers can follow it.
        takes_bits: it can follow such a one.
        hides: it makes something else of a state in each pass, or must not show that a state comes again.
        undone_at_tail: what it does on the uplink is undone at the end of the downlink, and the model learns on what is
            between.
    """

    fits = False
    fits_untrained = False
    trains = False
    first = False
    last = False
    takes_bits = False
    hides = False
    undone_at_tail = False

    @abstractmethod
    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        """Make both ends, not fitted yet.

        Args:
            width: D of the states that arrive.
            link: where; the two links of a client do not share what is drawn.
            client: whose; None for ends that are made to fit those of all clients.

        Raises:
            ValueError: the settings do not fit this width.
        """

    def fit(self, ends: Ends, seen: Seen, paired: Ends | None) -> None:
        """Fit the ends to what arrives at this stage; called only if it `fits`.

        Args:
            ends: those to fit.
            seen: what arrives.
            paired: of a downlink, the ends of the same stage on the uplink, if it is there too.

        Raises:
            ValueError: they cannot be fitted to it.
        """
        raise NotImplementedError

    def pass_on(self, ends: Ends, seen: Seen) -> Seen:
        """What arrives at the stage after this one."""
        assert seen.states is not None
        with torch.no_grad():
            return Seen.of(ends.encoder(seen.states))

    @abstractmethod
    def describe(self) -> str:
        """All settings on which the two ends must agree, for a person to read."""


class SketchStage(Stage):
    """Count sketch; see `elsa_pl.functional.sketch`.

    Args:
        ratio: numbers of a state over numbers sent.
        decoding: how the receiver reads it.
        num_rows: hash rows.
        ridge: of the calibrated decoder.
        seed: of the hashes; no secret.
    """

    def __init__(self, ratio: float, decoding: SketchDecoding, num_rows: int, ridge: float, seed: int) -> None:
        if decoding not in get_args(SketchDecoding):
            raise ValueError(f"expected decoder to be one of {', '.join(get_args(SketchDecoding))}; got {decoding!r}")
        self.fits = decoding == "calibrated"
        self._ratio, self._decoding, self._num_rows, self._ridge, self._seed = ratio, decoding, num_rows, ridge, seed

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        drawn = sketch.draw_sketch(width, self._ratio, derive_seed(self._seed, "sketch", link), num_rows=self._num_rows)
        decoder = Affine(drawn.width, width) if self.fits else _HashDecoder(drawn, self._decoding)
        return Ends(_SketchEncoder(drawn), decoder, drawn.width)

    def fit(self, ends: Ends, seen: Seen, paired: Ends | None) -> None:
        assert isinstance(ends.encoder, _SketchEncoder)
        assert isinstance(ends.decoder, Affine)
        fitted = sketch.calibrate(ends.encoder.matrix, seen.mean, seen.covariance, ridge=self._ridge)
        ends.decoder.fit(fitted.weight, fitted.bias)

    def describe(self) -> str:
        ridge = f", ridge {self._ridge:g}" if self.fits else ""
        return f"sketch 1/{self._ratio:g} in {self._num_rows} rows, {self._decoding}{ridge}, seed {self._seed}"


class _SketchEncoder(nn.Module):
    matrix: Tensor

    def __init__(self, drawn: sketch.CountSketch) -> None:
        super().__init__()
        self.register_buffer("matrix", drawn.matrix, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        return linear(states, self.matrix)


class _HashDecoder(nn.Module):
    def __init__(self, drawn: sketch.CountSketch, decoding: SketchDecoding) -> None:
        super().__init__()
        self._drawn, self._decode = drawn, sketch.decode_median if decoding == "median" else sketch.decode_mean

    def forward(self, sketched: Tensor) -> Tensor:
        return self._decode(sketched, self._drawn)


class Affine(nn.Module):
    """``states @ weight + bias``: an end that is fitted, and may then train. Not to be used before.

    Args:
        num_inputs: width of what arrives.
        num_outputs: width of what leaves.
        learn: train with the adapters.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, learn: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_inputs, num_outputs), torch.nan), requires_grad=learn)
        self.bias = nn.Parameter(torch.full((num_outputs,), torch.nan), requires_grad=learn)

    def forward(self, states: Tensor) -> Tensor:
        """[*, num_inputs] -> [*, num_outputs]."""
        return linear(states, self.weight, self.bias)

    def fit(self, weight: Tensor, bias: Tensor) -> None:
        """Take over values."""
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)


class QuantizationStage(Stage):
    """Blocks of 8 or 4 bits, gradients too; see `elsa_pl.functional.quantization`.

    Args:
        format: how.
    """

    last = True  # what follows would compute with bits

    def __init__(self, format: BlockFormat) -> None:
        self._format = format

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        if width % self._format.block and self._format.block < width:
            raise ValueError(
                f"expected a block size that divides the width {width} of what is quantized; got {self._format.block}:"
                " take a divisor, or a block as large as the width"
            )
        return Ends(_Packer(self._format), _Unpacker(self._format, width), self._format.wire_width(width))

    def describe(self) -> str:
        return f"int{self._format.bits} in blocks of {self._format.block}, scales {self._format.scale_dtype}"


class _Packer(nn.Module):
    def __init__(self, format: BlockFormat) -> None:
        super().__init__()
        self._format = format

    def forward(self, states: Tensor) -> Tensor:
        return to_wire(states, self._format)


class _Unpacker(nn.Module):
    def __init__(self, format: BlockFormat, width: int) -> None:
        super().__init__()
        self._format, self._width = format, width

    def forward(self, wire: Tensor) -> Tensor:
        return from_wire(wire, self._width, self._format)


class ProjectionStage(Stage):
    """Fewer numbers along directions that are fitted, and may then train; see `elsa_pl.functional.projection`.

    Args:
        ratio: numbers of a state over numbers sent.
        learn: encoder and decoder train with the adapters.
    """

    fits = True

    def __init__(self, ratio: float, learn: bool) -> None:
        if not 1 <= ratio < float("inf"):
            raise ValueError(f"expected a finite ratio >= 1; got {ratio}")
        self._ratio, self.trains = ratio, learn

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        kept = int(width / self._ratio)
        if kept < 1:
            raise ValueError(f"expected a ratio of at most {width}, the width; got {self._ratio:g}: nothing is left")
        encoder, decoder = Affine(width, kept, learn=self.trains), Affine(kept, width, learn=self.trains)
        return Ends(encoder, decoder, kept)

    def fit(self, ends: Ends, seen: Seen, paired: Ends | None) -> None:
        if seen.states is None:
            raise ValueError(
                "expected states whose directions are known, but SSOP has turned them; leave one of both out"
            )
        mean, components = principal_projection(seen.states, ends.width)
        assert isinstance(ends.encoder, Affine)
        assert isinstance(ends.decoder, Affine)
        # centred codes, which rounding to a few bits needs
        ends.encoder.fit(components, -mean @ components)
        ends.decoder.fit(components.T, mean)

    def describe(self) -> str:
        return f"projection 1/{self._ratio:g}, {'learned' if self.trains else 'principal directions'}"
