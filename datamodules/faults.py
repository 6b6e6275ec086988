"""Faulty clients for experiments: whose labels are wrong, whose updates are hostile, who is silent or slow.

A defence can only be judged against clients that are known to be faulty. Which they are is a function of the settings
alone, so that every process of a simulation knows it, and a resumed run has the same ones. Faults of the labels act
where a client's batches are made, faults of the update where it is submitted; the client's code in between is honest.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from elsa_pl.datamodules.batches import Indices
from elsa_pl.functional.seeding import derive_seed

logger = logging.getLogger(__name__)

FaultKind = Literal["flipped_labels", "shuffled_texts", "sign_flip", "scaled", "random", "silent", "slow"]
"""``flipped_labels``: label y becomes C-1-y. ``shuffled_texts``: texts get each other's labels. With l what an honest
client would submit, g what it received, s the scale: ``sign_flip`` submits g - s (l - g), ``scaled`` g + s (l - g),
``random`` noise instead of l - g. ``silent`` never submits, so its edge waits for it until ``round_timeout_s``;
``slow`` computes s times slower, in simulated time only."""

LABEL_FAULTS: Final[tuple[FaultKind, ...]] = ("flipped_labels", "shuffled_texts")
SUBMITTED_FAULTS: Final[tuple[FaultKind, ...]] = ("sign_flip", "scaled", "random", "silent")
DEFAULT_SCALE: Final = 5.0
_SCALED_FAULTS: Final[tuple[FaultKind, ...]] = ("sign_flip", "scaled", "slow")


@dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """Which clients are faulty, by name or by number, and how."""

    by_client: Mapping[str, FaultKind] | None = None
    """The kind of fault of each faulty client."""
    fraction: float = 0.0
    """Part of the clients, in [0, 1), drawn at random, instead of ``by_client``."""
    kind: FaultKind | None = None
    """What is wrong with the clients that are drawn."""
    scale: float = DEFAULT_SCALE
    """The s of `FaultKind`, > 0."""

    def check(self, task: str) -> None:
        """Refuse settings that contradict each other or the task; warn of those that do nothing.

        Raises:
            ValueError: an unknown kind, a fraction outside [0, 1), a scale that is not positive, two ways to name
                the faulty clients or none, or a fault of labels in a task without labels.
        """
        kinds = {kind for kind in (*(self.by_client or {}).values(), self.kind) if kind is not None}
        for kind in sorted(kinds):
            if kind not in get_args(FaultKind):
                known = ", ".join(get_args(FaultKind))
                raise ValueError(f"expected a kind of fault among {known}, got {kind}: correct it")
            if kind in LABEL_FAULTS and task == "causal_lm":
                raise ValueError(
                    f"expected no fault of labels with task=causal_lm, which has none, got {kind}: use a fault of the "
                    "update, such as sign_flip"
                )
        if not 0 <= self.fraction < 1:
            raise ValueError(f"expected 0 <= faulty_fraction < 1, got {self.fraction}: give a part of 1")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"expected fault_scale > 0, got {self.scale}: give a positive number")
        if self.by_client and self.fraction:
            raise ValueError(
                f"expected faults or faulty_fraction, got faults={dict(self.by_client)} and "
                f"faulty_fraction={self.fraction}: give one of them"
            )
        if self.fraction and self.kind is None:
            raise ValueError(f"expected a fault with faulty_fraction={self.fraction}, got none: set data.fault")
        if self.kind is not None and not self.fraction:
            logger.warning("fault=%s has no effect without clients that have it: set data.faulty_fraction", self.kind)
        if self.scale != DEFAULT_SCALE and kinds.isdisjoint(_SCALED_FAULTS):
            logger.warning("fault_scale=%g has no effect: only %s use it", self.scale, ", ".join(_SCALED_FAULTS))

    def of(self, clients: Sequence[str], seed: int) -> dict[str, FaultKind]:
        """Return the faulty ones among all clients of a simulation, the same in every process.

        Args:
            clients: all of them, in an order that all processes share.
            seed: of the run.

        Raises:
            ValueError: a client in ``by_client`` does not exist.
        """
        if self.by_client:
            if unknown := sorted(set(self.by_client) - set(clients)):
                raise ValueError(
                    f"expected the clients in faults to be among {', '.join(clients)}, got {', '.join(unknown)}: "
                    "correct data.faults"
                )
            return dict(self.by_client)
        count = int(self.fraction * len(clients) + 0.5)
        if self.fraction and not count:
            logger.warning(
                "faulty_fraction=%g has no effect: it is less than half of one of %d clients",
                self.fraction,
                len(clients),
            )
        if self.kind is None or not count:
            return {}
        draws = np.random.default_rng(derive_seed(seed, "faulty clients"))
        return dict.fromkeys((clients[i] for i in np.sort(draws.permutation(len(clients))[:count])), self.kind)

    def of_site(self, client: str) -> dict[str, FaultKind]:
        """Return the fault of a site's own client, if it has one; the names of other sites are not known here.

        Raises:
            ValueError: ``fraction`` is set, but no site sees the clients to draw from.
        """
        if self.fraction:
            raise ValueError(
                f"expected faults by name where a site reads its own file, got faulty_fraction={self.fraction} at "
                f"{client}: set data.faults"
            )
        kind = (self.by_client or {}).get(client)
        if kind == "slow":
            logger.warning("fault=slow has no effect at %s: between sites time is real, and not slowed down", client)
        return {} if kind is None else {client: kind}


def corrupt_labels(kind: FaultKind, codes: Indices, num_labels: int, generator: np.random.Generator) -> Indices:
    """Return the labels that a client with this fault trains on.

    Flipping leaves the middle label of an odd number as it is. Shuffling permutes the client's own labels, so that its
    histogram stays; a client with one label is not changed by it.

    Args:
        kind: any; only the faults of labels change anything.
        codes: the client's labels, from 0 to C-1. [E]
        num_labels: C.
        generator: of the permutation.

    Example:
        >>> corrupt_labels("flipped_labels", np.array([0, 1, 5]), 6, np.random.default_rng(0))
        array([5, 4, 0])
    """
    if kind == "flipped_labels":
        return num_labels - 1 - codes
    if kind == "shuffled_texts":
        return generator.permutation(codes)
    return codes


def corrupt(
    kind: FaultKind,
    submitted: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    scale: float,
    generator: torch.Generator,
) -> dict[str, Tensor] | None:
    r"""Return what a client with this fault submits; None if it is silent.

    With l what it would have submitted and g what it had received, tensor by tensor:

    - ``sign_flip``: :math:`g - s\,(l - g)`
    - ``scaled``: :math:`g + s\,(l - g)`
    - ``random``: :math:`g + \lVert l - g \rVert\, u / \lVert u \rVert` with standard normal u
    - ``silent``: nothing; all others: l

    Args:
        kind: the fault.
        submitted: adapters after the client's own steps.
        received: the adapters that those steps began with: the same names and shapes.
        scale: s > 0.
        generator: of the noise, on the CPU; drawn in alphabetical order of names.

    Raises:
        ValueError: names or shapes differ.

    Source:
        Sign flipping: Li et al. 2019, "RSA: Byzantine-robust stochastic aggregation methods", arXiv 1811.03761,
        section 5, there of gradients. Scaling: Bagdasaryan et al. 2020, "How to backdoor federated learning", arXiv
        1807.00459, "model replacement".

    Example:
        >>> g, l = {"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([1.0, 2.0])}
        >>> corrupt("sign_flip", l, g, 3.0, torch.Generator())
        {'a': tensor([ 1., -2.])}
    """
    if kind == "silent":
        return None
    if kind not in ("sign_flip", "scaled", "random"):
        return dict(submitted)
    if submitted.keys() != received.keys():
        raise ValueError(
            f"expected submitted and received adapters of the same layers, got a difference in "
            f"{sorted(submitted.keys() ^ received.keys())[:4]}: pass the adapters that the client's steps began with"
        )
    corrupted = {}
    for name in sorted(submitted):
        before, after = received[name], submitted[name]
        if before.shape != after.shape:
            raise ValueError(
                f"expected received adapters of the shape {tuple(after.shape)} for {name}, got {tuple(before.shape)}: "
                "pass the adapters that the client's steps began with"
            )
        update = after - before.to(after)
        if kind == "random":
            noise = torch.randn(after.shape, generator=generator).to(update)
            # in double precision, or the norm of a half precision tensor is off by percents
            update = noise * (update.double().norm() / noise.double().norm().clamp_min(1e-30)).to(update)
        else:
            update = update * (-scale if kind == "sign_flip" else scale)
        corrupted[name] = before.to(after) + update
    return {name: corrupted[name] for name in submitted}
