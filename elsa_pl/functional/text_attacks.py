"""Attackers that see a whole text at once, where several of its tokens share a state.

Of one state for many tokens, an attacker who looks at that state alone learns little. But an edge gets all states of a
text, and they say together what the text is about; public texts that are about the same have words in common with it.
So each token is guessed from all the states of its text and from its position. Where every token has a state of its
own, that one tells more than all the others add, and the attackers of `elsa_pl.functional.attacks` are the ones to use.

Shapes: B private texts, P public texts, K numbers of all states of a text, N private tokens, M public tokens, C tokens
that are guessed, D hidden, H width of the classifier.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elsa_pl.functional.attacks import require_pairwise
from elsa_pl.functional.priors import Prior

_HIDDEN: Final = 128
_DROPOUT: Final = 0.3
_BATCH: Final = 16
"""Texts."""
_MOST_TOKENS: Final = 1024
"""That the classifier tells apart; the rarer ones cost much and are hardly ever guessed right."""
_LEAST_COUNT: Final = 3
"""In public text, of a token that it learns."""
_MOST_SEEN: Final = 400_000
"""Public tokens in all epochs together, which bounds the time of training."""
_PATIENCE: Final = 2
"""Epochs without a better guess of the texts held out, after which training ends."""
_NEIGHBOURS: Final = 50
_SHARPNESS: Final = (10.0, 20.0, 40.0)
_ASIDE: Final = 0.2


@dataclass(frozen=True)
class Texts:
    """Texts and their tokens.

    Attributes:
        states: all states of each text side by side; 0 for those that a shorter text lacks. [B, K]
        texts: the text of each token. [N]
        positions: of each token in its text. [N]

    Raises:
        ValueError: shapes that do not fit.
    """

    states: Tensor
    texts: Tensor
    positions: Tensor

    def __post_init__(self) -> None:
        for name, given in (("texts", self.texts), ("positions", self.positions)):
            if given.shape != self.texts.shape or given.ndim != 1 or given.is_floating_point():
                raise ValueError(
                    f"expected {name} as whole numbers, one for each token; got {given.dtype} {list(given.shape)}"
                )
        if len(self.texts) and int(self.texts.max()) >= len(self.states):
            raise ValueError(
                f"expected numbers of texts below {len(self.states)}, a row of states for each; got"
                f" {int(self.texts.max())}"
            )

    def tokens(self, chosen: Tensor) -> "Texts":
        """All texts, some of the tokens."""
        return Texts(self.states, self.texts[chosen], self.positions[chosen])


def text_classifier_attack(
    seen: Texts,
    public: Texts,
    public_tokens: Tensor,
    *,
    num_guesses: int = 1,
    max_epochs: int = 16,
    learning_rate: float = 3e-3,
    held_out: float = 0.1,
    seed: int = 0,
) -> Tensor:
    r"""Train a classifier of tokens from all states of their text and their position, on public texts alone.

    With states z in units of their spread in public text, and embeddings p, q, b of the position t:

    .. math::
        \operatorname{argmax}_c \bigl( W \operatorname{gelu}(q_t \odot U z + p_t) + b_t \bigr)_c

    It learns the commonest tokens only: see the constants. Of all epochs the one counts that guesses most tokens of the
    public texts held out.

    Args:
        seen: what was sent.
        public: of public texts.
        public_tokens: ids of their tokens. [M]
        num_guesses: of each token, the likeliest first; at most as many as there are public tokens.
        max_epochs: at least 1; fewer, the more public text there is.
        learning_rate: above 0.
        held_out: share of the public texts that decide when to stop, above 0 and below 1; at least one and never all.
        seed: of initial weights, dropout and the order of texts. The global generator is not touched.

    Returns:
        Guessed token ids: [N], or [N, `num_guesses`] if there are several.

    Raises:
        ValueError: states that do not fit, fewer than two public texts, or a setting outside its range.

    Source:
        Song and Raghunathan 2020, arXiv 2004.00053; Morris et al. 2023, arXiv 2310.06816, on what a whole text's
        embedding gives away.

    Example:
        >>> states = torch.tensor([[-1.0], [1.0]]).repeat(60, 1)
        >>> public = Texts(states, torch.arange(120), torch.zeros(120, dtype=torch.long))
        >>> seen = Texts(torch.tensor([[2.0], [-2.0]]), torch.tensor([0, 1]), torch.tensor([0, 0]))
        >>> text_classifier_attack(seen, public, torch.tensor([7, 8]).repeat(60))
        tensor([8, 7])
    """
    _require(seen, public, public_tokens)
    if num_guesses < 1 or max_epochs < 1 or not learning_rate > 0 or not 0 < held_out < 1:
        raise ValueError(
            "expected num_guesses >= 1, max_epochs >= 1, learning_rate > 0 and 0 < held_out < 1; got"
            f" {num_guesses}, {max_epochs}, {learning_rate} and {held_out}"
        )
    tokens, classes, counts = public_tokens.unique(return_inverse=True, return_counts=True)
    least = min(_LEAST_COUNT, int(counts.max()))
    common = counts.argsort(descending=True, stable=True)[:_MOST_TOKENS]
    common = common[counts[common] >= least].sort().values
    learnt = torch.isin(classes, common)
    asked, rows = torch.searchsorted(common, classes[learnt]), public.tokens(learnt)
    # An audit may run within validation, where autograd is off; tensors made there cannot be trained on.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        own, known = _standardised(seen.states.clone(), public.states.clone())
        most = int(torch.cat([seen.positions, public.positions]).max()) + 1
        network = _Classifier(known.shape[1], most, asked.bincount(minlength=len(common)))
        epochs = max(2, min(max_epochs, _MOST_SEEN // max(1, len(asked)))) if max_epochs > 1 else 1
        _train(
            network, Texts(known, rows.texts.clone(), rows.positions.clone()), asked, epochs, learning_rate, held_out
        )
        with torch.no_grad():
            count = min(num_guesses, len(common))
            found = [
                network(own, seen.texts[part], seen.positions[part]).topk(count).indices
                for part in torch.arange(len(seen.texts)).split(4096)
            ]
    guesses: Tensor = tokens[common][torch.cat(found)]
    return guesses[:, 0] if num_guesses == 1 else guesses


class _Classifier(nn.Module):
    """Before training, each token is as likely as it is frequent."""

    def __init__(self, width: int, num_positions: int, counts: Tensor) -> None:
        super().__init__()
        self.read = nn.Linear(width, _HIDDEN)
        self.gate, self.place = nn.Embedding(num_positions, _HIDDEN), nn.Embedding(num_positions, _HIDDEN)
        self.answer, self.prior = nn.Linear(_HIDDEN, len(counts)), nn.Embedding(num_positions, len(counts))
        nn.init.ones_(self.gate.weight)
        for weight in (self.answer.weight, self.prior.weight):
            nn.init.zeros_(weight)
        self.answer.bias.data = counts.float().clamp_min(0.5).log()

    def forward(self, states: Tensor, texts: Tensor, positions: Tensor) -> Tensor:
        """Logits: [B, K], [N], [N] -> [N, C]."""
        read = self.read(F.dropout(states, _DROPOUT, self.training))[texts]
        hidden = F.dropout(F.gelu(read * self.gate(positions) + self.place(positions)), _DROPOUT, self.training)
        logits: Tensor = self.answer(hidden) + self.prior(positions)
        return logits


def _train(
    network: _Classifier, public: Texts, classes: Tensor, epochs: int, learning_rate: float, held_out: float
) -> None:
    """Leave it with the weights that guess most tokens of the texts held out."""
    order = torch.randperm(len(public.states))
    num_held = min(max(1, round(held_out * len(order))), len(order) - 1)
    rest, held = order[num_held:], torch.isin(public.texts, order[:num_held]).nonzero()[:, 0]
    by_text = public.texts.argsort(stable=True)
    starts = torch.searchsorted(public.texts[by_text], torch.arange(len(order) + 1))
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    best, most, waited = network.state_dict(), -1, 0
    for _ in range(epochs):
        network.train()
        for texts in rest[torch.randperm(len(rest))].split(_BATCH):
            texts = texts.sort().values
            rows = torch.cat([by_text[starts[text] : starts[text + 1]] for text in texts.tolist()])
            if not len(rows):
                continue
            optimizer.zero_grad()
            within = torch.searchsorted(texts, public.texts[rows])
            logits = network(public.states[texts], within, public.positions[rows])
            F.cross_entropy(logits, classes[rows]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            hits = sum(
                int(
                    (
                        network(public.states, public.texts[part], public.positions[part]).argmax(1) == classes[part]
                    ).sum()
                )
                for part in held.split(4096)
            )
        if hits > most:
            best, most, waited = {name: value.clone() for name, value in network.state_dict().items()}, hits, 0
        else:
            waited += 1
            if waited == _PATIENCE:
                break
    network.load_state_dict(best)


def nearest_texts_attack(seen: Texts, public: Texts, public_tokens: Tensor, prior: Prior) -> Tensor:
    r"""Have the public texts that are nearest by all their states vote for their own tokens, position by position.

    With d the distance of states in units of their spread, and :math:`u_j = e^{-\beta d_j / \bar d}` over the 50
    nearest texts, scaled to a sum of 1:

    .. math::
        \operatorname{argmax}_w \; \sum_j u_j \, \bigl( [w_{j,t} = w] + \tfrac15 [w_{j,t \pm 1} = w] \bigr)
        + \tfrac{3}{10} \, p(w \mid t)

    The sharpness :math:`\beta` is the one of 10, 20 and 40 that does best on some of the public texts.

    Args:
        seen: what was sent.
        public: of public texts, two or more.
        public_tokens: ids of their tokens. [M]
        prior: p, of the seen tokens; from `elsa_pl.functional.priors.token_prior` with the same public tokens.

    Returns:
        Guessed token ids. [N]

    Raises:
        ValueError: states that do not fit, fewer than two public texts, or a prior of other tokens.

    Source:
        Nearest neighbours, Cover and Hart 1967; over whole texts.

    Example:
        >>> from elsa_pl.functional.priors import token_prior
        >>> public = Texts(torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
        >>> seen, tokens = Texts(torch.tensor([[4.0]]), torch.tensor([0]), torch.tensor([0])), torch.tensor([7, 7, 8])
        >>> at = (public.positions, public.positions)
        >>> nearest_texts_attack(seen, public, tokens, token_prior(seen.positions, seen.positions, at, tokens))
        tensor([8])
    """
    _require(seen, public, public_tokens)
    tokens, classes = public_tokens.unique(return_inverse=True)
    if not torch.equal(tokens, prior.tokens) or prior.rows.shape != seen.texts.shape:
        raise ValueError(
            f"expected a prior of {len(seen.texts)} tokens over {len(tokens)} public ones; got one of"
            f" {len(prior.rows)} over {len(prior.tokens)}: make it of the same texts"
        )
    own, known = _standardised(seen.states, public.states)
    aside = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))
    aside = aside[: min(200, max(1, round(_ASIDE * len(known))))].sort().values
    rest = torch.ones(len(known), dtype=torch.bool)
    rest[aside] = False
    tried = torch.isin(public.texts, aside)
    trial = Texts(known[aside], torch.searchsorted(aside, public.texts[tried]), public.positions[tried])
    others = public.tokens(~tried)
    # the prior is left out of the trial: it is about the places of other tokens
    hits = [
        int((_votes(trial, known, others, classes[~tried], sharpness, None, rest) == classes[tried]).sum())
        for sharpness in _SHARPNESS
    ]
    sharpness = _SHARPNESS[hits.index(max(hits))]
    everything = torch.ones(len(known), dtype=torch.bool)
    asked = Texts(own, seen.texts, seen.positions)
    found: Tensor = tokens[_votes(asked, known, public, classes, sharpness, prior, everything)]
    return found


def _votes(
    seen: Texts,
    known: Tensor,
    public: Texts,
    classes: Tensor,
    sharpness: float,
    prior: Prior | None,
    voting: Tensor,
) -> Tensor:
    """The class of most votes for each seen token; without prior, 0 where nobody votes."""
    voters = voting.nonzero()[:, 0]
    distances = torch.cdist(seen.states, known[voters])
    nearest = distances.topk(min(_NEIGHBOURS, len(voters)), largest=False)
    mean = distances.mean().clamp_min(torch.finfo(distances.dtype).tiny)
    weights = (-sharpness * nearest.values / mean).softmax(1)
    by_text = public.texts.argsort(stable=True)
    starts = torch.searchsorted(public.texts[by_text], torch.arange(len(known) + 1))
    most = int(torch.cat([seen.positions, public.positions]).max()) + 1
    num_classes = int(classes.max()) + 1
    found = torch.zeros_like(seen.texts)
    for text in seen.texts.unique().tolist():
        own = (seen.texts == text).nonzero()[:, 0]
        table = torch.zeros(most + 2, num_classes)
        for voter, weight in zip(voters[nearest.indices[text]].tolist(), weights[text].tolist(), strict=True):
            rows = by_text[starts[voter] : starts[voter + 1]]
            table[public.positions[rows] + 1, classes[rows]] += weight
        at = seen.positions[own] + 1
        scores = table[at] + 0.2 * (table[at - 1] + table[at + 1])
        if prior is not None:
            scores = scores + 0.3 * prior.log_shares[prior.rows[own]].exp()
        found[own] = scores.argmax(1)
    return found


def _standardised(seen: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """In units of the spread in public text, and of a length that does not grow with the width."""
    public = public.detach().float()
    mean, spread = public.mean(0), public.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1) * public.shape[1] ** 0.5 / 8
    return (seen.detach().to(public) - mean) / spread, (public - mean) / spread


def _require(seen: Texts, public: Texts, public_tokens: Tensor) -> None:
    require_pairwise(seen.states, public.states)
    if len(public.states) < 2 or not len(public_tokens) or public_tokens.shape != public.texts.shape:
        raise ValueError(
            f"expected two or more public texts and an id for each of their {len(public.texts)} tokens; got"
            f" {len(public.states)} and {list(public_tokens.shape)}: give more public text"
        )
