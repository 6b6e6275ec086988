"""Attacks on rotated states: what a rotation keeps tells tokens apart, and then the rotation itself is found.

A rotation keeps the length of each state and its inner products with others. Some of these others anyone recognises,
such as [CLS] and [SEP], so their inner products with a token are a *signature* of it that no rotation hides. Pairs of
a seen and a public state, known or guessed, give the rotation by a singular value decomposition.

    seen --signature_attack--> guesses --refined_attack--> rotation in 16, 32, ... directions --> better guesses
                                                  ^                                                   |
                                                  +---------------------------------------------------+

Guesses from signatures are right often enough for that once a rotation is used for some dozens of texts, and one that
changes with each text still leaves the signatures. So a rotation hides little by itself, however large the subspace:
something must be lost besides. Of tokens of TREC questions, MiniLM after its first block with all 384 directions
rotated, and 1,000 other questions of TREC, or of BANKING77, as public text:

| texts under one rotation | signatures | refined | cap |
|---|---|---|---|
| 1 | 48%, 33% | 48%, 33% | 83%, 62% |
| 4 | 53%, 38% | 56%, 38% | 81%, 63% |
| 16 | 55%, 39% | 60%, 45% | 84%, 64% |
| 64 | 55%, 41% | 82%, 52% | 84%, 64% |
| 200 | 56%, 40% | 84%, 57% | 84%, 64% |

Rows are tokens, padding left out: with ``mask`` [B, T], states are ``states[mask]`` and texts ``mask.nonzero()[:, 0]``.

Shapes: N seen tokens, M public tokens, P known pairs, K width of what is seen.
"""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from elsa_pl.functional.attacks import (
    answering,
    nearest_neighbours,
    outside,
    require_pairwise,
    require_public,
    require_rows,
)

_FIRST_RANK: Final = 16
"""Directions in which `refined_attack` first turns states back; guesses half wrong determine about as many."""


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
    require_rows(states, "states")
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
    seen: Tensor,
    seen_texts: Tensor,
    public: Tensor,
    public_texts: Tensor,
    public_tokens: Tensor,
    *,
    special: Collection[int] = (),
) -> Tensor:
    """Compare lengths and inner products, which a rotation keeps, each in units of its spread in public text.

    It needs neither the subspace nor a pair, and a single text will do.

    Args:
        seen: perturbed states. [N, K]
        seen_texts: the text of each row, as `signatures` takes it. [N]
        public: plain states of public texts, of any width. [M, *]
        public_texts: the text of each. [M]
        public_tokens: the token id of each. [M]
        special: ids that are never the answer.

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
    require_public(found, known, public_tokens)
    answers = answering(public_tokens, special)
    return nearest_neighbours(found / spread, (known / spread)[answers], public_tokens[answers]).to(seen.device)


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
    require_rows(seen, "seen states of the pairs")
    require_pairwise(seen, public, "public states of the pairs")
    if len(seen) != len(public):
        raise ValueError(
            f"expected pairs of a seen and a public state; got {len(seen)} and {len(public)}: give both of the same "
            "tokens, row by row"
        )
    dtype = torch.promote_types(torch.promote_types(seen.dtype, public.dtype), torch.float32)
    cross = seen.detach().double().T @ public.detach().to(seen.device).double()
    left, strengths, right = torch.linalg.svd(cross)
    # What two equal states differ by is rounding, on both sides of a product.
    rounding = max(torch.finfo(states.dtype).eps for states in (seen, public)) ** 2
    rank = int((strengths > strengths[0] * len(cross) * max(rounding, torch.finfo(cross.dtype).eps)).sum())
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
    require_public(seen, public, public_tokens)
    left, right = common_directions(known_seen, known_public)
    if len(left) != seen.shape[1]:
        raise ValueError(
            f"expected pairs of states of width {seen.shape[1]}, as those seen; got {len(left)}: take both from one "
            "link"
        )
    return nearest_neighbours(_coordinates(seen, left), _coordinates(public, right), public_tokens)


def refined_attack(
    seen: Tensor, public: Tensor, public_tokens: Tensor, guesses: Tensor, *, special: Collection[int] = ()
) -> Tensor:
    """Take another attack's guesses for known pairs, and better guesses from these, in ever more directions.

    Each seen state is paired with the mean public state of the token guessed for it. Wrong guesses point everywhere and
    right ones all one way, so the directions that agree most are right long before all others are: the first round
    looks at 16, and each one after it at twice as many.

    Args:
        seen: perturbed states, all of them by one rotation. [N, K]
        public: plain states of public texts. [M, K]
        public_tokens: their token ids. [M]
        guesses: of another attack, such as `signature_attack`. Those of tokens that are not public do not count. [N]
        special: ids that are never the answer; on the way to it they are, as pairs that are easily right.

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
    require_public(seen, public, public_tokens)
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
        answers = answering(public_tokens, special if rank == width else ())
        known = torch.isin(guesses, tokens)
        if not known.any():
            raise ValueError("expected guesses of tokens that occur in public text; got none: guess by another attack")
        target = means[torch.searchsorted(tokens, guesses[known])]
        left, right = common_directions(seen[known], target)
        guesses = nearest_neighbours(
            _coordinates(seen, left[:, :rank]),
            _coordinates(public, right[:, :rank])[answers],
            public_tokens[answers],
        )
        if rank == width:
            return guesses
        rank = min(2 * rank, width)


def _coordinates(states: Tensor, directions: Tensor) -> Tensor:
    """Coordinates along orthonormal directions and the length of what lies outside of them: [N, K] -> [N, k + 1]."""
    wide = states.detach().to(torch.promote_types(states.dtype, directions.dtype))
    directions = directions.to(wide)
    return torch.cat([wide @ directions, outside(wide, directions).norm(dim=1, keepdim=True)], 1)


def _require_texts(texts: Tensor, count: int) -> None:
    if texts.shape != (count,) or texts.is_floating_point():
        raise ValueError(
            f"expected the text of each of {count} rows, as whole numbers; got {texts.dtype} {list(texts.shape)}: take "
            "both by one mask"
        )
    if (texts.diff() < 0).any():
        raise ValueError("expected rows in reading order, one text after the other; got texts whose numbers fall")
