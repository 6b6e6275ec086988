"""Means of adapters, by global layer name.

Because a name says where a tensor stands in the *uncut* model, clients that were cut differently still average layer
by layer: what is a front layer for one may be a middle layer for another.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from elsa_pl.functional.seeding import derive_seed

Adapters = Mapping[str, Tensor]
Aggregator = Callable[[Sequence[Adapters], Sequence[float]], dict[str, Tensor]]


def weighted_mean(adapters: Sequence[Adapters], weights: Sequence[float]) -> dict[str, Tensor]:
    r"""Average adapters name by name: :math:`\sum_n w_n a_n / \sum_n w_n`.

    The sums run in double precision, so that a mean of means differs from the flat mean by rounding to the tensors'
    own precision only.

    Args:
        adapters: one mapping per sender, all with the same names and shapes.
        weights: one non-negative weight per sender, not all zero.

    Returns:
        The mean, in the tensors' own dtype.

    Raises:
        ValueError: no adapters, different names, or weights that are negative, not finite or all zero.

    Source:
        McMahan et al. 2017, arXiv 1602.05629, Algorithm 1 (with adapters in place of the model); ELSA, arXiv
        2601.13824, applies it at the edges and then at the cloud.

    Example:
        >>> mean = weighted_mean([{"a": torch.zeros(2)}, {"a": torch.ones(2)}], [1, 3])
        >>> mean["a"]
        tensor([0.7500, 0.7500])
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected one weight for each of at least one sender; got {len(adapters)} and {len(weights)}")
    total = float(sum(weights))
    if not all(0 <= weight < float("inf") for weight in weights) or total <= 0:  # also refuses nan
        raise ValueError(f"weights must be finite, at least 0 and not all 0; got {list(weights)}")
    names = list(adapters[0])
    for other in adapters[1:]:
        if set(other) != set(names):
            raise ValueError(f"senders differ in the layers {sorted(set(other) ^ set(names))[:4]}")
    mean = {}
    for name in names:
        first = adapters[0][name]
        summed = torch.zeros_like(first, dtype=torch.float64)
        for sent, weight in zip(adapters, weights, strict=True):
            summed += sent[name].double() * weight
        mean[name] = (summed / total).to(first.dtype)
    return mean


AGGREGATORS: dict[str, Aggregator] = {"mean": weighted_mean}


def sample_clients(clients: Sequence[str], participation: float, seed: int, round_number: int) -> frozenset[str]:
    """Draw the clients of a global round: a function of seed and round, the same in every process.

    Args:
        clients: all clients, in an order that all processes share.
        participation: fraction in (0, 1]; at least one client is drawn.
        seed: the run's seed.
        round_number: the global round.
    """
    count = max(1, round(participation * len(clients)))
    draws = np.random.default_rng(derive_seed(seed, "participants", round_number))
    return frozenset(draws.choice(list(clients), size=count, replace=False).tolist())
