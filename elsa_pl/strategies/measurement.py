"""What the links between sites are like, measured over the RPC that training uses.

A profile can be written down for a simulation. Between sites nobody knows it beforehand, and it is what placing clients
depends on, so each host asks each edge when the run starts.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from elsa_pl.functional.profiles import DeviceSettings, ProfileSettings
from elsa_pl.rpc import remote

_REPEATS = 3
_PAYLOAD_BYTES = 250_000


@dataclass(frozen=True)
class Link:
    """A way between a client and an edge.

    Attributes:
        latency_s: one way.
        up_bytes_per_s: from the client.
        down_bytes_per_s: to the client.
    """

    latency_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float

    def plain(self) -> tuple[float, float, float]:
        """The form that travels."""
        return self.latency_s, self.up_bytes_per_s, self.down_bytes_per_s


def measure_links(edges: Mapping[str, str], timeout_s: float) -> dict[str, Link]:
    """Measure the ways from this process to all edges.

    Latency is half of the median time of empty calls; bandwidths are those of a quarter of a megabyte in calls of one
    direction, less the empty call's time.

    Args:
        edges: edge name to worker.
        timeout_s: seconds until one call fails.

    Raises:
        RemoteError: an edge does not answer.
    """
    return {edge: _measure(worker, timeout_s) for edge, worker in edges.items()}


def with_links(
    settings: ProfileSettings, links: Mapping[str, Mapping[str, tuple[float, float, float]]]
) -> ProfileSettings:
    """Settings in which the measured latencies and bandwidths stand in the place of written ones.

    Args:
        settings: for everything else, such as how fast devices compute.
        links: by client and edge, see `Link.plain`. A device has one bandwidth: the median over the edges.
    """
    devices = dict(settings.clients or {})
    for client, ways in links.items():
        _, up, down = (statistics.median(numbers) for numbers in zip(*ways.values(), strict=True))
        known = devices.get(client, DeviceSettings())
        devices[client] = replace(known, up_bytes_per_s=up, down_bytes_per_s=down)
    latency_s = {client: {edge: numbers[0] for edge, numbers in ways.items()} for client, ways in links.items()}
    return replace(settings, clients=devices, latency_s=latency_s)


def _measure(worker: str, timeout_s: float) -> Link:
    def seconds(method: str, *args: object) -> float:
        start = time.perf_counter()
        remote.call(worker, "pulse", method, *args, timeout_s=timeout_s)
        return time.perf_counter() - start

    payload = torch.zeros(_PAYLOAD_BYTES, dtype=torch.uint8)
    seconds("ping")  # connects
    trip = statistics.median(seconds("ping") for _ in range(_REPEATS))
    up = statistics.median(seconds("take", payload) for _ in range(_REPEATS))
    down = statistics.median(seconds("give", _PAYLOAD_BYTES) for _ in range(_REPEATS))
    least = 1e-6  # on one machine that much can be as fast as nothing
    return Link(trip / 2, _PAYLOAD_BYTES / max(up - trip, least), _PAYLOAD_BYTES / max(down - trip, least))
