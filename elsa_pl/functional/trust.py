"""Trust in clients, from how well what they send agrees with what the others send.

Two views, because each has its blind spot. *Consistency* compares predictions on public probes: it finds clients whose
labels are wrong, but random adapters hardly change predictions and so look like the best client of all. *Coherence*
compares the directions of the updates: it finds random and reversed updates, but wrong labels of real texts move the
adapters much as right ones do. A client is trusted as far as the less favourable view allows.

Shapes: N clients, Q probes, C classes, P parameters.
"""

import math
from typing import Final

import torch
from torch import Tensor

FULL_TRUST: Final = 0.5
"""A client at this share of the median or above it is fully trusted: honest clients with rare data lie lower, too."""

_LEAST_WEIGHT: Final = 0.05
"""Weight in a consensus of a client without trust, so that somebody is left to compare with when nobody has any."""

_WEIGHT_OF_MATES: Final = 2.0
"""How much more a client of the same cluster weighs in a consensus than one of another cluster."""

_LEAST_PROBABILITY: Final = 1e-6


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    r"""Jensen-Shannon divergence of distributions over the last dimension, in nats.

    .. math:: \mathrm{JSD}(p, q) = \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \qquad m = (p + q) / 2

    Args:
        p: probabilities. [..., C]
        q: probabilities, of a shape that broadcasts with it. [..., C]

    Returns:
        Between 0 (equal) and ln 2 (nothing in common). [...]

    Source:
        Lin 1991, "Divergence measures based on the Shannon entropy".

    Example:
        >>> jensen_shannon(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0.0, 1.0]))
        tensor([0.6931, 0.2158])
    """
    middle = (p + q) / 2
    # xlogy is 0 at 0, and where the middle is 0 both are
    kl_p, kl_q = (torch.xlogy(r, r) - torch.xlogy(r, middle) for r in (p, q))
    return ((kl_p + kl_q).sum(-1) / 2).clamp(0, math.log(2))


def consistency(predictions: Tensor, clusters: Tensor | None, trust: Tensor) -> Tensor:
    r"""Correlation of each client's predictions with the answer that the others agree on.

    Clients with unlike data differ most in how often they predict each class, which says nothing about their honesty.
    So a client's vote takes out how likely it finds each class on average, and how strongly:

    .. math::
        v_{nqc} = \frac{\ell_{nqc} - \bar\ell_{n \cdot c}}{\operatorname{std}_q \ell_{nqc}}, \qquad
        a_n = \operatorname{softmax}_c \frac{m_n}{\operatorname{std} m_n}, \qquad
        c_n = \operatorname{corr}\bigl(p_{nqc} - \bar p_{n \cdot c},\; a_{nqc} - \bar a_{n \cdot c}\bigr)

    with :math:`\ell` the log-probabilities, centred over the classes, bars for means over the probes, and :math:`m_n`
    the mean of the votes of all others, weighted by trust. Where clusters are given, clients of the same one weigh
    twice as much, and not more: faulty clients that cluster together must not vouch for each other.

    Args:
        predictions: probabilities. [N, Q, C]
        clusters: the cluster of each client, any integers. [N] None counts all alike, which separated flipped labels
            at least as well wherever both were tried.
        trust: of the round before, in [0, 1]; ones in the first round. [N]

    Returns:
        Between -1 and 1; 0 for a client that predicts the same for all probes. One client agrees with itself: 1. Two
        clients have the same consistency, up to what their confidence makes of it: nobody can tell which is wrong. [N]

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite or not in [0, 1].

    Source:
        ELSA, arXiv 2601.13824, scores consistency with a consensus by divergence, which is `divergence_consistency`
        here. With clients whose labels are mixed by Dirichlet(0.3) that ranks honest clients with rare classes below
        faulty ones.

    Example:
        >>> right = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
        >>> predictions = torch.stack([right, right, right, right.flip(1)])
        >>> consistency(predictions, None, torch.ones(4)) > 0
        tensor([ True,  True,  True, False])
    """
    _require_predictions(predictions, clusters, trust)
    if len(predictions) == 1:
        return predictions.new_ones(1)
    logs = predictions.clamp_min(_LEAST_PROBABILITY).log()
    logs = logs - logs.mean(2, keepdim=True)
    votes = logs - logs.mean(1, keepdim=True)
    votes = votes / votes.std(1, keepdim=True, correction=0).clamp_min(1e-3)
    mean_vote = torch.einsum("nk,kqc->nqc", _weights_of_others(clusters, trust).to(votes), votes)
    strength = mean_vote.std((1, 2), keepdim=True, correction=0).clamp_min(torch.finfo(votes.dtype).tiny)
    answers = (mean_vote / strength).softmax(2)
    return _correlation(predictions - predictions.mean(1, keepdim=True), answers - answers.mean(1, keepdim=True))


def divergence_consistency(predictions: Tensor, clusters: Tensor | None, trust: Tensor) -> Tensor:
    r"""Closeness of each client's predictions to the mean prediction of the others, for comparison.

    .. math:: c_n = 1 - \frac{1}{Q \ln 2} \sum_q \mathrm{JSD}(p_{nq}, \bar p_{nq})

    with the mean of the others weighted as in `consistency`.

    Args:
        predictions: probabilities. [N, Q, C]
        clusters: the cluster of each client, any integers. [N] None counts all alike.
        trust: of the round before, in [0, 1]. [N]

    Returns:
        Between 0 and 1; one client: 1. [N]

    Raises:
        ValueError: as `consistency`.

    Example:
        >>> predictions = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
        >>> divergence_consistency(predictions, torch.tensor([0, 0, 1]), torch.ones(3))
        tensor([0.8091, 0.8091, 0.0000])
    """
    _require_predictions(predictions, clusters, trust)
    if len(predictions) == 1:
        return predictions.new_ones(1)
    consensus = torch.einsum("nk,kqc->nqc", _weights_of_others(clusters, trust).to(predictions), predictions)
    return 1 - jensen_shannon(predictions, consensus).mean(1) / math.log(2)


def coherence(updates: Tensor, trust: Tensor) -> Tensor:
    r"""Cosine between each client's update and the mean direction of the others' updates.

    .. math:: h_n = \cos\Bigl(u_n,\; \sum_{k \ne n} T_k \frac{u_k}{\lVert u_k \rVert}\Bigr)

    Random updates are orthogonal to everything, reversed ones point away; a large norm buys no influence.

    Args:
        updates: adapters that a client sent minus those that it was given, flattened in one order for all. Those of the
            head may be left out. [N, P]
        trust: of the round before, in [0, 1]; ones in the first round. [N]

    Returns:
        Between -1 and 1; 0 for a client that changed nothing. One client agrees with itself: 1; two with each
        other equally. [N]

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.

    Source:
        Cao et al. 2020, arXiv 2012.13995 (FLTrust), with the server's own update in place of the others'.

    Example:
        >>> updates = torch.tensor([[1.0, 0.1], [2.0, 0.0], [1.0, -0.1], [-3.0, 0.0]])
        >>> coherence(updates, torch.ones(4)).round(decimals=2)
        tensor([ 0.9800,  1.0000,  0.9800, -1.0000])
    """
    if updates.ndim != 2 or not len(updates) or trust.shape != updates.shape[:1]:
        raise ValueError(
            "expected updates [N, P] and trust [N] for at least one client; got "
            f"{list(updates.shape)} and {list(trust.shape)}"
        )
    _require_finite(updates, "updates")
    _require_trust(trust)
    if len(updates) == 1:
        return updates.new_ones(1)
    directions = torch.nn.functional.normalize(updates.double(), dim=1)
    weighted = directions * trust.to(directions).clamp_min(_LEAST_WEIGHT)[:, None]
    others = torch.nn.functional.normalize(weighted.sum(0) - weighted, dim=1)
    return (directions * others).sum(1).clamp(-1, 1).to(updates.dtype)


def trust_scores(*views: Tensor) -> Tensor:
    r"""Trust in each client from its consistency and, where there is one, its coherence.

    .. math:: T_n = \min_v \operatorname{clip}\left( \frac{c^v_n}{\tau \operatorname{median}_k c^v_k},\, 0,\, 1 \right)

    with :math:`\tau` = `FULL_TRUST`. Agreement at or below 0 leaves no trust: it is what a client would have by chance.
    A view in which even the median does not agree says nothing, and everybody has full trust in it.

    Args:
        views: one or more of `consistency`, `coherence`, ...; 0 means no agreement. [N] each

    Returns:
        Between 0 and 1; equal clients, and so a single one, have 1. [N]

    Raises:
        ValueError: no view, shapes that do not fit, or numbers that are not finite.

    Example:
        >>> trust_scores(torch.tensor([0.4, 0.5, 0.3, 0.1, -0.2]))
        tensor([1.0000, 1.0000, 1.0000, 0.6667, 0.0000])
    """
    if not views or any(view.ndim != 1 or view.shape != views[0].shape or not len(view) for view in views):
        raise ValueError(f"expected one or more views of shape [N]; got {[list(view.shape) for view in views]}")
    scores = []
    for view in views:
        _require_finite(view[:, None], "scores")
        middle = torch.quantile(view.double(), 0.5).to(view.dtype)
        full = FULL_TRUST * middle
        scores.append((view / full).clamp(0, 1) if middle > _NO_AGREEMENT else torch.ones_like(view))
    return torch.stack(scores).amin(0)


def smooth(before: float | None, score: float, smoothing: float) -> float:
    r"""Exponential average of trust over rounds: :math:`s\, T^{before} + (1 - s)\, T^{now}`.

    Args:
        before: the average of the rounds before; None in the first one.
        score: trust of this round.
        smoothing: s, weight of the rounds before, in [0, 1).

    Raises:
        ValueError: a weight outside its range.

    Example:
        >>> smooth(None, 0.8, 0.5), smooth(0.8, 0.0, 0.5)
        (0.8, 0.4)
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"expected 0 <= smoothing < 1; got {smoothing}: at 1 trust would never change")
    return score if before is None else smoothing * before + (1 - smoothing) * score


_NO_AGREEMENT: Final = 1e-6


def _weights_of_others(clusters: Tensor | None, trust: Tensor) -> Tensor:
    """Weight of client k in the consensus for client n: rows sum to 1, zero diagonal [N, N]."""
    weights = trust.double().clamp_min(_LEAST_WEIGHT).repeat(len(trust), 1).fill_diagonal_(0)
    if clusters is not None:
        weights = weights * torch.where(clusters[:, None] == clusters[None, :], _WEIGHT_OF_MATES, 1.0)
    return weights / weights.sum(1, keepdim=True)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of matrices; 0 where one is all but 0. Twice [N, Q, C] -> [N]."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    floor = 1e-6 * a.shape[1] ** 0.5
    a, b = (torch.nn.functional.normalize(x, dim=1, eps=floor) for x in (a, b))
    return (a * b).sum(1).clamp(-1, 1).float()


def _require_predictions(predictions: Tensor, clusters: Tensor | None, trust: Tensor) -> None:
    count = len(predictions) if predictions.ndim else 0
    each = [trust] if clusters is None else [clusters, trust]
    if predictions.ndim != 3 or not predictions.numel() or any(other.shape != (count,) for other in each):
        raise ValueError(
            "expected predictions [N, Q, C], clusters [N] and trust [N] for at least one client and probe; got "
            f"{list(predictions.shape)} and {[list(other.shape) for other in each]}"
        )
    _require_finite(predictions.flatten(1), "predictions")
    if predictions.min() < 0 or predictions.max() > 1 + 1e-3:
        raise ValueError(
            f"expected probabilities; got values from {predictions.min():.3g} to {predictions.max():.3g}: "
            "take the softmax first"
        )
    _require_trust(trust)


def _require_trust(trust: Tensor) -> None:
    if not ((trust >= 0) & (trust <= 1)).all():  # also refuses nan
        raise ValueError(f"expected trust in [0, 1]; got {trust.tolist()[:8]}")


def _require_finite(rows: Tensor, what: str) -> None:
    finite = rows.isfinite().all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"expected finite {what}; those of clients {bad[:8]} are not: give these clients trust 0")
