"""Gives each client an edge that is near, and where the other clients behave like it."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.callbacks import pictures
from elsa_pl.callbacks.clustering import BehaviorClustering
from elsa_pl.callbacks.probing import companion
from elsa_pl.callbacks.trust import TrustScoring
from elsa_pl.functional.assignment import assign, assignment_costs
from elsa_pl.functional.seeding import derive_seed

# Shapes: N clients, E edges.

_WEIGHTS_SHOWN = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0, 1000.0)


class LatencyAwareAssignment(Callback):
    """Assigns clients to edges by latency, and by behaviour once `BehaviorClustering` has compared them.

    For `elsa_pl`'s strategy, whose `profile` (or, between sites, a measurement) tells the latencies. Before the first
    comparison latency alone decides. After each one the clients are assigned anew; those that move take over the global
    adapters at their new edge like everybody else. Without `BehaviorClustering` it is latency alone, without
    `TrustScoring` all are trusted. The strategy's ``edge_of`` is ignored, with a warning.

    Args:
        latency_weight: of the latency between client and edge, over its median.
        behaviour_weight: of the mean divergence to the clients of the edge, over the median between clients. Above 0
            clients that behave alike share an edge; below 0 those that behave unlike do.
        capacity: most clients of an edge, for all edges or by name; None: a quarter more than an equal share.
        pictures: draw latency against behaviour into the run's folder.

    Source:
        ELSA (Yang et al. 2026, arXiv 2601.13824); `elsa_pl.functional.assignment` says how it is solved.

    Example:
        >>> assignment = LatencyAwareAssignment(behaviour_weight=2.0, capacity=12)
    """

    def __init__(
        self,
        latency_weight: float = 1.0,
        behaviour_weight: float = 1.0,
        *,
        capacity: int | dict[str, int] | None = None,
        pictures: bool = True,
    ) -> None:
        if not 0 <= latency_weight < math.inf or not math.isfinite(behaviour_weight):
            raise ValueError(
                f"expected latency_weight >= 0 and behaviour_weight finite; got {latency_weight} and {behaviour_weight}"
            )
        if latency_weight == behaviour_weight == 0:
            raise ValueError("latency_weight and behaviour_weight are both 0: set one of them")
        self._latency_weight, self._behaviour_weight = latency_weight, behaviour_weight
        self._capacity, self._pictures = capacity, pictures
        self._assignment: dict[str, str] | None = None
        self._decided_for: int | None = None
        self._decided_after = 0  # the round of the comparison that the assignment follows
        # latencies, capacities, divergences, trust and edges of the latest assignment by behaviour
        self._shown: dict[str, Tensor] | None = None

    def on_assign_clients(self, trainer: "pl.Trainer", assignment: dict[str, str]) -> dict[str, str]:
        """The assignment for the next round: a new one after each comparison of the clients, else the one there is."""
        clustering = companion(trainer, BehaviorClustering)
        compared = 0 if clustering is None or clustering.divergences is None else clustering.round
        strategy: Any = trainer.strategy
        # the lost stay where they are, and leave their places to others
        living = [client for client in assignment if client not in strategy.lost_clients]
        # of a resumed run too: with other clients, edges or weights, the assignment of before does not hold
        settings = (sorted(living), strategy.network, self._latency_weight, self._behaviour_weight, self._capacity)
        decided_for = derive_seed(repr(settings))
        if self._assignment is None or compared > self._decided_after or decided_for != self._decided_for:
            found = self._assign(trainer, living, clustering if compared else None)
            self._assignment = {**assignment, **found}
            self._decided_after, self._decided_for = compared, decided_for
        return self._assignment

    def _assign(
        self, trainer: "pl.Trainer", clients: list[str], clustering: BehaviorClustering | None
    ) -> dict[str, str]:
        strategy: Any = trainer.strategy
        network = strategy.network
        if network is None:
            raise ValueError(
                "LatencyAwareAssignment needs latencies, got no profile: set profile.distribution, such as mixed, or"
                " profile.latency_s, or take the callback out"
            )
        edges = list(network.edges)
        latency_s = torch.tensor([[network.latency_s[client][edge] for edge in edges] for client in clients])
        capacities = self._capacities(edges, len(clients))
        divergences = None if clustering is None else _matrix(clustering, clients)
        scoring = companion(trainer, TrustScoring)
        scores = {} if scoring is None else scoring.trust
        trust = torch.tensor([scores.get(client, 1.0) for client in clients])
        chosen = assign(
            latency_s,
            divergences,
            capacities,
            trust,
            latency_weight=self._latency_weight,
            behaviour_weight=self._behaviour_weight,
        )
        if divergences is not None:
            self._shown = {
                "latency_s": latency_s,
                "capacities": capacities,
                "divergences": divergences,
                "trust": trust,
                "chosen": chosen,
            }
        return {client: edges[place] for client, place in zip(clients, chosen.tolist(), strict=True)}

    def _capacities(self, edges: list[str], num_clients: int) -> Tensor:
        if isinstance(self._capacity, dict):
            if set(self._capacity) != set(edges):
                raise ValueError(f"capacity must name each of the edges {edges}; got {sorted(self._capacity)}")
            return torch.tensor([self._capacity[edge] for edge in edges])
        share = self._capacity if self._capacity is not None else math.ceil(1.25 * num_clients / len(edges))
        return torch.full((len(edges),), share)

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._pictures or not trainer.is_global_zero or self._shown is None:
            return
        latency_s, divergences, trust = (self._shown[name] for name in ("latency_s", "divergences", "trust"))
        sign = math.copysign(1.0, self._behaviour_weight)
        weights = [sign * weight + 0.0 for weight in _WEIGHTS_SHOWN]  # + 0.0, because -0.0 would be written so
        assignments = [
            assign(latency_s, divergences, self._shown["capacities"], trust, behaviour_weight=weight)
            for weight in weights
        ]
        costs = [
            assignment_costs(edges, latency_s, divergences, trust) for edges in [*assignments, self._shown["chosen"]]
        ]
        own_weight = self._behaviour_weight / self._latency_weight if self._latency_weight else sign * math.inf
        figure = pictures.draw_trade_off(
            [*weights, own_weight],
            [cost[0] for cost in costs],
            [cost[1] for cost in costs],
            chosen=len(weights),
        )
        pictures.save(figure, Path(trainer.default_root_dir) / "assignment.png")

    def state_dict(self) -> dict[str, Any]:
        return {
            "assignment": self._assignment,
            "decided_after": self._decided_after,
            "decided_for": self._decided_for,
            "shown": self._shown,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._assignment, self._decided_after = state_dict["assignment"], state_dict["decided_after"]
        self._decided_for, self._shown = state_dict["decided_for"], state_dict.get("shown")


def _matrix(clustering: BehaviorClustering, clients: list[str]) -> Tensor:
    """The divergences in the order of ``clients``; a client that was not compared is as far from all as the median."""
    assert clustering.divergences is not None
    places = {name: place for place, name in enumerate(clustering.names)}
    known = torch.tensor([client in places for client in clients])
    order = torch.tensor([places.get(client, 0) for client in clients])
    matrix = clustering.divergences[order][:, order].clone()
    apart = clustering.divergences[~torch.eye(len(places), dtype=torch.bool)]
    matrix[~known] = matrix[:, ~known] = apart.median() if len(apart) else 0.0
    return matrix.fill_diagonal_(0)
