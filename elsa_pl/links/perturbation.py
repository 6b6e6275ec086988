"""SS-OP as a stage: what leaves a client is turned by a rotation that only its secret gives.

    undo: tail   front -> turn -> (link) -> middle computes on turned states -> (link) -> turn back -> tail
    undo: edge   front -> turn -> (link) -> turn back -> middle -> turn -> (link) -> turn back -> tail

The first is against a curious edge, which never has the secret; turning back after the middle is exact only as far as
the blocks in between do not notice. The second is against whoever reads the link, and exact.

At the tail the model learns on turned states, so these must be turned alike for the whole run: the subspace is that of
the model before any training. One that followed the training would have nearly all of its directions change places and
signs from round to round, and each time the model would be given states that are turned as if by another secret.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from elsa_pl.functional import sketch
from elsa_pl.functional.perturbation import (
    Complement,
    complement_moments,
    draw_rotation,
    perturb,
    receive,
    restore,
    rotated_moments,
    semantic_subspace,
)
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.functional.states import linear
from elsa_pl.links.stages import NOBODY, Affine, Ends, Link, Seen, Stage, current_crossing

Undo = Literal["tail", "edge"]
_NUM_ROWS = 3


class PerturbationStage(Stage):
    """Semantic subspace orthogonal perturbation; see `elsa_pl.functional.perturbation`. Always the first stage.

    Args:
        rank: of the subspace.
        undo: who turns back.
        complement: what becomes of the part outside of the subspace.
        ratio: with ``complement="sketch"``, numbers of that part over numbers sent.
        rekey: another rotation for every pass.
        seed: of the sketch's hashes; no secret.

    Attributes:
        secret: from which those of the clients are made. Without one nothing is turned for a client.
    """

    fits = True
    first = True  # what is turned back is what left the model
    hides = True

    def __init__(self, rank: int, undo: Undo, complement: Complement, ratio: float, rekey: bool, seed: int) -> None:
        if rank < 1:
            raise ValueError(f"expected rank >= 1; got {rank}")
        if undo not in get_args(Undo) or complement not in get_args(Complement):
            raise ValueError(
                f"expected undo to be one of {', '.join(get_args(Undo))} and complement one of"
                f" {', '.join(get_args(Complement))}; got {undo!r} and {complement!r}"
            )
        if rekey and undo == "tail":
            raise ValueError(
                "expected rekey=false with undo='tail': the model would have to learn on states that are turned"
                " in another way at every step; got true"
            )
        self._rank, self._undo, self._complement = rank, undo, complement
        self._ratio, self._rekey, self._seed = ratio, rekey, seed
        self.fits_untrained = self.undone_at_tail = undo == "tail"
        self.secret: str | None = None

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        if self._rank > width:
            raise ValueError(f"expected a rank of at most the width {width}; got {self._rank}: lower the rank")
        key = _Key(self._secret_of(client), "uplink" if self._undo == "tail" else link, self._rank, self._rekey)
        if link == "downlink" and self._undo == "tail":
            return Ends(nn.Identity(), _Restorer(width, key), width)
        drawn = None
        if self._complement == "sketch":
            drawn = sketch.draw_sketch(width, self._ratio, derive_seed(self._seed, "ssop", link), num_rows=_NUM_ROWS)
        sent = {"keep": width, "drop": self._rank, "sketch": self._rank + (drawn.width if drawn else 0)}
        encoder = _Perturber(width, key, self._complement, drawn)
        receiver = _Receiver(width, self._rank, self._complement, drawn)
        decoder = nn.Sequential(receiver, _Restorer(width, key)) if self._undo == "edge" else receiver
        return Ends(encoder, decoder, sent[self._complement])

    def _secret_of(self, client: str | None) -> str | None:
        if client is None:
            return "public"  # what is fitted is fitted to states that are turned by a rotation that is nobody's
        if client == NOBODY:
            return NOBODY
        return None if self.secret is None else f"{self.secret}/{client}"

    def fit(self, ends: Ends, seen: Seen, paired: Ends | None) -> None:
        if isinstance(ends.encoder, _Perturber):
            states = seen.states if seen.untrained is None else seen.untrained
            assert states is not None, "it is the first stage"
            subspace = semantic_subspace(states, self._rank)
        elif paired is None:
            raise ValueError("expected this stage on both links, because the tail undoes what the front did")
        else:  # the downlink turns back what the uplink turned
            subspace = _in_subspace(paired)[0].subspace
        if len(subspace) != len(seen.mean):
            raise ValueError(
                f"expected states as wide as those that are turned back, {len(subspace)}; got {len(seen.mean)}"
            )
        for part in _in_subspace(ends):
            part.fit(subspace, seen)

    def pass_on(self, ends: Ends, seen: Seen) -> Seen:
        if isinstance(ends.encoder, _Perturber) and self._complement != "keep":
            raise ValueError(f"nothing that is calibrated can follow complement={self._complement!r}")
        # a decoder must not depend on the secret: to whoever does not know it, states look alike in all rotations
        return Seen(None, *rotated_moments(seen.mean, seen.covariance, _in_subspace(ends)[0].subspace))

    def describe(self) -> str:
        ratio = f" 1/{self._ratio:g}" if self._complement == "sketch" else ""
        rekeyed = ", rekeyed" if self._rekey else ""
        return (
            f"SS-OP of rank {self._rank}, undone at the {self._undo}, complement {self._complement}{ratio}{rekeyed},"
            f" seed {self._seed}"
        )


class _Key:
    """The rotations that a secret gives."""

    def __init__(self, secret: str | None, link: Link, rank: int, rekey: bool) -> None:
        self._secret, self._link, self.rank, self._rekey = secret, link, rank, rekey
        self._kept: Tensor | None = None

    def rotation(self) -> Tensor:
        """That of the pass under way, [r, r]."""
        if self._secret == NOBODY:
            return torch.eye(self.rank)
        if self._secret is None:
            raise RuntimeError("this process does not know the secret of SSOP: give it secret_file")
        if self._rekey:
            return self._draw(current_crossing().number)
        if self._kept is None:  # two threads may both draw it, and draw the same
            self._kept = self._draw(0)
        return self._kept

    def _draw(self, number: int) -> Tensor:
        return draw_rotation(self.rank, f"{self._secret}/{self._link}", number, dtype=torch.float32)


class _Subspace(nn.Module):
    """Something that is fitted to the semantic subspace."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.subspace = nn.Parameter(torch.full((width, rank), torch.nan), requires_grad=False)

    def fit(self, subspace: Tensor, seen: Seen) -> None:
        """Take over the subspace of what arrives at the stage."""
        with torch.no_grad():
            self.subspace.copy_(subspace)


def _in_subspace(ends: Ends) -> list[_Subspace]:
    return [part for part in ends.modules() if isinstance(part, _Subspace)]


class _Perturber(_Subspace):
    def __init__(self, width: int, key: _Key, complement: Complement, drawn: sketch.CountSketch | None) -> None:
        super().__init__(width, key.rank)
        self._key, self._complement, self._drawn = key, complement, drawn

    def forward(self, states: Tensor) -> Tensor:
        drawn = self._drawn
        encode = None if drawn is None else lambda outside: linear(outside, drawn.matrix)
        return perturb(states, self.subspace, self._key.rotation(), complement=self._complement, encode=encode)


class _Receiver(_Subspace):
    def __init__(self, width: int, rank: int, complement: Complement, drawn: sketch.CountSketch | None) -> None:
        super().__init__(width, rank)
        self._complement, self._drawn = complement, drawn
        if complement == "drop":
            self.mean = nn.Parameter(torch.full((width,), torch.nan), requires_grad=False)
        self._decode = None if drawn is None else Affine(drawn.width, width)

    def fit(self, subspace: Tensor, seen: Seen) -> None:
        super().fit(subspace, seen)
        if self._complement == "drop":
            with torch.no_grad():
                self.mean.copy_(seen.mean)
        if self._decode is not None:
            assert self._drawn is not None
            outside = complement_moments(seen.mean, seen.covariance, subspace)
            fitted = sketch.calibrate(self._drawn.matrix, *outside)
            self._decode.fit(fitted.weight, fitted.bias)

    def forward(self, sent: Tensor) -> Tensor:
        mean = self.mean if self._complement == "drop" else None
        return receive(sent, self.subspace, complement=self._complement, decode=self._decode, mean=mean)


class _Restorer(_Subspace):
    def __init__(self, width: int, key: _Key) -> None:
        super().__init__(width, key.rank)
        self._key = key

    def forward(self, states: Tensor) -> Tensor:
        return restore(states, self.subspace, self._key.rotation())
