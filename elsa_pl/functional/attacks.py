"""What whoever sees an uplink can read from it: a guess of the token behind each hidden state.

The attacker, a curious edge or a listener on the link, knows what is public: the base model, hence the states of any
public text, and the settings of the link, but no secret. So each attack compares what was *seen* with *public* states
that went through the same encoding as far as the attacker knows it, and answers with the public token that fits best.
They differ in what a secret rotation of the states leaves them to compare:

| attack | compares | is stopped by |
|---|---|---|
| `nearest_neighbours` | the states themselves | a rotation of many directions |
| `complement_attack` | what lies outside of the rotated subspace | a rotation of nearly all directions |
| `alignment_attack` | coordinates along principal directions | few texts, or texts unlike the public ones |
| `signature_attack` | lengths and inner products | nothing that keeps them, as rotations do |
| `procrustes_attack` | the states, turned back by known pairs | too few pairs |
| `refined_attack` | the states, turned back by guesses | too few texts under one rotation |

The last three are in `elsa_pl.functional.rotation_attacks`, and `elsa_pl.functional.inverter` has a trained one, which
takes any of these features in place of the states. `elsa_pl.functional.recovery` scores them all.

Rows are tokens, padding left out. Special tokens are never scored, so no attacker should answer with one. Those that
look states up are given public states without them; those that line texts up keep them, as they are what an attacker
recognises first, and leave them out of the answers (`special`).

Shapes: N seen tokens, M public tokens, K width of what is seen, r rank of the rotated subspace.
"""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

_BLOCK_NUMBERS: Final = 2**24
"""Similarities held at a time: 64 MB in float32."""


def nearest_rows(seen: Tensor, public: Tensor) -> Tensor:
    r"""For each seen state the row of the nearest public one.

    .. math:: \operatorname{argmin}_m \lVert s_n - p_m \rVert^2

    Args:
        seen: states, or features of them. [N, K]
        public: the same of public text. [M, K]

    Returns:
        Row numbers, the same in whatever blocks they are computed. [N]

    Raises:
        ValueError: no finite floating-point matrices of one width, or no rows.

    Example:
        >>> nearest_rows(torch.tensor([[0.9], [4.0]]), torch.tensor([[0.0], [1.0], [3.0]]))
        tensor([1, 2])
    """
    require_pairwise(seen, public)
    dtype = torch.promote_types(torch.promote_types(seen.dtype, public.dtype), torch.float32)
    public = public.to(seen.device, dtype)
    # Around the mean, so that squares of large coordinates that all states share do not hide small differences.
    mean = public.mean(0)
    public = public - mean
    halves = public.square().sum(1) / 2
    block = max(1, _BLOCK_NUMBERS // len(public))
    found = [((rows.to(dtype) - mean) @ public.T - halves).argmax(1) for rows in seen.detach().split(block)]
    return torch.cat(found)


def nearest_neighbours(seen: Tensor, public: Tensor, public_tokens: Tensor) -> Tensor:
    """Guess the token of the nearest public state.

    Args:
        seen: what crossed the link, decoded or not. [N, K]
        public: states of public texts, through the same encoding as far as the attacker knows it. [M, K]
        public_tokens: their token ids. [M]

    Returns:
        Guessed token ids. [N]

    Raises:
        ValueError: no finite floating-point matrices of one width, no rows, or not one token for each public state.

    Source:
        Song and Raghunathan 2020, arXiv 2004.00053, on what embeddings give away.

    Example:
        >>> public = torch.tensor([[0.0], [1.0], [3.0]])
        >>> nearest_neighbours(torch.tensor([[0.9], [4.0]]), public, torch.tensor([7, 8, 9]))
        tensor([8, 9])
    """
    require_public(seen, public, public_tokens)
    return public_tokens.to(seen.device)[nearest_rows(seen, public)]


def complement_attack(seen: Tensor, public: Tensor, public_tokens: Tensor, subspace: Tensor) -> Tensor:
    r"""Leave out the rotated subspace, which is public, and take the nearest neighbour by the rest.

    .. math:: \lVert (s_n - p_m) (I - V V^T) \rVert^2

    Args:
        seen: perturbed states. [N, K]
        public: plain states of public texts. [M, K]
        public_tokens: their token ids. [M]
        subspace: V, orthonormal columns; that of `elsa_pl.functional.perturbation.perturb`. [K, r]

    Returns:
        Guessed token ids. [N]

    Raises:
        ValueError: as `nearest_neighbours`; a subspace of another width, or one that leaves nothing outside.

    Example:
        >>> public = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> complement_attack(torch.tensor([[-9.0, 1.9]]), public, torch.tensor([7, 8]), torch.eye(2)[:, :1])
        tensor([8])
    """
    require_public(seen, public, public_tokens)
    _require_subspace(subspace, seen.shape[1])
    if subspace.shape[1] == subspace.shape[0]:
        raise ValueError(
            f"expected a subspace of rank below {subspace.shape[0]}, the width; got all of it: nothing is left "
            "outside, try signature_attack()"
        )
    return nearest_neighbours(outside(seen, subspace), outside(public, subspace), public_tokens)


def alignment_attack(
    seen: Tensor,
    public: Tensor,
    public_tokens: Tensor,
    subspace: Tensor | None = None,
    *,
    special: Collection[int] = (),
) -> Tensor:
    r"""Lay the principal directions of what is seen on those of public states, then take the nearest neighbour.

    With :math:`E_s, E_p` the eigenvectors of the two covariances by falling variance, and the sign of each direction
    such that means and third moments agree best:

    .. math:: \lVert (s_n - \bar s) E_s \Sigma - (p_m - \bar p) E_p \rVert^2, \qquad \Sigma_{ii} = \pm 1

    Few texts, or texts of another kind, do not have the public ones' covariance: then it fails altogether.

    Args:
        seen: perturbed states, two or more. [N, K]
        public: plain states of public texts, two or more. [M, K]
        public_tokens: their token ids. [M]
        subspace: V, where only that is rotated: the rest is compared as it is. None aligns all directions. [K, r]
        special: ids that are never the answer.

    Returns:
        Guessed token ids. [N]

    Raises:
        ValueError: as `nearest_neighbours`, fewer than two rows, or a subspace of another width.

    Example:
        >>> public = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0], [0.0, 3.0]])
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> alignment_attack(public @ turn, public, torch.tensor([5, 5, 6, 7]))
        tensor([5, 5, 6, 7])
    """
    require_public(seen, public, public_tokens)
    if min(len(seen), len(public)) < 2:
        raise ValueError(
            f"expected two or more states on both sides; got {len(seen)} seen and {len(public)} public: give more texts"
        )
    answers = answering(public_tokens, special)
    if subspace is None:
        turned, target = _aligned(seen, public)
        return nearest_neighbours(turned, target[answers], public_tokens[answers])
    _require_subspace(subspace, seen.shape[1])
    turned, target = _aligned(*(states.double() @ subspace.to(states.device).double() for states in (seen, public)))
    return nearest_neighbours(
        torch.cat([turned, outside(seen, subspace).to(turned)], 1),
        torch.cat([target, outside(public, subspace).to(target)], 1)[answers],
        public_tokens[answers],
    )


def answering(public_tokens: Tensor, special: Collection[int]) -> Tensor:
    """Which public tokens may be answers: all but the special ones.

    Raises:
        ValueError: none are left.

    Example:
        >>> answering(torch.tensor([101, 7, 102]), [101, 102])
        tensor([False,  True, False])
    """
    answers = ~torch.isin(public_tokens, torch.tensor(sorted(special), dtype=torch.long, device=public_tokens.device))
    if not answers.any():
        raise ValueError(
            f"expected public tokens besides the special ones; got {len(public_tokens)}, all of them special: give"
            " other texts"
        )
    return answers


def outside(states: Tensor, subspace: Tensor) -> Tensor:
    """The states less their part in the subspace, in at least float32: [N, K]."""
    wide = states.detach().to(torch.promote_types(states.dtype, torch.float32))
    basis = subspace.to(wide)
    return wide - wide @ basis @ basis.T


def _aligned(seen: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of both along their own principal directions, signs agreed: [N, K], [M, K] -> [N, k], [M, k]."""
    rank = min(seen.shape[1], len(seen) - 1, len(public) - 1)
    coordinates, moments = [], []
    for states in (seen, public):
        wide = states.detach().to(public.device).double()
        centred = wide - wide.mean(0)
        directions = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :rank]
        along = centred @ directions
        spread = along.square().mean(0).sqrt()
        unit = torch.where(spread > 0, spread, 1)
        coordinates.append(along.float())
        moments.append(torch.stack([wide.mean(0) @ directions / unit, (along / unit).pow(3).mean(0)]))
    signs = torch.where((moments[0] * moments[1]).sum(0) < 0, -1, 1)
    return coordinates[0] * signs, coordinates[1]


def require_public(seen: Tensor, public: Tensor, public_tokens: Tensor) -> None:
    """Raise ValueError unless both are finite matrices of one width, with a token for each public row."""
    require_pairwise(seen, public)
    if public_tokens.shape != (len(public),) or public_tokens.is_floating_point():
        raise ValueError(
            f"expected a token id for each of {len(public)} public states; got {public_tokens.dtype} "
            f"{list(public_tokens.shape)}: flatten batch and tokens of both in one way"
        )


def require_pairwise(seen: Tensor, public: Tensor, what: str = "public states") -> None:
    """Raise ValueError unless both are finite matrices of one width, with rows."""
    require_rows(seen, "seen states")
    require_rows(public, what)
    if seen.shape[1] != public.shape[1]:
        raise ValueError(
            f"expected seen states and {what} of one width; got {seen.shape[1]} and {public.shape[1]}: encode public "
            "texts as the link does"
        )


def require_rows(states: Tensor, what: str) -> None:
    """Raise ValueError unless the states are a finite floating-point matrix with rows."""
    if states.ndim != 2 or not states.is_floating_point() or not states.numel():
        raise ValueError(
            f"expected floating-point {what} [N, K], a row for each token and at least one; got {states.dtype} "
            f"{list(states.shape)}: give texts, and flatten batch and tokens, leaving out the padding"
        )
    if not states.isfinite().all():
        bad = int((~states.isfinite()).any(1).sum())
        raise ValueError(f"expected finite {what}; got nan or inf in {bad} of {len(states)}: leave these out")


def _require_subspace(subspace: Tensor, width: int) -> None:
    if subspace.ndim != 2 or subspace.shape[0] != width or not 1 <= subspace.shape[1] <= width:
        raise ValueError(
            f"expected a subspace [{width}, r] with 1 <= r <= {width}; got {list(subspace.shape)}: take it from "
            "semantic_subspace() at the same cut"
        )
