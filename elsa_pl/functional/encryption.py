"""Authenticated encryption of a tensor in a form that autograd carries: the gradient comes back encrypted as well.

Shapes: * any number of dimensions, n numbers in them, d of them.
"""

import hashlib
import os
import struct
from typing import Any, Final

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from torch import Tensor

_NONCE, _TAG = 12, 16
_FORWARD, _BACKWARD = b"forward", b"backward"
OVERHEAD: Final = (_NONCE + _TAG) // 4
"""Numbers of a message beside those of the tensor and of its shape."""


def derive_key(secret: str, purpose: str) -> bytes:
    """A key of 32 bytes: another one for each purpose, from which nobody finds the secret or the others.

    Example:
        >>> derive_key("a", "uplink") == derive_key("a", "uplink") != derive_key("a", "downlink")
        True
    """
    return hashlib.blake2b(purpose.encode(), key=hashlib.sha512(secret.encode()).digest()).digest()[:32]


def seal(states: Tensor, key: bytes | None, context: bytes = b"") -> Tensor:
    """Encrypt a tensor, and decrypt its gradient.

    ChaCha20-Poly1305 (RFC 8439) with a fresh random nonce for each message. Authenticated are also its shape, whether
    it is a tensor or a gradient, and the context. So neither a message that was sent in another context opens, nor one
    that is sent back as the gradient of itself; one that is sent twice in the same context does.

    Args:
        states: float32. [*]
        key: of `derive_key`. None leaves it readable, in the form of a sealed one.
        context: what both sides know of the message and of its gradient, such as a number. It is not sent.

    Returns:
        float32: numbers that mean nothing, some of them nan; they must reach `unseal` as they are.
        [1 + d + n + `OVERHEAD`]

    Raises:
        ValueError: another dtype; in the backward pass as `unseal`.

    Example:
        >>> key = derive_key("nobody knows", "example")
        >>> unseal(seal(torch.tensor([[1.0, 2.0]]), key), key)
        tensor([[1., 2.]])
    """
    if states.dtype != torch.float32:
        raise ValueError(f"expected float32 states to encrypt; got {states.dtype}")
    message: Tensor = _Seal.apply(states, key, context)  # type: ignore[no-untyped-call]  # torch has no types for it
    return message


def unseal(message: Tensor, key: bytes | None, context: bytes = b"") -> Tensor:
    """Decrypt what `seal` made, and encrypt the gradient.

    Args:
        message: from `seal`.
        key: the same. None reads the bytes as they are: what somebody without the key sees.
        context: the same.

    Returns:
        [*]

    Raises:
        ValueError: it was sealed with another key, as something else or in another context, or changed on its way.
    """
    states: Tensor = _Unseal.apply(message, key, context)  # type: ignore[no-untyped-call]  # torch has no types for it
    return states


class _Seal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, key: bytes | None, context: bytes) -> Tensor:
        ctx.key, ctx.context = key, context
        return _sealed(states, key, _FORWARD + context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _unsealed(gradient, ctx.key, _BACKWARD + ctx.context), None, None


class _Unseal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: Tensor, key: bytes | None, context: bytes) -> Tensor:
        ctx.key, ctx.context = key, context
        return _unsealed(message, key, _FORWARD + context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _sealed(gradient, ctx.key, _BACKWARD + ctx.context), None, None


def _sealed(states: Tensor, key: bytes | None, context: bytes) -> Tensor:
    shape = struct.pack(f"<{1 + states.ndim}i", states.ndim, *states.shape)
    content = states.detach().cpu().contiguous().numpy().tobytes()
    nonce = os.urandom(_NONCE)
    sealed = bytes(_TAG) + content if key is None else ChaCha20Poly1305(key).encrypt(nonce, content, shape + context)
    return torch.frombuffer(bytearray(shape + nonce + sealed), dtype=torch.float32).to(states.device)


def _unsealed(message: Tensor, key: bytes | None, context: bytes) -> Tensor:
    raw = message.detach().cpu().contiguous().numpy().tobytes()
    wrong = (
        "expected a message of this pass that was sealed with the same secret; got another one, or it was changed on"
        " its way"
    )
    (dimensions,) = struct.unpack_from("<i", raw) if len(raw) >= 4 else (-1,)
    start = 4 * (1 + dimensions)
    if dimensions < 0 or start + _NONCE + _TAG > len(raw):
        raise ValueError(wrong)
    shape, nonce, sealed = raw[:start], raw[start : start + _NONCE], raw[start + _NONCE :]
    try:
        content = sealed[_TAG:] if key is None else ChaCha20Poly1305(key).decrypt(nonce, sealed, shape + context)
    except InvalidTag:
        raise ValueError(wrong) from None
    sizes = struct.unpack_from(f"<{dimensions}i", shape, 4)
    return torch.from_numpy(np.frombuffer(bytearray(content), np.float32)).view(sizes).to(message.device)
