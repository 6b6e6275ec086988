"""Encryption, against whoever reads the link; and noise, the usual defence against an edge, to compare others with."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from elsa_pl.functional.encryption import derive_key, seal, unseal
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.links.stages import NOBODY, Ends, Link, Seen, Stage, current_crossing


class EncryptionStage(Stage):
    """Unreadable to whoever has no secret; see `elsa_pl.functional.encryption`.

    Attributes:
        secret: from which keys are made, of each client and link another one.
    """

    last = True
    takes_bits = True

    def __init__(self) -> None:
        self.secret: str | None = None

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        key: bytes | None = None
        if self.secret is not None and client != NOBODY:
            key = derive_key(self.secret, f"{client}/{link}")
        return Ends(_Sealer(key, readable=client == NOBODY), _Unsealer(key, readable=client == NOBODY), width)

    def describe(self) -> str:
        return "encryption by ChaCha20-Poly1305"


class _Lock(nn.Module):
    def __init__(self, key: bytes | None, *, readable: bool) -> None:
        super().__init__()
        self._key, self._readable = key, readable

    @property
    def key(self) -> bytes | None:
        """None where nothing is hidden."""
        if self._key is None and not self._readable:
            raise RuntimeError("this process does not know the secret of LinkEncryption: give it secret_file")
        return self._key


class _Sealer(_Lock):
    def forward(self, states: Tensor) -> Tensor:
        return seal(states, self.key)


class _Unsealer(_Lock):
    def forward(self, message: Tensor) -> Tensor:
        return unseal(message, self.key)


_imitated: ContextVar[torch.Generator | None] = ContextVar("imitated", default=None)


@contextmanager
def imitating_noise(generator: torch.Generator) -> Iterator[None]:
    """Whoever has no secret adds noise of its own, of the same spread, which is public: to learn what states look like.

    Outside of this, a codec without secrets adds none.
    """
    token = _imitated.set(generator)
    try:
        yield
    finally:
        _imitated.reset(token)


class NoiseStage(Stage):
    """Gaussian noise, in units of the spread of public texts' states; a baseline.

    Args:
        scale: standard deviations.

    Attributes:
        seed: of the noise, which is another one for each client and pass.
    """

    fits = True
    hides = True

    def __init__(self, scale: float) -> None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"expected a finite scale > 0; got {scale}")
        self._scale = scale
        self.seed: int | None = None

    def ends(self, width: int, link: Link, client: str | None) -> Ends:
        own = None if client == NOBODY or self.seed is None else derive_seed(self.seed, "noise", link, client or "")
        return Ends(_Noise(width, self._scale, own), nn.Identity(), width)

    def fit(self, ends: Ends, seen: Seen, paired: Ends | None) -> None:
        assert isinstance(ends.encoder, _Noise)
        with torch.no_grad():
            ends.encoder.spread.copy_(seen.covariance.diagonal().clamp_min(0).sqrt())

    def describe(self) -> str:
        return f"Gaussian noise of {self._scale:g} standard deviations"


class _Noise(nn.Module):
    def __init__(self, width: int, scale: float, seed: int | None) -> None:
        super().__init__()
        self._scale, self._seed = scale, seed
        self.spread = nn.Parameter(torch.full((width,), torch.nan), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        if self._seed is None:
            generator = _imitated.get()
            if generator is None:
                return states
        else:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, current_crossing().number))
        drawn = torch.randn(states.shape, generator=generator).to(states)
        return states + self._scale * self.spread * drawn
