r"""What whoever sees an uplink can read from it: a guess of the token behind each hidden state.

The attacker, a curious edge or a listener on the link, knows what is public: the base model, hence the states of any
public text, and the settings of the link, but no secret. So each attack here compares what was *seen* with *public*
states that went through the same encoding as far as the attacker knows it, and answers with the public token that fits
best. They differ in what a secret rotation of the states leaves them to compare:

    nearest_neighbours   the states themselves             anything but a rotation
    complement_attack    what lies outside of the rotated subspace
    alignment_attack     the spectrum of many states       where variances differ from direction to direction
    signature_attack     lengths and inner products        any rotation, as it keeps them
    procrustes_attack    the states, turned back           known pairs of seen and public states
    refined_attack       the states, turned back           another attack's guesses, a part of them right

The last is the strongest: no pair is known, yet guesses from signatures are right often enough to find the rotation,
once it has been used for some dozens of texts. A rotation alone therefore hides very little, however large the
subspace. `inverter_attack`, in a module of its own, is trained; it takes any of these features in place of the states.

Rows are tokens, padding left out: with ``mask`` [B, T], states are ``states[mask]`` and texts ``mask.nonzero()[:, 0]``.
Special tokens stay among the rows, as they are what an attacker recognises first; `recovery` leaves them out.

Shapes: N seen tokens, M public tokens, P known pairs, K width of what is seen, r rank of the rotated subspace.
"""

from typing import Final

import torch
from torch import Tensor

_BLOCK_NUMBERS: Final = 2**24
"""Similarities held at a time: 64 MB in float32."""

_FIRST_RANK: Final = 16
"""Directions in which `refined_attack` first turns states back; guesses half wrong determine about as many."""


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
    _require_states(seen, public)
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
        >>> nearest_neighbours(torch.tensor([[0.9], [4.0]]), torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([7, 8, 9]))
        tensor([8, 9])
    """
    _require_public(seen, public, public_tokens)
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
    _require_public(seen, public, public_tokens)
    _require_subspace(subspace, seen.shape[1])
    if subspace.shape[1] == subspace.shape[0]:
        raise ValueError(
            f"expected a subspace of rank below {subspace.shape[0]}, the width; got all of it: nothing is left outside, "
            "try signature_attack()"
        )
    return nearest_neighbours(_outside(seen, subspace), _outside(public, subspace), public_tokens)


def alignment_attack(
    seen: Tensor, public: Tensor, public_tokens: Tensor, subspace: Tensor | None = None
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
    _require_public(seen, public, public_tokens)
    if min(len(seen), len(public)) < 2:
        raise ValueError(
            f"expected two or more states on both sides; got {len(seen)} seen and {len(public)} public: give more texts"
        )
    if subspace is None:
        return nearest_neighbours(*_aligned(seen, public), public_tokens)
    _require_subspace(subspace, seen.shape[1])
    turned, target = _aligned(*(states @ subspace.to(states) for states in (seen, public)))
    return nearest_neighbours(
        torch.cat([turned, _outside(seen, subspace).to(turned)], 1),
        torch.cat([target, _outside(public, subspace).to(target)], 1),
        public_tokens,
    )


def signatures(states: Tensor, texts: Tensor) -> Tensor:
    r"""What no rotation changes: each state's length, and its inner products with states that anyone recognises.

    .. math:: \Bigl[ \lVert x \rVert,\; \langle x, a_1 \rangle, \dots, \langle x, a_6 \rangle \Bigr]

    The anchors are the first and the last token of the same text, which are [CLS] and [SEP] in BERT, the tokens before
    and after this one, and the means of first and last tokens over all texts. They are entries of the text's Gram
    matrix, which a rotation keeps, but for the means; so these need texts under one rotation.

    Args:
        states: [N, K]
        texts: the text that each row belongs to, as rising numbers; rows of a text in reading order. [N]

    Returns:
        0 for the neighbour that the ends of a text lack. In at least float32. [N, 7]

    Raises:
        ValueError: no finite floating-point matrix, no rows, or numbers of texts that do not fit or fall.

    Example:
        >>> states, texts = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 0])
        >>> signatures(states, texts)
        tensor([[ 5., 25.,  8.,  0.,  3., 25.,  8.],
                [ 1.,  3.,  0.,  3.,  0.,  3.,  0.],
                [ 2.,  8.,  4.,  0.,  0.,  8.,  4.]])
    """
    _require_matrix(states, "states")
    _require_texts(texts, len(states))
    wide = states.detach().to(torch.promote_types(states.dtype, torch.float32))
    _, text, lengths = texts.to(wide.device).unique_consecutive(return_inverse=True, return_counts=True)
    ends = lengths.cumsum(0) - 1
    firsts, lasts = wide[ends - lengths + 1], wide[ends]
    following = (wide[:-1] * wide[1:]).sum(1).masked_fill(text[:-1] != text[1:], 0)
    nothing = wide.new_zeros(1)
    return torch.stack(
        [
            wide.norm(dim=1),
            (wide * firsts[text]).sum(1),
            (wide * lasts[text]).sum(1),
            torch.cat([nothing, following]),
            torch.cat([following, nothing]),
            wide @ firsts.mean(0),
            wide @ lasts.mean(0),
        ],
        1,
    )


def signature_attack(
    seen: Tensor, seen_texts: Tensor, public: Tensor, public_texts: Tensor, public_tokens: Tensor
) -> Tensor:
    """Compare lengths and inner products, which a rotation keeps, each in units of its spread in public text.

    It needs neither the subspace nor a pair, and a single text will do.

    Args:
        seen: perturbed states. [N, K]
        seen_texts: the text of each row, as `signatures` takes it. [N]
        public: plain states of public texts, of any width. [M, *]
        public_texts: the text of each. [M]
        public_tokens: the token id of each. [M]

    Returns:
        Guessed token ids. [N]

    Raises:
        ValueError: as `signatures`, or not one token for each public state.

    Example:
        >>> public, texts = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 0])
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> signature_attack(public @ turn, texts, public, texts, torch.tensor([101, 7, 102]))
        tensor([101,   7, 102])
    """
    known = signatures(public, public_texts)
    found = signatures(seen, seen_texts).to(known)
    spread = known.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1)
    return nearest_neighbours(found / spread, known / spread, public_tokens).to(seen.device)


def common_directions(seen: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    r"""Directions that correspond in pairs of states, of which one is the other, rotated.

    From :math:`S^T P = A \Sigma B^T`: among orthogonal matrices :math:`A B^T` has the least
    :math:`\lVert S R - P \rVert`. Fewer pairs than directions leave the others open, and those are not returned.

    Args:
        seen: S. [P, K]
        public: P, row by row the same tokens. [P, K]

    Returns:
        A and B, orthonormal columns, those that agree most first; ``seen @ A`` lies at ``public @ B``. [K, k] each

    Raises:
        ValueError: no finite floating-point matrices of one shape, no pairs, or pairs of zeros only.

    Source:
        Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".

    Example:
        >>> seen, public = torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[2.0, 0.0, 0.0]])
        >>> left, right = common_directions(seen, public)
        >>> left.shape, torch.allclose(seen @ left, public @ right)
        (torch.Size([3, 1]), True)
    """
    _require_states(seen, public, "public states of the pairs")
    if len(seen) != len(public):
        raise ValueError(
            f"expected pairs of a seen and a public state; got {len(seen)} and {len(public)}: row by row the same tokens"
        )
    dtype = torch.promote_types(torch.promote_types(seen.dtype, public.dtype), torch.float32)
    cross = seen.detach().double().T @ public.detach().to(seen.device).double()
    left, strengths, right = torch.linalg.svd(cross)
    # Pairs are known in their own precision, and their products lose half of its digits once more.
    rank = int((strengths > strengths[0] * max(cross.shape) * torch.finfo(dtype).eps).sum())
    if not rank:
        raise ValueError("expected pairs of states that are not all 0: give other pairs")
    return left[:, :rank].to(dtype), right[:rank].T.to(dtype)


def procrustes_attack(
    seen: Tensor, public: Tensor, public_tokens: Tensor, known_seen: Tensor, known_public: Tensor
) -> Tensor:
    """Find the rotation from known pairs, turn what is seen back, and take the nearest neighbour.

    Where there are fewer pairs than directions, states are compared in those that the pairs determine; of the rest only
    its length counts, which the rotation keeps.

    Args:
        seen: perturbed states. [N, K]
        public: plain states of public texts. [M, K]
        public_tokens: their token ids. [M]
        known_seen: perturbed states whose plain ones are known, such as those of texts that a client is known to have,
            or means over the first tokens. [P, K]
        known_public: the plain ones. [P, K]

    Returns:
        Guessed token ids. [N]

    Raises:
        ValueError: as `nearest_neighbours` and `common_directions`.

    Example:
        >>> public, turn = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> procrustes_attack(public @ turn, public, torch.tensor([7, 8]), public[:1] @ turn, public[:1])
        tensor([7, 8])
    """
    _require_public(seen, public, public_tokens)
    _require_states(known_seen, seen, "seen states")
    left, right = common_directions(known_seen, known_public)
    return nearest_neighbours(_coordinates(seen, left), _coordinates(public, right), public_tokens)


def refined_attack(seen: Tensor, public: Tensor, public_tokens: Tensor, guesses: Tensor) -> Tensor:
    """Take another attack's guesses for known pairs, and better guesses from these, in ever more directions.

    Each seen state is paired with the mean public state of the token guessed for it. Wrong guesses point everywhere and
    right ones all one way, so the directions that agree most are right long before all others are: the first round
    looks at 16, and each one after it at twice as many.

    Args:
        seen: perturbed states, all of them by one rotation. [N, K]
        public: plain states of public texts. [M, K]
        public_tokens: their token ids. [M]
        guesses: of another attack, such as `signature_attack`. Those of tokens that are not public do not count. [N]

    Returns:
        Guessed token ids. [N]

    Raises:
        ValueError: as `nearest_neighbours`, not one guess for each seen state, or no guess of a public token.

    Source:
        Iterated closest points (Besl and McKay 1992), from coarse to fine; Grave et al. 2018, arXiv 1805.11222, align
        embeddings of two languages in this way.

    Example:
        >>> public, turn = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> refined_attack(public @ turn, public, torch.tensor([7, 8]), torch.tensor([7, 7]))
        tensor([7, 8])
    """
    _require_public(seen, public, public_tokens)
    if guesses.shape != (len(seen),) or guesses.is_floating_point():
        raise ValueError(
            f"expected a guess for each of {len(seen)} seen states, as token ids; got {guesses.dtype} "
            f"{list(guesses.shape)}: take them from another attack on the same rows"
        )
    tokens, token, counts = public_tokens.to(seen.device).unique(return_inverse=True, return_counts=True)
    public = public.detach().to(seen.device, torch.promote_types(public.dtype, torch.float32))
    means = public.new_zeros(len(tokens), public.shape[1]).index_add_(0, token, public) / counts[:, None]
    guesses, width = guesses.to(seen.device), seen.shape[1]
    rank = min(_FIRST_RANK, width)
    while True:
        known = torch.isin(guesses, tokens)
        if not known.any():
            raise ValueError("expected guesses of tokens that occur in public text; got none: guess by another attack")
        target = means[torch.searchsorted(tokens, guesses[known])]
        left, right = common_directions(seen[known], target)
        guesses = nearest_neighbours(
            _coordinates(seen, left[:, :rank]), _coordinates(public, right[:, :rank]), public_tokens
        )
        if rank == width:
            return guesses
        rank = min(2 * rank, width)


def _coordinates(states: Tensor, directions: Tensor) -> Tensor:
    """Coordinates along orthonormal directions and the length of what lies outside of them: [N, K] -> [N, k + 1]."""
    wide = states.detach().to(torch.promote_types(states.dtype, directions.dtype))
    directions = directions.to(wide)
    return torch.cat([wide @ directions, _outside(wide, directions).norm(dim=1, keepdim=True)], 1)


def _outside(states: Tensor, subspace: Tensor) -> Tensor:
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


def _require_public(seen: Tensor, public: Tensor, public_tokens: Tensor) -> None:
    _require_states(seen, public)
    if public_tokens.shape != (len(public),) or public_tokens.is_floating_point():
        raise ValueError(
            f"expected a token id for each of {len(public)} public states; got {public_tokens.dtype} "
            f"{list(public_tokens.shape)}: flatten batch and tokens of both in one way"
        )


def _require_states(seen: Tensor, public: Tensor, what: str = "public states") -> None:
    _require_matrix(seen, "seen states")
    _require_matrix(public, what)
    if seen.shape[1] != public.shape[1]:
        raise ValueError(
            f"expected seen states and {what} of one width; got {seen.shape[1]} and {public.shape[1]}: encode public "
            "texts as the link does"
        )


def _require_matrix(states: Tensor, what: str) -> None:
    if states.ndim != 2 or not states.is_floating_point() or not states.numel():
        raise ValueError(
            f"expected floating-point {what} [N, K], a row for each token and at least one; got {states.dtype} "
            f"{list(states.shape)}: give texts, and flatten batch and tokens, leaving out the padding"
        )
    if not states.isfinite().all():
        bad = int((~states.isfinite()).any(1).sum())
        raise ValueError(f"expected finite {what}; got nan or inf in {bad} of {len(states)}: leave these out")


def _require_texts(texts: Tensor, count: int) -> None:
    if texts.shape != (count,) or texts.is_floating_point() or (texts.diff() < 0).any():
        raise ValueError(
            f"expected the text of each of {count} rows, as rising whole numbers; got {texts.dtype} "
            f"{list(texts.shape)}, {'falling' if texts.ndim == 1 and (texts.diff() < 0).any() else 'of another shape'}: "
            "keep rows in reading order, a text after the other"
        )


def _require_subspace(subspace: Tensor, width: int) -> None:
    if subspace.ndim != 2 or subspace.shape[0] != width or not 1 <= subspace.shape[1] <= width:
        raise ValueError(
            f"expected a subspace [{width}, r] with 1 <= r <= {width}; got {list(subspace.shape)}: take it from "
            "semantic_subspace() at the same cut"
        )
