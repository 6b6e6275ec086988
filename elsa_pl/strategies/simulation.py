"""Simulated seconds of a global round: what the clients did, on the devices and links of the profile."""

from collections.abc import Mapping
from dataclasses import replace

from elsa_pl.functional.clock import client_seconds, edge_seconds, round_seconds, trip_seconds
from elsa_pl.functional.costs import StepCosts, Workload, step_costs
from elsa_pl.functional.profiles import NetworkProfile
from elsa_pl.rpc.messages import Work
from elsa_pl.strategies.placement import Placement


def simulate_round(
    work: Mapping[str, Work],
    placement: Placement,
    network: NetworkProfile,
    workloads: Mapping[str, Workload],
    adapter_bytes: int,
    edges_sent: Mapping[str, int],
) -> float:
    """Seconds of a round.

    All edge rounds of a client count as one stretch of work: the slowest client is the slowest in each of them.

    Args:
        work: what each client did, with the bytes that were counted.
        placement: edge and plan of each client in this round.
        network: devices and links.
        workloads: what a step of each client costs is counted from.
        adapter_bytes: of what the cloud sent to each edge.
        edges_sent: bytes of what each edge sent to the cloud.
    """
    costs = {
        client: _costs(done, workloads[client], placement, client) for client, done in work.items() if done.num_steps
    }
    by_edge: dict[str, dict[str, float]] = {}
    for client, cost in costs.items():
        by_edge.setdefault(placement.assignment[client], {})[client] = cost.middle_flops
    rounds: dict[str, list[dict[str, float]]] = {}
    for edge, flops in by_edge.items():
        waiting = edge_seconds(flops, network.edges[edge].flops_per_s)
        rounds[edge] = [
            {
                client: client_seconds(
                    network.devices[client],
                    latency_s=network.latency_s[client][edge],
                    flops=costs[client].client_flops,
                    up_bytes=work[client].up_bytes,
                    down_bytes=work[client].down_bytes,
                    num_messages=costs[client].num_messages * work[client].num_steps,
                    edge_s=waiting[client],
                )
                for client in flops
            }
        ]
    cloud_s = {
        name: sum(
            trip_seconds(size, bytes_per_s=edge.cloud_bytes_per_s, latency_s=edge.cloud_latency_s)
            for size in (edges_sent.get(name, 0), adapter_bytes)
            if size  # clients alone need no cloud
        )
        for name, edge in network.edges.items()
    }
    return round_seconds(rounds, cloud_s)


def _costs(done: Work, workload: Workload, placement: Placement, client: str) -> StepCosts:
    """Of all the client's steps together: a single one of all its texts, padded as they were on average."""
    num_tokens = max(1, round(done.num_tokens / done.num_sequences))
    plan = placement.plans[client]
    assert plan.middle is not None, "plans are resolved before they are placed"
    return step_costs(
        replace(workload, batch_size=done.num_sequences, num_tokens=num_tokens), (plan.front, plan.middle, plan.tail)
    )
