"""An attacker who tries texts out: whoever knows the front can encode any text, and compare with what was seen.

Where a state stands for many tokens, no single token can be looked up. But a guess of the whole text can be checked,
and bettered token by token.

Shapes: B texts, T tokens, C candidates, any * of what is seen of a text.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def search_attack(
    seen: Tensor,
    encode: Callable[[Tensor], Tensor],
    candidates: Tensor,
    free: Tensor,
    num_sweeps: int = 2,
) -> Tensor:
    r"""Descend by coordinates: at each place in turn take the candidate whose text is encoded nearest to what was seen.

    .. math::
        w_t \leftarrow \operatorname{argmin}_{c \in \{w_t\} \cup C_t} \lVert f(w_1 \dots c \dots w_T) - s \rVert^2

    Args:
        seen: s. [B, *]
        encode: f, from token ids [B, T] to what would be seen of them [B, *].
        candidates: of each token, of which the first is where the search starts. [B, T, C]
        free: which tokens are guessed; the others, such as padding and those known, stay the first candidate. [B, T]
        num_sweeps: times that each place has its turn; it ends when nothing changes.

    Returns:
        Guessed token ids. [B, T]

    Raises:
        ValueError: shapes that do not fit, or no sweeps.

    Source:
        Coordinate descent; white-box inversion by search as in Song and Raghunathan 2020, arXiv 2004.00053, there over
        relaxed tokens.

    Example:
        >>> candidates = torch.tensor([[[0, 3, 5], [0, 3, 5]]])
        >>> both = torch.ones(1, 2, dtype=torch.bool)
        >>> search_attack(torch.tensor([[8.0]]), lambda ids: ids.sum(1, keepdim=True), candidates, both)
        tensor([[5, 3]])
    """
    if candidates.ndim != 3 or free.shape != candidates.shape[:2] or len(seen) != len(free) or num_sweeps < 1:
        raise ValueError(
            f"expected candidates [B, T, C], free [B, T], seen [B, *] and at least one sweep; got"
            f" {list(candidates.shape)}, {list(free.shape)}, {list(seen.shape)} and {num_sweeps}"
        )
    target = seen.flatten(1).double()

    def distances(ids: Tensor) -> Tensor:
        return (encode(ids).flatten(1).double() - target).square().sum(1)

    guessed = candidates[..., 0].clone()
    nearest = distances(guessed)
    for _ in range(num_sweeps):
        before = guessed.clone()
        for place in range(guessed.shape[1]):
            if not free[:, place].any():
                continue
            for candidate in candidates[:, place].unbind(1):
                trial = guessed.clone()
                trial[:, place] = torch.where(free[:, place], candidate, trial[:, place])
                tried = distances(trial)
                better = tried < nearest
                guessed[better], nearest[better] = trial[better], tried[better]
        if torch.equal(guessed, before):
            break
    return guessed
