"""A virtual clock: simulated seconds from counted bytes, costed FLOPs and a network profile, without any sleeping.

    a client's steps   =  its FLOPs / its rate + bytes up and down / bandwidths + messages x latency + time at the edge
    an edge round      =  its slowest client
    a global round     =  the edge whose edge rounds and trip to the cloud take longest in all

Within a step the parts wait for each other, so a client's times add up; clients of an edge, and edges, work at the
same time. Simulated time orders methods and fleets; it leaves out what no profile tells (stragglers by chance,
retransmissions, other users of the device).

Shapes: N clients.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from elsa_pl.functional.costs import StepCosts
from elsa_pl.functional.profiles import DeviceProfile


def edge_seconds(flops: Mapping[str, float], flops_per_s: float) -> dict[str, float]:
    r"""Seconds until the edge is done with each client, when all start together and share it equally.

    Whoever is done leaves its share to the others (egalitarian processor sharing), so client n waits for
    :math:`\sum_k \min(W_n, W_k) / \text{rate}`: for its own work, and for as much of each other client's as is done
    meanwhile. The last is done when all the work is.

    Args:
        flops: work W of each client at this edge.
        flops_per_s: rate of the edge, FLOP/s.

    Returns:
        Seconds by client.

    Source:
        Kleinrock 1967, "Time-shared systems: a theoretical treatment", for the discipline; the sum is our own short
        derivation for simultaneous arrivals.

    Example:
        >>> edge_seconds({"a": 1.0, "b": 3.0}, flops_per_s=1.0)
        {'a': 2.0, 'b': 4.0}
    """
    _require_counts(flops)
    waiting = shared_seconds(np.array(list(flops.values()), dtype=float), flops_per_s)
    return dict(zip(flops, waiting.tolist(), strict=True))


def shared_seconds(flops: npt.NDArray[np.float64], flops_per_s: float) -> npt.NDArray[np.float64]:
    """`edge_seconds` as arrays.

    Args:
        flops: work of each client. [N]
        flops_per_s: rate of the edge, FLOP/s.

    Returns:
        Seconds. [N]
    """
    if not 0 < flops_per_s < math.inf:
        raise ValueError(f"expected a rate above 0 FLOP/s; got {flops_per_s}")
    order = np.argsort(flops, kind="stable")
    work = flops[order]
    # of those with less work all is done before, of those with more as much as of this one
    before, others = np.cumsum(work) - work, len(work) - np.arange(len(work))
    seconds = np.empty(len(work))
    seconds[order] = (before + others * work) / flops_per_s
    return seconds


def client_seconds(
    device: DeviceProfile,
    *,
    latency_s: float,
    flops: float = 0.0,
    up_bytes: float = 0.0,
    down_bytes: float = 0.0,
    num_messages: int = 0,
    edge_s: float = 0.0,
) -> float:
    """Simulated seconds of what a client did: any number of steps, or the way of its adapters.

    Args:
        device: of the client.
        latency_s: between the client and its edge, one way.
        flops: computed on the device.
        up_bytes: sent by the client, on all links and as adapters.
        down_bytes: received by the client.
        num_messages: that waited for each other, in either direction.
        edge_s: seconds that the edge needed for it: see `edge_seconds`.

    Example:
        >>> phone = DeviceProfile(flops_per_s=1e10, memory_bytes=1e9, up_bytes_per_s=1e6, down_bytes_per_s=4e6)
        >>> client_seconds(phone, latency_s=0.02, flops=5e9, up_bytes=1e6, down_bytes=2e6, num_messages=5, edge_s=1.0)
        3.1
    """
    counts = {"flops": flops, "up_bytes": up_bytes, "down_bytes": down_bytes, "num_messages": num_messages}
    _require_counts({**counts, "latency_s": latency_s, "edge_s": edge_s})
    computing = flops / device.flops_per_s
    sending = up_bytes / device.up_bytes_per_s + down_bytes / device.down_bytes_per_s
    return computing + sending + num_messages * latency_s + edge_s


def step_seconds(costs: StepCosts, device: DeviceProfile, *, latency_s: float, edge_s: float) -> float:
    """Simulated seconds of one training step, from the cost model alone: `client_seconds` of its costs.

    Args:
        costs: of the step under the client's plan.
        device: of the client.
        latency_s: between the client and its edge, one way.
        edge_s: seconds that the edge needs for it.
    """
    return client_seconds(
        device,
        latency_s=latency_s,
        flops=costs.client_flops,
        up_bytes=costs.up_bytes,
        down_bytes=costs.down_bytes,
        num_messages=costs.num_messages,
        edge_s=edge_s,
    )


def trip_seconds(num_bytes: float, *, bytes_per_s: float, latency_s: float) -> float:
    """Simulated seconds of one message, such as an edge's adapters on their way to the cloud.

    Example:
        >>> trip_seconds(1e6, bytes_per_s=1e7, latency_s=0.02)
        0.12000000000000001
    """
    if not 0 < bytes_per_s < math.inf:
        raise ValueError(f"expected a bandwidth above 0 bytes/s; got {bytes_per_s}")
    _require_counts({"num_bytes": num_bytes, "latency_s": latency_s})
    return latency_s + num_bytes / bytes_per_s


def round_seconds(edge_rounds: Mapping[str, Sequence[Mapping[str, float]]], cloud_s: Mapping[str, float]) -> float:
    """Simulated seconds of a global round.

    Edges wait for their own clients in each edge round, and for each other only at the cloud.

    Args:
        edge_rounds: by edge, and for each of its edge rounds the seconds of each client that took part.
        cloud_s: by edge, the seconds of the trips to the cloud and back.

    Returns:
        Seconds; an edge without clients does not count, and a round without any takes no time.

    Raises:
        ValueError: an edge with clients has no trip to the cloud.

    Example:
        >>> round_seconds({"e": [{"a": 1.0, "b": 4.0}, {"a": 3.0, "b": 2.0}], "f": [{"c": 5.0}]}, {"e": 0.5, "f": 1.0})
        7.5
    """
    longest = 0.0
    for edge, rounds in edge_rounds.items():
        busy = [clients for clients in rounds if clients]
        if not busy:
            continue
        if edge not in cloud_s:
            raise ValueError(f"expected the seconds from each edge to the cloud; got none for {edge}")
        for clients in busy:
            _require_counts(clients)
        longest = max(longest, cloud_s[edge] + sum(max(clients.values()) for clients in busy))
    return longest


def _require_counts(counts: Mapping[str, float]) -> None:
    for name, value in counts.items():
        if not 0 <= value < math.inf:  # also refuses nan
            raise ValueError(f"expected a finite number of at least 0 for {name}; got {value}")
