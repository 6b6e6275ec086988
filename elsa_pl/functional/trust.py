"""Trust in clients, from how well what they send agrees with what the others send.

Two views, because each has its blind spot. *Consistency* compares predictions on public probes: it finds clients whose
labels are wrong, but random adapters hardly change predictions and so look like an honest client's. *Coherence*
compares the directions of the updates: it finds random ones, but wrong labels of real texts move the adapters much as
right ones do. Each view scores the clients of a round and says how much evidence there is for it; over the rounds both
are averaged, and a client is trusted as far as the less favourable view allows.

Shapes: N clients, Q probes, C classes, P parameters.
"""

import math
from typing import Final

import torch
from torch import Tensor

UNKNOWN: Final = 0.75
"""Trust in a client whose predictions say nothing about its labels, and share of the median that scores 1."""

_LEAST_WEIGHT: Final = 0.05
"""Weight in the consensus of a client without trust, so that somebody is left to compare with when nobody has any."""

_LITTLE_EVIDENCE: Final = 0.03
"""Evidence at which a score counts for half."""

_ITERATIONS: Final = 10

_COMPANIONS: Final = 0.3
"""Share of the other clients that an honest client's update resembles; more of them than are faulty."""

_NOISE: Final = 1.5
"""Cosines of unrelated updates are below it, in standard deviations, for most of these companions; double is safe."""

_LEAST_PROBABILITY: Final = 1e-6


def consistency(predictions: Tensor) -> tuple[Tensor, Tensor]:
    r"""How each client's predictions agree with what the trusted ones among the others answer, and how much that means.

    Clients with unlike data differ most in how often they predict each class, which says nothing about their honesty.
    So a client's vote takes out how likely it finds each class on average, and how strongly. Bars are means over the
    probes, :math:`\ell` log-probabilities centred over the classes, and :math:`m_n` the mean of the votes of all
    others, weighted by their trust:

    .. math::
        v_{nqc} = \frac{\ell_{nqc} - \bar\ell_{n \cdot c}}{\operatorname{std}_q \ell_{nqc}}, \qquad
        a_n = \operatorname{softmax}_c \frac{m_n}{\operatorname{std} m_n}, \qquad
        r_n = \operatorname{corr}\bigl(p_{nqc} - \bar p_{n \cdot c},\; a_{nqc} - \bar a_{n \cdot c}\bigr)

    A client that knows one class predicts it for every probe: it may be honest or not. How much a client says is the
    spread of its probabilities over the probes:

    .. math::
        c_n = \operatorname{clip}\left(\frac{r_n}{\tau \operatorname{median}_w r},\, 0,\, 1\right), \qquad
        s_n^2 = \frac1Q \sum_{qc} (p_{nqc} - \bar p_{n \cdot c})^2

    with :math:`\tau` = `UNKNOWN` and the median weighted by :math:`w_n = s_n / (s_n + 0.03)`. From full trust in all,
    trust (see `believe`) and consensus are computed in turn, ten times, so that those who flip the same labels do not
    vouch for each other. If even the median does not agree with the others, the view says nothing and nobody is
    accused.

    Args:
        predictions: probabilities. [N, Q, C]

    Returns:
        - scores c, between 0 and 1. Of two clients nobody can tell which is wrong: they score alike. [N]
        - evidence s, between 0 (the same prediction for all probes) and 1. [N]

    Raises:
        ValueError: another shape, or numbers that are not finite or not in [0, 1].

    Source:
        ELSA, arXiv 2601.13824, scores consistency with a consensus by a divergence of the predictions themselves. With
        clients whose labels are mixed by Dirichlet(0.3) that ranks honest clients with rare classes below faulty ones.

    Example:
        >>> right = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
        >>> consistency(torch.stack([right, right, right, right.flip(1), torch.full((3, 2), 0.5)]))
        (tensor([1., 1., 1., 0., 0.]), tensor([0.4163, 0.4163, 0.4163, 0.4163, 0.0000]))
    """
    _require_predictions(predictions)
    logs = predictions.clamp_min(_LEAST_PROBABILITY).log()
    logs = logs - logs.mean(2, keepdim=True)
    votes = logs - logs.mean(1, keepdim=True)
    votes = votes / votes.std(1, keepdim=True, correction=0).clamp_min(1e-3)
    said = predictions - predictions.mean(1, keepdim=True)
    evidence = said.square().sum((1, 2)).div(predictions.shape[1]).sqrt()
    scores = torch.ones_like(evidence)
    if len(predictions) == 1:
        return scores, evidence
    trust = scores
    for _ in range(_ITERATIONS):
        mean_vote = torch.einsum("nk,kqc->nqc", _weights_of_others(trust).to(votes), votes)
        strength = mean_vote.std((1, 2), keepdim=True, correction=0).clamp_min(torch.finfo(votes.dtype).tiny)
        answers = (mean_vote / strength).softmax(2)
        agreement = _correlation(said, answers - answers.mean(1, keepdim=True))
        middle = _weighted_median(agreement, _weight(evidence))
        if middle <= 0:
            return torch.ones_like(scores), evidence
        scores = (agreement / (UNKNOWN * middle)).clamp(0, 1)
        trust = believe(average(None, scores, evidence), UNKNOWN)
    return scores, evidence


def coherence(updates: Tensor) -> tuple[Tensor, Tensor]:
    r"""Whether each client's update resembles those of some others more than chance would have it.

    .. math::
        c_n = \operatorname{clip}\left( \frac{h_n - 1.5 \sigma}{1.5 \sigma},\, 0,\, 1 \right), \qquad
        h_n = \operatorname{quantile}_{0.7} \{\cos(u_n, u_k) : k \ne n\}, \qquad \sigma = \frac{1}{\sqrt P}

    :math:`\sigma` is the standard deviation of the cosine of unrelated directions. Random updates lie within it of all
    others; reversed ones resemble, at first, only each other, which must be less than 30% of the clients. Honest
    clients with unlike labels may point away from most others, but resemble some. As training converges honest updates
    come to look random as well, so the evidence is by how much the median client exceeds :math:`3 \sigma`.

    Args:
        updates: what a client sent minus what it was given, flattened in one order for all. Leave out what is not the
            client's own doing, and the head, whose updates differ most between honest clients with unlike labels.
            [N, P]

    Returns:
        - scores c, between 0 and 1. [N]
        - evidence, between 0 and 1, the same for all. [N]

    Raises:
        ValueError: another shape, or numbers that are not finite.

    Source:
        Cao et al. 2020, arXiv 2012.13995 (FLTrust) trusts by the cosine with the server's own update, which takes
        labelled data at the server; here the other clients stand in for it.

    Example:
        >>> noise = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
        >>> coherence(noise + torch.tensor([1.0, 1.0, 1.0, 0.0, -3.0])[:, None])
        (tensor([1., 1., 1., 0., 0.]), tensor([0.3999, 0.3999, 0.3999, 0.3999, 0.3999]))
    """
    if updates.ndim != 2 or not len(updates):
        raise ValueError(f"expected updates [N, P] of at least one client; got {list(updates.shape)}")
    _require_finite(updates, "updates")
    scores, evidence = torch.ones(len(updates)), torch.zeros(len(updates))
    dimensions = int((updates != 0).any(0).sum())  # a hashed update of a small model has places that are never hit
    if len(updates) == 1 or not dimensions:
        return scores, evidence
    directions = torch.nn.functional.normalize(updates.double(), dim=1)
    cosines = directions @ directions.T
    others = cosines[~torch.eye(len(updates), dtype=torch.bool)].view(len(updates), -1)
    resemblance = others.quantile(1 - _COMPANIONS, dim=1)
    noise = _NOISE / math.sqrt(dimensions)
    scores = ((resemblance - noise) / noise).clamp(0, 1).float()
    return scores, evidence + (resemblance.quantile(0.5).float() - 2 * noise).clamp_min(0)


def average(before: Tensor | None, scores: Tensor, evidence: Tensor, smoothing: float = 0.0) -> Tensor:
    r"""Exponential average of a view's scores over rounds, in which a round counts by its evidence.

    With :math:`e` the evidence and :math:`c` the score, both :math:`e\,c` and :math:`e` are averaged:

    .. math::
        x \leftarrow x + (1 - s)\, \frac{e}{e + 0.03}\, (x^{now} - x)

    so a round that says little neither tells much nor lets earlier ones be forgotten.

    Args:
        before: the average of the rounds before; None in the first one. [N, 2]
        scores: of this round. [N]
        evidence: for them. [N]
        smoothing: s, weight of the rounds before, in [0, 1).

    Returns:
        Averages of score times evidence, and of evidence. [N, 2]

    Raises:
        ValueError: a weight outside its range.

    Example:
        >>> average(None, torch.tensor([1.0, 0.5]), torch.tensor([0.4, 0.0]))
        tensor([[0.4000, 0.4000],
                [0.0000, 0.0000]])
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"expected 0 <= smoothing < 1; got {smoothing}: at 1 trust would never change")
    now = torch.stack([scores * evidence, evidence], dim=-1)
    if before is None:
        return now
    rate = (1 - smoothing) * _weight(evidence)
    return before + rate.unsqueeze(-1) * (now - before)


def believe(averages: Tensor, unknown: float) -> Tensor:
    r"""Trust that averages of scores justify.

    .. math::
        T_n = \frac{\langle e_n c_n \rangle + 0.03\, \tau}{\langle e_n \rangle + 0.03}

    Args:
        averages: of `average`. [N, 2]
        unknown: :math:`\tau`, trust without any evidence: `UNKNOWN` for `consistency`, 1 for `coherence`.

    Returns:
        Between 0 and 1. [N]

    Example:
        >>> believe(torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.0, 0.0]]), 0.75)
        tensor([0.9858, 0.0425, 0.7500])
    """
    weighted_score, evidence = averages.unbind(-1)
    return (weighted_score + _LITTLE_EVIDENCE * unknown) / (evidence + _LITTLE_EVIDENCE)


def _weight(evidence: Tensor) -> Tensor:
    """How much evidence counts, from 0 to 1."""
    return evidence / (evidence + _LITTLE_EVIDENCE)


def _weights_of_others(trust: Tensor) -> Tensor:
    """Weight of client k in the consensus for client n: rows sum to 1, zero diagonal [N, N]."""
    weights = trust.double().clamp_min(_LEAST_WEIGHT).repeat(len(trust), 1).fill_diagonal_(0)
    return weights / weights.sum(1, keepdim=True)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The least value that half of the weight does not exceed."""
    order = values.argsort()
    reached = weights[order].double().cumsum(0) >= weights.double().sum() / 2
    return values[order][reached][0]


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of matrices; 0 where one is all but 0. Twice [N, Q, C] -> [N]."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    floor = 1e-6 * a.shape[1] ** 0.5
    a, b = (torch.nn.functional.normalize(x, dim=1, eps=floor) for x in (a, b))
    return (a * b).sum(1).clamp(-1, 1).float()


def _require_predictions(predictions: Tensor) -> None:
    if predictions.ndim != 3 or not predictions.numel():
        raise ValueError(
            f"expected predictions [N, Q, C] of at least one client and probe; got {list(predictions.shape)}"
        )
    _require_finite(predictions.flatten(1), "predictions")
    if predictions.min() < 0 or predictions.max() > 1 + 1e-3:
        raise ValueError(
            f"expected probabilities; got values from {predictions.min():.3g} to {predictions.max():.3g}: "
            "take the softmax first"
        )


def _require_finite(rows: Tensor, what: str) -> None:
    finite = rows.isfinite().all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"expected finite {what}; those of clients {bad[:8]} are not: give these clients trust 0")
