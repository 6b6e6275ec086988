"""Where to cut the model for each client: the plans of least step time that fit the devices.

The bytes on the links do not depend on the cut, so a plan trades the client's compute for the edge's. One device alone
would give the edge as much as it can whenever the edge is faster. But clients share their edge: in a mixed fleet fast
devices should keep blocks, so that slow ones, and those whose memory holds few blocks, find an edge with time for them.
`choose_plans` weighs that for all clients of each edge together.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from elsa_pl.functional.clock import edge_seconds, shared_seconds, step_seconds
from elsa_pl.functional.costs import Plan, Workload, step_costs
from elsa_pl.functional.profiles import DeviceProfile, NetworkProfile


class _Option(NamedTuple):
    """A plan that fits a client, with what it means for it and for the edge."""

    own_s: float
    edge_flops: float
    plan: Plan


def allowed_plans(num_layers: int, *, min_front: int = 1, min_tail: int = 1) -> list[Plan]:
    """All plans with at least `min_front` and `min_tail` blocks at the ends and one in the middle.

    Args:
        num_layers: blocks of the model.
        min_front: the fewest blocks of the front, at least 1: the deeper the cut, the less the uplink tells of a text.
        min_tail: the fewest blocks of the tail, at least 1.

    Raises:
        ValueError: there is no such plan.

    Example:
        >>> allowed_plans(4, min_front=2)
        [Plan(front=2, middle=1, tail=1)]
    """
    if min_front < 1 or min_tail < 1 or min_front + min_tail >= num_layers:
        raise ValueError(
            "expected 1 <= min_front, 1 <= min_tail, min_front + min_tail < num_layers; got "
            f"min_front={min_front}, min_tail={min_tail}, num_layers={num_layers}: lower min_front or min_tail"
        )
    return [
        Plan(front, num_layers - front - tail, tail)
        for front in range(min_front, num_layers - min_tail)
        for tail in range(min_tail, num_layers - front)
    ]


def choose_plans(
    workload: Workload,
    profile: NetworkProfile,
    assignment: Mapping[str, str],
    *,
    min_front: int = 1,
    min_tail: int = 1,
) -> dict[str, Plan]:
    """The plans under which the slowest client of each edge is fastest, and then all its clients together.

    Starts from what each client would choose if the others chose the same, and from the smallest middles, and changes
    single plans while that helps: the largest step time at the edge must not rise, and it or the sum of all must fall.
    The result is never slower than all clients choosing alone, but need not be the best there is.

    Args:
        workload: what every step does.
        profile: devices and links.
        assignment: client to edge; these clients get plans.
        min_front: see `allowed_plans`.
        min_tail: see `allowed_plans`.

    Returns:
        The plan of each client, in the order of the assignment.

    Raises:
        ValueError: a device's memory holds none of the allowed plans.
    """
    allowed = allowed_plans(workload.shape.num_layers, min_front=min_front, min_tail=min_tail)
    plans: dict[str, Plan] = {}
    for edge in dict.fromkeys(assignment.values()):
        members = [client for client, its_edge in assignment.items() if its_edge == edge]
        options = [
            _options(workload, profile.devices[client], profile.latency_s[client][edge], allowed, client)
            for client in members
        ]
        chosen = _choose_together(options, profile.edges[edge].flops_per_s)
        plans |= {client: option.plan for client, option in zip(members, chosen, strict=True)}
    return {client: plans[client] for client in assignment}


def best_single_plan(
    workload: Workload,
    profile: NetworkProfile,
    assignment: Mapping[str, str],
    *,
    min_front: int = 1,
    min_tail: int = 1,
) -> Plan:
    """The one plan for all clients under which the slowest is fastest: what plans of their own are compared with.

    Of equally fast ones, the plan with the deepest front.

    Args:
        workload: what every step does.
        profile: devices and links.
        assignment: client to edge.
        min_front: see `allowed_plans`.
        min_tail: see `allowed_plans`.

    Raises:
        ValueError: a device's memory holds none of the allowed plans. (If each holds one, all hold the smallest.)
    """
    common = allowed_plans(workload.shape.num_layers, min_front=min_front, min_tail=min_tail)
    for client in assignment:
        common = _fitting(workload, profile.devices[client], common, client)

    def slowest(plan: Plan) -> float:
        return max(fleet_seconds(workload, dict.fromkeys(assignment, plan), profile, assignment).values())

    return min(sorted(common, reverse=True), key=lambda plan: float(f"{slowest(plan):.9g}"))


def fleet_seconds(
    workload: Workload, plans: Mapping[str, Sequence[int]], profile: NetworkProfile, assignment: Mapping[str, str]
) -> dict[str, float]:
    """Seconds of a step of each client when all clients of an edge make theirs at the same time.

    Args:
        workload: what every step does.
        plans: blocks of front, middle and tail, by client.
        profile: devices and links.
        assignment: client to edge.
    """
    costs = {client: step_costs(workload, plans[client]) for client in assignment}
    at_edge: dict[str, float] = {}
    for edge in dict.fromkeys(assignment.values()):
        work = {client: costs[client].middle_flops for client in assignment if assignment[client] == edge}
        at_edge |= edge_seconds(work, profile.edges[edge].flops_per_s)
    return {
        client: step_seconds(
            costs[client],
            profile.devices[client],
            latency_s=profile.latency_s[client][edge],
            edge_s=at_edge[client],
        )
        for client, edge in assignment.items()
    }


def _options(
    workload: Workload, device: DeviceProfile, latency_s: float, allowed: Sequence[Plan], client: str
) -> list[_Option]:
    """The plans that fit the device; of those with the same middle only the fastest, since the edge sees no more.

    Front and tail blocks cost the same, so mostly there are several: then the deepest front, which tells least.
    """
    options: dict[int, _Option] = {}
    for plan in sorted(_fitting(workload, device, allowed, client), reverse=True):
        costs = step_costs(workload, plan)
        own_s = step_seconds(costs, device, latency_s=latency_s, edge_s=0.0)
        before = options.get(plan.middle)
        if before is None or own_s < before.own_s * (1 - 1e-9):
            options[plan.middle] = _Option(own_s, costs.middle_flops, plan)
    return list(options.values())


def _fitting(workload: Workload, device: DeviceProfile, allowed: Sequence[Plan], client: str) -> list[Plan]:
    needed = {plan: step_costs(workload, plan).client_bytes for plan in allowed}
    fitting = [plan for plan in allowed if needed[plan] <= device.memory_bytes]
    if fitting:
        return fitting
    least = min(allowed, key=lambda plan: needed[plan])
    raise ValueError(
        f"{client} holds no allowed cut: expected at least {needed[least] / 1e6:.0f} MB of memory for the smallest,"
        f" {'|'.join(map(str, least))}; got {device.memory_bytes / 1e6:.0f} MB: lower batch size, text length or"
        " min_front, or leave the device out"
    )


def _choose_together(options: Sequence[Sequence[_Option]], edge_flops_per_s: float) -> list[_Option]:
    """One option for each client of an edge: see `choose_plans`."""
    alone = [min(own, key=lambda one: one.own_s + len(options) * one.edge_flops / edge_flops_per_s) for own in options]
    small = [min(own, key=lambda one: one.edge_flops) for own in options]
    results = [_improve(start, options, edge_flops_per_s) for start in (alone, small)]
    return min(results, key=lambda result: _judge(result, edge_flops_per_s))


def _improve(start: Sequence[_Option], options: Sequence[Sequence[_Option]], edge_flops_per_s: float) -> list[_Option]:
    """Change one client's option at a time, while that makes the edge faster."""
    chosen = list(start)
    least, changed = _judge(chosen, edge_flops_per_s), True
    while changed:
        changed = False
        for place, own in enumerate(options):
            for option in own:
                trial = [*chosen[:place], option, *chosen[place + 1 :]]
                judged = _judge(trial, edge_flops_per_s)
                if judged < least:
                    chosen, least, changed = trial, judged, True
    return chosen


def _judge(chosen: Sequence[_Option], edge_flops_per_s: float) -> tuple[float, float]:
    """Seconds of the slowest client, then of all together; rounded, so that sums in another order are no gain."""
    waiting = shared_seconds(np.array([option.edge_flops for option in chosen]), edge_flops_per_s)
    seconds = np.array([option.own_s for option in chosen]) + waiting
    return float(f"{seconds.max():.9g}"), float(f"{seconds.sum():.9g}")
