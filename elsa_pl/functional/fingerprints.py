"""Fingerprints: what a client's model makes of public probe texts, as a small Gaussian.

Clients cannot be compared by their data, which stays private, and comparing adapters directly sees how weights
moved rather than what the model does. So every client's model reads the same public texts, and the cloud of its
representations is summarised by mean and covariance: M + M (M + 1) / 2 numbers, whatever the model's size.

Shapes: Q probes, D hidden, M projected width, C classes, K contrasts between classes.
"""

from typing import Final

import torch
from torch import Tensor

_LEAST_PROBABILITY: Final = 1e-6

MAX_CONTRASTS: Final = 32
"""Numbers that stand for the log-probabilities of a probe, at most."""


def principal_directions(states: Tensor, width: int) -> Tensor:
    r"""The directions in which the base model's probe representations vary most: one projection for all clients.

    With :math:`H` the centred states and :math:`H = U S V^T`, the first `width` columns of :math:`V`. The sign of each
    is chosen so that its entry of largest magnitude is positive: two processes get the same directions.

    Args:
        states: representations of the probes by the base model. [Q, D]
        width: M, 1 <= M <= D and M < Q.

    Returns:
        Orthonormal columns, in the states' own dtype. [D, M]

    Raises:
        ValueError: states that are no finite matrix, a width outside its range, or states that vary in fewer than
            `width` directions.

    Example:
        >>> states = torch.tensor([[0.0, 3.0], [0.0, -3.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> principal_directions(states, 1)
        tensor([[0.],
                [1.]])
    """
    _require_states(states)
    num_probes, num_hidden = states.shape
    if not 1 <= width <= num_hidden:
        raise ValueError(f"expected 1 <= width <= {num_hidden}, the states' width; got {width}: choose a width in it")
    _require_enough_probes(num_probes, width)
    centred = states.double() - states.double().mean(0)
    _, strengths, rows = torch.linalg.svd(centred, full_matrices=False)
    # rounding of the states' own dtype, which more rows do not make relatively larger
    least = strengths[0] * num_hidden * torch.finfo(states.dtype).eps
    if strengths[width - 1] <= least:
        rank = int((strengths > least).sum())
        raise ValueError(
            f"expected probe representations that vary in at least width={width} directions; got {rank}: "
            "give more varied probes or lower the width"
        )
    directions: Tensor = rows[:width]
    largest = directions.abs().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    return directions.T.contiguous().to(states.dtype)


def behaviour_change(
    states: Tensor,
    predictions: Tensor,
    base_states: Tensor,
    base_predictions: Tensor,
    directions: Tensor,
    *,
    max_contrasts: int = MAX_CONTRASTS,
) -> Tensor:
    r"""What training changed in a client's model, probe by probe: representations and log-probabilities.

    .. math::
        x_q = \Bigl[\, W^T (\log p_q - \log p^0_q), \quad \frac{V^T (t_q - t^0_q)}{s} \,\Bigr]

    with 0 for the base model, V the shared directions, s the standard deviation of the base model's projected
    representations, and W orthonormal contrasts between classes (orthogonal to the vector of ones, so that only
    differences of log-probabilities count): all C - 1 of them, or `max_contrasts` at random, the same for everybody.

    Representations alone are dominated by what all clients share, the texts; and a short warm-up changes predictions
    sooner than representations.

    Args:
        states: representations of the probes by the client's model. [Q, D]
        predictions: its probabilities of the classes. [Q, C]
        base_states: representations by the model before any training. [Q, D]
        base_predictions: its probabilities. [Q, C]
        directions: from `principal_directions` of `base_states`. [D, M]
        max_contrasts: the most contrasts, at least 1.

    Returns:
        Features for `fingerprint`, contrasts first. [Q, K + M]

    Raises:
        ValueError: shapes that do not fit, fewer than two classes, numbers that are not finite, or predictions that are
            no probabilities.

    Source:
        ELSA, arXiv 2601.13824, takes the representations as they are; both were tried on clients in planted groups.

    Example:
        >>> base_states, base = torch.eye(3), torch.full((3, 2), 0.5)
        >>> sure = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
        >>> behaviour_change(2 * base_states, sure, base_states, base, torch.eye(3)[:, :1]).shape
        torch.Size([3, 2])
    """
    for name, found, base in (("states", states, base_states), ("predictions", predictions, base_predictions)):
        _require_states(found)
        _require_states(base)
        if found.shape != base.shape or len(found) != len(states):
            raise ValueError(
                f"expected {name} of the same probes from client and base model; got {list(found.shape)} and "
                f"{list(base.shape)} for {len(states)} probes: evaluate both on one probe set"
            )
    _require_directions(states, directions)
    if predictions.shape[1] < 2 or max_contrasts < 1:
        raise ValueError(
            f"expected two or more classes and max_contrasts >= 1; got {predictions.shape[1]} and {max_contrasts}"
        )
    if min(predictions.min(), base_predictions.min()) < 0 or max(predictions.max(), base_predictions.max()) > 1 + 1e-3:
        raise ValueError("expected predictions in [0, 1]; got others: take the softmax first")
    logs, base_logs = (p.double().clamp_min(_LEAST_PROBABILITY).log() for p in (predictions, base_predictions))
    contrasts = _contrasts(predictions.shape[1], max_contrasts).to(logs.device)
    directions = directions.to(states.device).double()
    projected = base_states.double() @ directions
    spread = (projected - projected.mean(0)).square().mean().sqrt()
    if spread <= 0:
        raise ValueError("expected base representations that differ; got the same for every probe: give other probes")
    moved = (states.double() @ directions - projected) / spread
    return torch.cat([(logs - base_logs) @ contrasts, moved], 1).to(states.dtype)


def fingerprint(states: Tensor, directions: Tensor | None = None, *, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of a client's probe representations in the shared directions.

    .. math::
        z_q = V^T t_q, \qquad \mu = \frac1Q \sum_q z_q, \qquad
        \Sigma = (1 - \delta)\, \hat\Sigma + \delta\, \frac{\operatorname{tr} \hat\Sigma}{M}\, I

    The sample covariance :math:`\hat\Sigma` is singular for Q <= M and its inverse, which the divergence needs, is
    noisy long before. So it is shrunk towards a multiple of the identity, by the :math:`\delta` of least expected
    squared error (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices").

    Args:
        states: representations of the probes by the client's model, or features from `behaviour_change`. [Q, D]
        directions: from `principal_directions` of the base model, the same for all clients. [D, M] None takes the
            states as they are, M = D.
        floor: variance added in every direction, at least 0. With it, a client whose features are all the same, as
            those of a model that has not changed, has a fingerprint too.

    Returns:
        Mean [M] and covariance [M, M], both in double precision.

    Raises:
        ValueError: states that are no finite matrix, directions of another width, not more probes than directions, or
            probe representations that are all the same without a floor.

    Source:
        ELSA, arXiv 2601.13824, clusters clients by Gaussians over probe representations, without shrinkage.

    Example:
        >>> states = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 2.0], [-1.0, 2.0]])
        >>> mean, covariance = fingerprint(states, torch.eye(2))
        >>> mean
        tensor([0., 1.], dtype=torch.float64)
        >>> torch.linalg.eigvalsh(covariance).min() > 0
        tensor(True)
    """
    from sklearn.covariance import ledoit_wolf

    _require_states(states)
    if directions is None:
        projected = states.double()
    else:
        _require_directions(states, directions)
        projected = states.double() @ directions.to(states.device).double()
    _require_enough_probes(*projected.shape)
    covariance, _ = ledoit_wolf(projected.cpu().numpy())
    shrunk = torch.from_numpy(covariance).to(states.device)
    if shrunk.trace() + floor <= 0:
        raise ValueError("expected probe representations that differ; got the same for every probe: give other probes")
    return projected.mean(0), shrunk + floor * torch.eye(len(shrunk), dtype=shrunk.dtype, device=shrunk.device)


def _contrasts(num_classes: int, most: int) -> Tensor:
    """Orthonormal columns that are orthogonal to the vector of ones, as many as there are or as asked for [C, K]."""
    count = min(num_classes, most + 1)
    draws = torch.randn(num_classes, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws[:, 0] = 1
    basis: Tensor = torch.linalg.qr(draws)[0]
    return basis[:, 1:]


def _require_directions(states: Tensor, directions: Tensor) -> None:
    if directions.ndim != 2 or directions.shape[0] != states.shape[1]:
        raise ValueError(
            f"expected directions of shape [{states.shape[1]}, M], as wide as the states; got "
            f"{list(directions.shape)}: take them from the base model of the same federation"
        )


def _require_states(states: Tensor) -> None:
    if states.ndim != 2 or not states.is_floating_point():
        raise ValueError(
            f"expected floating-point states of shape [Q, D], a row for each probe; got {states.dtype} "
            f"{list(states.shape)}"
        )
    if not states.isfinite().all():
        bad = int((~states.isfinite()).any(1).sum())
        raise ValueError(
            f"expected finite representations; got nan or inf for {bad} of {states.shape[0]} probes: leave this client "
            "out, or lower its learning rate"
        )


def _require_enough_probes(num_probes: int, width: int) -> None:
    if num_probes <= width:
        raise ValueError(
            f"expected more probes than directions, at least {width + 1}; got {num_probes}: give more probes or lower "
            "the width"
        )
