"""SS-OP: a secret rotation of the subspace in which hidden states mean something.

Whoever reads a link, or the edge behind it, can look up each hidden state among those of public texts and so read the
tokens. A rotation that only the client knows, within the directions in which states vary most (the *semantic
subspace*), keeps lengths and angles for the model and takes the coordinates from the reader. What lies outside of the
subspace identifies tokens as well, unless the subspace is nearly everything: `complement` says what becomes of it.

    states [*, D] --perturb--> sent [*, r + ...] --receive--> [*, D], still rotated --restore--> [*, D]
      (secret)                                 (no secret)                        (secret)

`receive` is for whoever computes on rotated states; `restore` is for whoever shares the secret. Everything is linear in
the states, apart from what a codec for the complement may do, so backward is exact. Numbers that are not finite are not
looked for: they spread over the whole state.

Shapes: Q calibration states, D hidden, r rank of the subspace, K width of the encoded complement, * any number of
leading dimensions.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from elsa_pl.functional.fingerprints import principal_directions
from elsa_pl.functional.seeding import derive_seed
from elsa_pl.functional.states import linear, require_calibration_states, require_moments, require_width

Complement = Literal["keep", "sketch", "drop"]
"""What becomes of the part of a state outside of the subspace: it is sent as it is, encoded, or not at all."""


def semantic_subspace(states: Tensor, rank: int) -> Tensor:
    r"""The directions that hold most of the states' length: the top right singular vectors V of the states.

    The mean is not taken out, so its direction is usually the first one.

    Args:
        states: hidden states of public texts at the cut, padding left out. [Q, D]
        rank: r, 1 <= r <= D and r <= Q.

    Returns:
        Orthonormal columns, in the states' own dtype. The sign of each is fixed, but directions of equal strength may
        come out differently on other hardware: compute them in one place. [D, r]

    Raises:
        ValueError: states that are no finite matrix, a rank outside its range, or states that lie in fewer than `rank`
            directions.

    Source:
        ELSA, arXiv 2601.13824, SS-OP.

    Example:
        >>> semantic_subspace(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), 1)
        tensor([[0.],
                [1.]])
    """
    require_calibration_states(states)
    num_states, num_hidden = states.shape
    if not 1 <= rank <= min(num_hidden, num_states):
        raise ValueError(
            f"expected 1 <= rank <= {min(num_hidden, num_states)}, from {num_states} states of width {num_hidden}; got "
            f"{rank}: lower the rank or give more probes"
        )
    # States and their negatives have mean 0 and the same singular vectors.
    return principal_directions(torch.cat([states, -states]), rank)


def draw_rotation(rank: int, secret: int | str, step: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Draw a client's orthogonal matrix W for one step, uniformly among all of that size.

    .. math::
        W = H_1 \cdots H_r \operatorname{diag}(-\operatorname{sign} g_{kk}), \qquad
        H_k = I - 2 \frac{v_k v_k^T}{\lVert v_k \rVert^2}, \quad
        v_k = g_k + \operatorname{sign}(g_{kk}) \lVert g_k \rVert e_k, \quad g_{ik} \sim N(0, 1) \text{ for } i \ge k

    That is what the QR decomposition of a Gaussian matrix comes to, without the matrix that it would take apart.
    Without the signs W would not be uniform (Haar). A "rotation" here may also mirror; of rank 1 it is 1 or -1.

    Args:
        rank: r, at least 1.
        secret: shared by those who may restore, and by nobody else. W is as hard to guess as this is, up to 126 bits:
            take ``secrets.token_hex(16)``, not a seed that stands in a configuration.
        step: another step, another rotation. Who learns that of one step knows nothing about those of others.
        dtype: in which it is computed.

    Returns:
        Orthogonal, on the CPU. [r, r]

    Raises:
        ValueError: a rank below 1.

    Source:
        Stewart 1980, doi 10.1137/0717034; Mezzadri 2007, arXiv math-ph/0609050. ELSA, arXiv 2601.13824, draws one
        rotation for each client and keeps it.

    Example:
        >>> rotation = draw_rotation(3, "secret")
        >>> torch.allclose(rotation @ rotation.T, torch.eye(3).double())
        True
        >>> torch.equal(rotation, draw_rotation(3, "secret")), torch.equal(rotation, draw_rotation(3, "secret", step=1))
        (True, False)
    """
    if rank < 1:
        raise ValueError(f"expected rank >= 1; got {rank}")
    # Not from a torch.Generator: on the CPU it keeps 32 bits of its seed, few enough to try them all.
    entropy = [derive_seed(secret, part, step) for part in ("rotation", "rotation, continued")]
    draws = torch.from_numpy(np.random.default_rng(entropy).standard_normal((rank, rank))).to(dtype).tril()
    first, norms = draws.diagonal(), draws.norm(dim=0)
    signs = torch.where(first < 0, -1.0, 1.0).to(dtype)
    heads = first + signs * norms  # v_kk; vectors are divided by it, as LAPACK has them
    rotation: Tensor = torch.linalg.householder_product(draws / heads, 1 + first.abs() / norms) * -signs
    return rotation


def perturb(
    states: Tensor,
    subspace: Tensor,
    rotation: Tensor,
    *,
    complement: Complement = "keep",
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Rotate the part of each state that lies in the subspace; return what is sent.

    .. math::
        x Q = x + x V (W - I) V^T, \qquad Q = I - V V^T + V W V^T

    With `complement` "keep" the whole of it is sent, and nothing is lost. With "drop" the r coordinates
    :math:`x V W` are sent, and with "sketch" the encoded :math:`x - x V V^T` after them.

    Args:
        states: [*, D]
        subspace: V, from `semantic_subspace`. [D, r]
        rotation: W, from `draw_rotation`. [r, r]
        complement: what becomes of the part outside of the subspace.
        encode: for "sketch", what encodes that part, [*, D] -> [*, K]; such as `sketch.encode` with its sketch.

    Returns:
        In the states' dtype. [*, D], [*, r + K] or [*, r]

    Raises:
        ValueError: shapes that do not fit, states of no floating-point dtype, an unknown `complement`, or an encoder
            that is missing or has no use.

    Source:
        ELSA, arXiv 2601.13824, SS-OP, which keeps the complement.

    Example:
        >>> subspace = torch.eye(3)[:, :2]
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> perturb(torch.tensor([1.0, 2.0, 5.0]), subspace, turn)
        tensor([-2.,  1.,  5.])
        >>> perturb(torch.tensor([1.0, 2.0, 5.0]), subspace, turn, complement="drop")
        tensor([-2.,  1.])
    """
    _require_subspace(subspace, rotation)
    _require_codec(complement, encode, "encode")
    if complement == "keep":
        return _rotate(states, subspace, rotation)
    coordinates = linear(states, _product(subspace, rotation))
    if encode is None:
        return coordinates
    return torch.cat([coordinates, encode(_outside(states, subspace)).to(states.dtype)], -1)


def receive(
    sent: Tensor,
    subspace: Tensor,
    *,
    complement: Complement = "keep",
    decode: Callable[[Tensor], Tensor] | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    r"""The states that whoever does not know the secret computes with: rotated, and of full width again.

    With "keep" they are what was sent. With "drop" the part outside of the subspace becomes that of the mean:

    .. math::
        \hat x = t V^T + (I - V V^T) \mu, \qquad E \lVert \hat x - x Q \rVert^2 = \operatorname{tr}((I - V V^T) C)

    and with "sketch" it is what the decoder makes of it, less its part in the subspace, so that `restore` finds the
    rotated coordinates untouched.

    Args:
        sent: from `perturb`. [*, D], [*, r + K] or [*, r]
        subspace: V, as in `perturb`. [D, r]
        complement: as in `perturb`.
        decode: for "sketch", what decodes the part outside of the subspace, [*, K] -> [*, D]; such as
            `sketch.decode_calibrated` with a decoder for `complement_moments`.
        mean: for "drop", the mean of calibration states; None for zeros. [D]

    Returns:
        In the dtype of `sent`. [*, D]

    Raises:
        ValueError: shapes that do not fit, states of no floating-point dtype, an unknown `complement`, or a decoder or
            mean that is missing or has no use.

    Example:
        >>> mean = torch.tensor([9.0, 9.0, 4.0])
        >>> receive(torch.tensor([-2.0, 1.0]), torch.eye(3)[:, :2], complement="drop", mean=mean)
        tensor([-2.,  1.,  4.])
    """
    _require_subspace(subspace)
    _require_codec(complement, decode, "decode")
    num_hidden, rank = subspace.shape
    if mean is not None and (complement != "drop" or mean.shape != (num_hidden,)):
        raise ValueError(
            f"expected a mean [{num_hidden}], and only where the complement is dropped; got {list(mean.shape)} with "
            f"complement={complement!r}"
        )
    if complement == "keep":
        require_width(sent, num_hidden)
        return sent
    if decode is None:
        bias = None if mean is None else _outside(mean, subspace)
        return linear(sent, subspace.T, bias)
    if sent.ndim < 1 or sent.shape[-1] <= rank:
        raise ValueError(
            f"expected more than {rank} numbers for each state, the coordinates and the sketch; got shape "
            f"{list(sent.shape)}: both ends of a link need the same rank and complement"
        )
    outside = _outside(decode(sent[..., rank:]), subspace)
    return linear(sent[..., :rank], subspace.T) + outside.to(sent.dtype)


def restore(states: Tensor, subspace: Tensor, rotation: Tensor) -> Tensor:
    r"""Turn received states back, before or after what was computed on them: :math:`x Q^T = x + x V (W^T - I) V^T`.

    Args:
        states: from `receive`, or what a model made of them. [*, D]
        subspace: V, as in `perturb`. [D, r]
        rotation: W, that of `perturb` and not its transpose. [r, r]

    Returns:
        In the states' dtype; `restore` of `receive` of `perturb` is the state itself where the complement is kept.
        [*, D]

    Raises:
        ValueError: shapes that do not fit, or states of no floating-point dtype.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> restore(torch.tensor([-2.0, 1.0, 5.0]), torch.eye(3)[:, :2], turn)
        tensor([1., 2., 5.])
    """
    _require_subspace(subspace, rotation)
    return _rotate(states, subspace, rotation.T)


def rotated_moments(mean: Tensor, covariance: Tensor, subspace: Tensor) -> tuple[Tensor, Tensor]:
    r"""Moments of perturbed states to whoever does not know the rotation: the average over all of them.

    With :math:`P = V V^T`:

    .. math::
        \mu' = (I - P) \mu, \qquad
        C' = (I - P) C (I - P) + P\, \frac{\operatorname{tr}(P (C + \mu \mu^T))}{r}

    A decoder that is calibrated for these needs no secret, and gives none away.

    Args:
        mean: of calibration states, from `moments`. [D]
        covariance: of calibration states. [D, D]
        subspace: V. [D, r]

    Returns:
        Mean [D] and covariance [D, D], both in double precision.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> rotated_moments(torch.tensor([1.0, 4.0]), torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)[:, :1])
        (tensor([0., 4.], dtype=torch.float64), tensor([[4., 0.],
                [0., 1.]], dtype=torch.float64))
    """
    outside_mean, outside = complement_moments(mean, covariance, subspace)
    basis = subspace.double()
    inside = ((covariance.double() @ basis) * basis).sum() + (mean.double() @ basis).square().sum()
    return outside_mean, outside + basis @ basis.T * (inside / basis.shape[1])


def complement_moments(mean: Tensor, covariance: Tensor, subspace: Tensor) -> tuple[Tensor, Tensor]:
    r"""Moments of the part outside of the subspace: :math:`(I - P) \mu` and :math:`(I - P) C (I - P)`.

    Args:
        mean: of calibration states, from `moments`. [D]
        covariance: of calibration states. [D, D]
        subspace: V, :math:`P = V V^T`. [D, r]

    Returns:
        Mean [D] and covariance [D, D], both in double precision.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> complement_moments(torch.tensor([1.0, 4.0]), torch.eye(2), torch.eye(2)[:, :1])[0]
        tensor([0., 4.], dtype=torch.float64)
    """
    require_moments(mean, covariance)
    _require_subspace(subspace)
    require_width(mean, subspace.shape[0], "a mean")
    basis = subspace.double()
    rest = _outside(_outside(covariance.double(), basis).T, basis)
    return _outside(mean.double(), basis), rest


def _rotate(states: Tensor, subspace: Tensor, rotation: Tensor) -> Tensor:
    """A sum with what changes, through the subspace: what lies outside of it is not touched by rounding."""
    require_width(states, subspace.shape[0])
    dtype = torch.promote_types(states.dtype, subspace.dtype)
    basis = subspace.to(states.device, dtype)
    change = (rotation - torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)).to(basis)
    wide = states.to(dtype)
    return (wide + wide @ (basis @ change) @ basis.T).to(states.dtype)


def _outside(states: Tensor, subspace: Tensor) -> Tensor:
    """The states less their part in the subspace: [*, D]."""
    require_width(states, subspace.shape[0])
    dtype = torch.promote_types(states.dtype, subspace.dtype)
    basis = subspace.to(states.device, dtype)
    wide = states.to(dtype)
    return (wide - wide @ basis @ basis.T).to(states.dtype)


def _product(subspace: Tensor, rotation: Tensor) -> Tensor:
    return (subspace.double() @ rotation.to(subspace.device).double()).to(subspace.dtype)


def _require_subspace(subspace: Tensor, rotation: Tensor | None = None) -> None:
    if subspace.ndim != 2 or not 1 <= subspace.shape[1] <= subspace.shape[0]:
        raise ValueError(
            f"expected a subspace [D, r] with 1 <= r <= D; got {list(subspace.shape)}: take it from semantic_subspace()"
        )
    rank = subspace.shape[1]
    if rotation is not None and rotation.shape != (rank, rank):
        raise ValueError(
            f"expected a rotation [{rank}, {rank}], as large as the subspace's rank; got {list(rotation.shape)}: draw "
            f"it with rank={rank}"
        )


def _require_codec(complement: str, codec: Callable[[Tensor], Tensor] | None, name: str) -> None:
    if complement not in get_args(Complement):
        raise ValueError(f"expected complement to be one of {', '.join(get_args(Complement))}; got {complement!r}")
    if (codec is None) == (complement == "sketch"):
        found = "none" if codec is None else "one"
        raise ValueError(
            f"expected {name} for complement='sketch', and for no other; got {found} with complement={complement!r}"
        )
