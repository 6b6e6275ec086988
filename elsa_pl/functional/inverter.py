"""A trained attacker: a small classifier from hidden states to tokens.

A nearest neighbour weighs all coordinates alike; a classifier finds those that tell tokens apart. It is trained on
public text alone, and only for tokens that occur in it, so a vocabulary of 30,000 costs no more than the text does.

Shapes: N seen tokens, M public tokens, K width, C tokens that occur in public text, H hidden.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_pl.functional.attacks import require_public

_BATCH: Final = 256
_PATIENCE: Final = 2
"""Epochs without a better loss on the part held out, after which training ends."""


def inverter_attack(
    seen: Tensor,
    public: Tensor,
    public_tokens: Tensor,
    *,
    num_guesses: int = 1,
    num_hidden: int = 0,
    max_epochs: int = 20,
    learning_rate: float = 3e-3,
    held_out: float = 0.1,
    seed: int = 0,
) -> Tensor:
    r"""Train a classifier of tokens on public states, and apply it to what was seen.

    With coordinates z in units of their spread in public text, trained by Adam on the cross entropy:

    .. math::
        \operatorname{argmax}_c \bigl( \phi(z) W + b \bigr)_c, \qquad
        \phi(z) = z \text{ or } \operatorname{relu}(z U + a)

    Of all epochs the one of least loss on the part held out counts. Against a rotation give it what that keeps, the
    `signatures` or the part outside of the subspace, or public states under many rotations of the attacker's own.

    Args:
        seen: what crossed the link, or features of it. [N, K]
        public: the same of public texts. [M, K]
        public_tokens: their token ids. [M]
        num_guesses: of each token, the likeliest first; at most as many as there are public tokens.
        num_hidden: H of one hidden layer; 0 for a linear classifier, which needs less public text.
        max_epochs: at least 1.
        learning_rate: above 0.
        held_out: share of the public states that decide when to stop, above 0 and below 1; at least one and never all.
        seed: of initial weights and of the order of states. The global generator is not touched.

    Returns:
        Guessed token ids: [N], or [N, `num_guesses`] if there are several.

    Raises:
        ValueError: as `elsa_pl.functional.attacks.nearest_neighbours`, fewer than two public states, or a setting
            outside its range.

    Source:
        Song and Raghunathan 2020, arXiv 2004.00053 (white-box and black-box inversion of embeddings).

    Example:
        >>> public = torch.tensor([[-1.0], [-0.9], [1.0], [0.9]]).repeat(20, 1)
        >>> inverter_attack(torch.tensor([[-2.0], [2.0]]), public, torch.tensor([7, 7, 8, 8]).repeat(20))
        tensor([7, 8])
    """
    require_public(seen, public, public_tokens)
    if len(public) < 2:
        raise ValueError(f"expected two or more public states; got {len(public)}: give more public text")
    if num_guesses < 1 or num_hidden < 0 or max_epochs < 1 or not learning_rate > 0 or not 0 < held_out < 1:
        raise ValueError(
            "expected num_guesses >= 1, num_hidden >= 0, max_epochs >= 1, learning_rate > 0 and 0 < held_out < 1; got "
            f"{num_guesses}, {num_hidden}, {max_epochs}, {learning_rate} and {held_out}"
        )
    # An audit may run within validation, where autograd is off; tensors made there cannot be trained on.
    with torch.inference_mode(False), torch.enable_grad():
        tokens, classes = public_tokens.to(public.device).clone().unique(return_inverse=True)
        known = public.detach().float().clone()
        mean, spread = known.mean(0), known.std(0, correction=0)
        spread = torch.where(spread > 0, spread, 1)
        known = (known - mean) / spread
        found = (seen.detach().to(known).clone() - mean) / spread
        generator = torch.Generator().manual_seed(seed)
        weights = _initial(known, classes, num_hidden, generator)
        weights = _trained(weights, known, classes, max_epochs, learning_rate, held_out, generator)
        with torch.no_grad():
            count = min(num_guesses, len(tokens))
            guesses = [_logits(rows, weights).topk(count).indices for rows in found.split(_BATCH)]
        found_tokens: Tensor = tokens[torch.cat(guesses)].to(seen.device)
    return found_tokens[:, 0] if num_guesses == 1 else found_tokens


def _initial(known: Tensor, classes: Tensor, num_hidden: int, generator: torch.Generator) -> list[Tensor]:
    """W, b and, with a hidden layer, U, a before them. Before training, each token is as likely as it is frequent."""
    width, counts = known.shape[1], classes.bincount().to(known)
    hidden: list[Tensor] = []
    if num_hidden:
        draws = torch.randn(width, num_hidden, generator=generator).to(known)
        hidden = [draws * (2 / width) ** 0.5, known.new_zeros(num_hidden)]
    return [*hidden, known.new_zeros(num_hidden or width, len(counts)), (counts / counts.sum()).log()]


def _logits(rows: Tensor, weights: list[Tensor]) -> Tensor:
    *hidden, weight, bias = weights
    if hidden:
        rows = torch.relu(torch.addmm(hidden[1], rows, hidden[0]))
    return torch.addmm(bias, rows, weight)


def _trained(
    weights: list[Tensor],
    known: Tensor,
    classes: Tensor,
    max_epochs: int,
    learning_rate: float,
    held_out: float,
    generator: torch.Generator,
) -> list[Tensor]:
    """The weights of the epoch that does best on the part held out."""
    order = torch.randperm(len(known), generator=generator).to(known.device)
    num_held = min(max(1, round(held_out * len(known))), len(known) - 1)
    held, rest = order[:num_held], order[num_held:]
    weights = [weight.requires_grad_() for weight in weights]
    optimizer = torch.optim.Adam(weights, learning_rate)
    best, least, waited = weights, float("inf"), 0
    for _ in range(max_epochs):
        for rows in rest[torch.randperm(len(rest), generator=generator).to(rest.device)].split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(_logits(known[rows], weights), classes[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            losses = [
                F.cross_entropy(_logits(known[rows], weights), classes[rows], reduction="sum").item()
                for rows in held.split(_BATCH)
            ]
        if sum(losses) < least:
            best, least, waited = [weight.detach().clone() for weight in weights], sum(losses), 0
        else:
            waited += 1
            if waited == _PATIENCE:
                break
    return best
