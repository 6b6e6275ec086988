"""Encryption, against whoever reads the link; and noise, the usual defence against an edge, to compare others with."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn

from elsa_pl.functional.encryption import derive_key, seal, unseal
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.links.stages import NOBODY, Ends, Link, Seen, Stage, current_crossing


class EncryptionStage(Stage):
    """Unreadable to whoever has no secret; see `elsa_pl.functional.encryption`.

    A message opens only for the client, link, direction and pass that it was made for; on the uplink, only together
    with the mask and the slots that went with it.

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
        readable, accompanied = client == NOBODY, link == "uplink"
        sealer = _Sealer(key, readable=readable, accompanied=accompanied)
        return Ends(sealer, _Unsealer(key, readable=readable, accompanied=accompanied), width)

    def describe(self) -> str:
        return "encryption by ChaCha20-Poly1305"


class _Lock(nn.Module):
    def __init__(self, key: bytes | None, *, readable: bool, accompanied: bool) -> None:
        super().__init__()
        self._key, self._readable, self._accompanied = key, readable, accompanied

    @property
    def key(self) -> bytes | None:
        """None where nothing is hidden."""
        if self._key is None and not self._readable:
            raise RuntimeError("this process does not know the secret of LinkEncryption: give it secret_file")
        return self._key

    @property
    def context(self) -> bytes:
        """What both ends know of the pass under way."""
        passing = current_crossing()
        number = struct.pack("<q", passing.number)
        if not self._accompanied:
            return number
        beside = hashlib.sha256()
        for tensor, dtype in ((passing.mask, torch.bool), (passing.slots, torch.int32)):
            beside.update(b"nothing" if tensor is None else repr(list(tensor.shape)).encode())
            if tensor is not None:
                beside.update(tensor.to("cpu", dtype).contiguous().numpy().tobytes())
        return number + beside.digest()


class _Sealer(_Lock):
    def forward(self, states: Tensor) -> Tensor:
        return seal(states, self.key, self.context)


class _Unsealer(_Lock):
    def forward(self, message: Tensor) -> Tensor:
        return unseal(message, self.key, self.context)


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
        own = None if client == NOBODY or self.seed is None else (self.seed, link, client or "")
        return Ends(_Noise(width, self._scale, own), nn.Identity(), width)

    def fit(self, ends: Ends, seen: Seen, paired: Ends | None) -> None:
        assert isinstance(ends.encoder, _Noise)
        with torch.no_grad():
            ends.encoder.spread.copy_(seen.covariance.diagonal().clamp_min(0).sqrt())

    def describe(self) -> str:
        return f"Gaussian noise of {self._scale:g} standard deviations"


class _Noise(nn.Module):
    def __init__(self, width: int, scale: float, seed: tuple[int, str, str] | None) -> None:
        super().__init__()
        self._scale, self._seed = scale, seed
        self.spread = nn.Parameter(torch.full((width,), torch.nan), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        if self._seed is None:
            generator = _imitated.get()
            if generator is None:
                return states
            drawn = torch.randn(states.shape, generator=generator)
        else:
            # Not from a torch.Generator: on the CPU it keeps 32 bits of its seed, few enough to try them all.
            parts = ("noise", "noise, continued")
            entropy = [derive_seed(*self._seed, current_crossing().number, part) for part in parts]
            shape = tuple(states.shape)
            drawn = torch.from_numpy(np.random.default_rng(entropy).standard_normal(shape, dtype=np.float32))
        return states + self._scale * self.spread * drawn.to(states)
