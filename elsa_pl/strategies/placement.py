"""Which edge each client has and how its model is cut: decided at the cloud, settled in every process.

The placement changes between global rounds only. Then every replica takes over the published adapters anyway, so a
client that moves to another edge, or is cut elsewhere, loses nothing but the optimizer states of the round before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl

from elsa_pl.hooks import hooks
from elsa_pl.partition import SplitPlan

Plain = tuple[dict[str, str], dict[str, tuple[int, int, int]]]


@dataclass(frozen=True)
class Placement:
    """Edge and plan of each client.

    Attributes:
        assignment: client to edge.
        plans: client to its plan, with the middle filled in.
    """

    assignment: dict[str, str]
    plans: dict[str, SplitPlan]

    def plain(self) -> Plain:
        """The form that travels."""
        return self.assignment, {client: _numbers(plan) for client, plan in self.plans.items()}

    @staticmethod
    def of(plain: Plain) -> "Placement":
        """The inverse of `plain`."""
        return Placement(plain[0], {client: SplitPlan(*numbers) for client, numbers in plain[1].items()})


def _numbers(plan: SplitPlan) -> tuple[int, int, int]:
    assert plan.middle is not None, "plans are resolved before they are placed"
    return plan.front, plan.middle, plan.tail


def decide(trainer: "pl.Trainer", placement: Placement, check_plan: Callable[[str, SplitPlan], None]) -> Placement:
    """Ask the callbacks for another placement.

    A callback takes part by having one of these, or both; all assignments are made before the plans, because a plan
    depends on the edge and on how many share it:

    - ``on_assign_clients(trainer, assignment) -> assignment``, client name to edge name;
    - ``on_plan_clients(trainer, plans, assignment) -> plans``, client name to the blocks of (front, middle, tail).

    Args:
        trainer: its callbacks.
        placement: what they start from.
        check_plan: called with each client that gets another plan, and the plan; raises if the model cannot be cut so.
    """
    assignment, plans = placement.plain()
    for hook in hooks(trainer, "on_assign_clients"):
        assignment = hook(trainer, assignment)
    for hook in hooks(trainer, "on_plan_clients"):
        plans = hook(trainer, plans, assignment)
    decided = Placement.of((assignment, plans))
    for client, plan in decided.plans.items():
        if plan != placement.plans[client]:
            check_plan(client, plan)
    return decided
