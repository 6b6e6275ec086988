"""Cuts each client's model where its device, its link and the share that it has of its edge make a step fastest."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from elsa_pl.functional.plans import choose_plans
from elsa_pl.functional.seeding import derive_seed

Numbers = tuple[int, int, int]


class ResourceAwareSplitting(Callback):
    """Chooses how many blocks front, middle and tail of each client have, from the strategy's ``profile``.

    For `elsa_pl`'s strategy. Plans follow the assignment: after each change of it they are chosen anew. Costs are those
    of a full batch of the longest texts, so that memory holds in every step. Plans are chosen before the first round
    too, so the model's ``plan`` cuts no client, and its ``client_plans`` are ignored with a warning.

    Args:
        min_front: blocks that every front has at least: the fewer, the easier an edge recovers tokens.
        min_tail: blocks that every tail has at least.

    Source:
        ELSA (Yang et al. 2026, arXiv 2601.13824) chooses cuts by resources. `elsa_pl.functional.plans` weighs all
        clients of an edge together, because they share it.

    Example:
        >>> splitting = ResourceAwareSplitting(min_front=2)
    """

    def __init__(self, min_front: int = 1, min_tail: int = 1) -> None:
        if min_front < 1 or min_tail < 1:
            raise ValueError(f"min_front and min_tail must be at least 1; got {min_front} and {min_tail}")
        self._min_front, self._min_tail = min_front, min_tail
        self._decided_for: int | None = None
        self._plans: dict[str, Numbers] = {}

    def on_plan_clients(
        self, trainer: "pl.Trainer", plans: Mapping[str, Numbers], assignment: Mapping[str, str]
    ) -> dict[str, Numbers]:
        """The plans for the next round: new ones when the assignment is new, else those there are."""
        strategy: Any = trainer.strategy
        # the lost keep their plans, and leave their share of the edge to others
        living = {client: edge for client, edge in assignment.items() if client not in strategy.lost_clients}
        # of a resumed run too: with other devices, texts or floors, the plans of before do not hold
        decided_for = derive_seed(repr((living, self._min_front, self._min_tail, strategy.workload, strategy.network)))
        if decided_for != self._decided_for:
            if strategy.network is None:
                raise ValueError(
                    "ResourceAwareSplitting needs devices and links, got no profile: set profile.distribution, such as"
                    " mixed, or take the callback out"
                )
            chosen = choose_plans(
                strategy.workload, strategy.network, living, min_front=self._min_front, min_tail=self._min_tail
            )
            self._decided_for = decided_for
            found = {client: (plan.front, plan.middle, plan.tail) for client, plan in chosen.items()}
            self._plans = {**plans, **found}
        return self._plans

    def state_dict(self) -> dict[str, Any]:
        return {"decided_for": self._decided_for, "plans": self._plans}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._decided_for, self._plans = state_dict["decided_for"], dict(state_dict["plans"])
