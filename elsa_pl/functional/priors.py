"""What an attacker knows of a text's tokens without seeing a state: where each stands, and how long the text is.

Texts of a kind begin and end alike: the first word of a question, the mark at its end. Encryption hides neither, since
lengths travel beside what is sealed, as the attention mask. So this is the floor that attackers are to be measured by,
and what those that see little fall back on.

Shapes: N tokens of private texts, M tokens of public ones, U different places, C tokens that occur in public text.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_WEIGHT = 1.0
"""Of the wider count in a narrower one, in tokens."""


class Prior(NamedTuple):
    """How likely tokens are at places.

    Attributes:
        tokens: the different public tokens, by rising id. [C]
        log_shares: log-probabilities. [U, C]
        rows: the row of each token's place in `log_shares`. [N]
    """

    tokens: Tensor
    log_shares: Tensor
    rows: Tensor


def token_prior(positions: Tensor, lengths: Tensor, public: tuple[Tensor, Tensor], public_tokens: Tensor) -> Prior:
    r"""Shares of tokens at a position of texts of a length, smoothed by those of texts of any length.

    With counts :math:`c(w)` among all n tokens of a kind, each is smoothed by the next wider one:

    .. math::
        p(w \mid t, l) = \frac{c_{t,l}(w) + \alpha \, [p(w \mid t) + p(w \mid l - t)] / 2}{n_{t,l} + \alpha}, \qquad
        p(w \mid t) = \frac{c_t(w) + \alpha \, p(w)}{n_t + \alpha}

    where :math:`l - t` counts from the end, and :math:`\alpha = 1`.

    Args:
        positions: t, of each token in its text. [N]
        lengths: l, of its text as far as anyone sees; the same everywhere where it is hidden. [N]
        public: positions and lengths of public tokens. [M] each
        public_tokens: their ids. [M]

    Returns:
        The likeliest at each place is what whoever sees nothing guesses: see `likeliest`.

    Raises:
        ValueError: tensors that are no whole numbers or of unlike lengths, or no public tokens.

    Source:
        Jelinek and Mercer 1980; of smoothing counts by wider ones, Witten and Bell 1991.

    Example:
        >>> public = torch.tensor([0, 1, 0, 1]), torch.tensor([2, 2, 2, 2])
        >>> likeliest(token_prior(torch.tensor([1, 0]), torch.tensor([2, 2]), public, torch.tensor([7, 8, 7, 9])))
        tensor([8, 7])
    """
    for name, group in (("private", (positions, lengths)), ("public", (*public, public_tokens))):
        if any(given.ndim != 1 or given.is_floating_point() or len(given) != len(group[0]) for given in group):
            raise ValueError(
                f"expected positions, lengths and tokens of {name} texts as whole numbers, one for each token; got"
                f" {', '.join(f'{given.dtype} {list(given.shape)}' for given in group)}"
            )
    if not len(public_tokens):
        raise ValueError("expected public tokens; got none: give more public texts")
    tokens, classes = public_tokens.unique(return_inverse=True)
    own, theirs = torch.stack([positions, lengths], 1), torch.stack(public, 1)
    own_places, rows = own.unique(dim=0, return_inverse=True)
    everywhere = classes.bincount(minlength=len(tokens)) / len(classes)

    def shares(keys: Tensor, asked: Tensor, wider: Tensor) -> Tensor:
        """Of the classes with each asked key, smoothed: [U, C]."""
        different, number = torch.cat([asked, keys]).unique(return_inverse=True)
        counts = torch.zeros(len(different), len(tokens)).index_put_(
            (number[len(asked) :], classes), torch.ones(()), accumulate=True
        )[number[: len(asked)]]
        return (counts + _WEIGHT * wider) / (counts.sum(1, keepdim=True) + _WEIGHT)

    by_position = shares(theirs[:, 0], own_places[:, 0], everywhere)
    by_end = shares(theirs[:, 1] - theirs[:, 0], own_places[:, 1] - own_places[:, 0], everywhere)
    span = int(torch.cat([own, theirs]).max()) + 1
    keys, asked = (places[:, 0] * span + places[:, 1] for places in (theirs, own_places))
    return Prior(tokens, shares(keys, asked, (by_position + by_end) / 2).log(), rows)


def likeliest(prior: Prior) -> Tensor:
    """The likeliest token at each place: [N]."""
    return prior.tokens[prior.log_shares.argmax(1)][prior.rows]
