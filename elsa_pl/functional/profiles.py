"""How fast the devices and links of a federation are: written down, or drawn from a named distribution.

A run on one machine says nothing of a fleet of phones: its clients are equally fast and its links are memory copies.
A profile gives every device and link numbers, from which `elsa_pl.functional.clock` computes simulated time, clients
get their edges and `elsa_pl.functional.plans` cuts the model. All in SI units: seconds, bytes, FLOP/s. The kinds of
devices are orders of magnitude of things that can be bought, and no measurements; who knows better writes it down.

Shapes: N clients, E edges.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from elsa_pl.functional.seeding import derive_seed

Distribution = Literal["uniform", "mixed"]

SIDE_KM: Final = 1000.0
"""Clients and edges of ``mixed`` lie in a square of this side, as large as a mid-sized country."""
SECONDS_PER_KM: Final = 1e-5
"""One way. Light needs 5 microseconds per kilometre of fibre, and cables are about twice as long as the bee line."""


def _require_positive(numbers: Any, where: str, may_be_zero: Sequence[str] = ()) -> None:
    """Refuse a dataclass with a number that is not above 0 and finite; None stands for no number."""
    for entry in fields(numbers):
        value = getattr(numbers, entry.name)
        if value is None or 0 < value < math.inf or (value == 0 and entry.name in may_be_zero):
            continue
        least = ">= 0" if entry.name in may_be_zero else "> 0"
        raise ValueError(f"expected {where}.{entry.name} {least} and finite; got {value}: correct the number")


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What one client's device can do."""

    flops_per_s: float
    """Floating point operations per second that training sustains, a quarter or less of what is on the data sheet."""

    memory_bytes: float
    """Memory for weights, activations and optimizer: what system, interpreter and libraries leave."""

    up_bytes_per_s: float
    """Bandwidth from the device to its edge."""

    down_bytes_per_s: float
    """Bandwidth from the edge to the device."""

    def __post_init__(self) -> None:
        _require_positive(self, type(self).__name__)


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What is known of one client's device; the rest comes from the distribution."""

    flops_per_s: float | None = None
    """See `DeviceProfile`."""

    memory_bytes: float | None = None
    """See `DeviceProfile`."""

    up_bytes_per_s: float | None = None
    """See `DeviceProfile`."""

    down_bytes_per_s: float | None = None
    """See `DeviceProfile`."""


@dataclass(frozen=True, kw_only=True)
class EdgeProfile:
    """What one edge can do. The defaults are a mini PC of four cores behind a wired line of 100 Mbit/s."""

    flops_per_s: float = 5e10
    """Floating point operations per second that training sustains, shared by the clients of the edge."""

    cloud_bytes_per_s: float = 12.5e6
    """Bandwidth between edge and cloud, in each direction."""

    cloud_latency_s: float = 0.02
    """From edge to cloud, one way."""

    def __post_init__(self) -> None:
        _require_positive(self, type(self).__name__, may_be_zero=("cloud_latency_s",))


@dataclass(frozen=True)
class _Kind:
    device: DeviceProfile
    access_s: float
    """Latency of the last mile, one way: everything but the distance."""


# A laptop: 8 cores with AVX2 have a peak near 700 GFLOP/s; 4 GB to spare; a cable line of 20 and 100 Mbit/s, Wi-Fi.
_FAST = _Kind(DeviceProfile(flops_per_s=1e11, memory_bytes=4e9, up_bytes_per_s=2.5e6, down_bytes_per_s=12.5e6), 0.005)
# A Raspberry Pi 4: four cores, peak near 50 GFLOP/s, 2 GB; a DSL line of 10 and 50 Mbit/s.
_SLOW = _Kind(DeviceProfile(flops_per_s=1e10, memory_bytes=1e9, up_bytes_per_s=1.25e6, down_bytes_per_s=6.25e6), 0.010)
# An app in the background of a phone: the system ends it if it keeps more than about 128 MB; LTE, 10 and 40 Mbit/s.
_SMALL = _Kind(DeviceProfile(flops_per_s=3e10, memory_bytes=128e6, up_bytes_per_s=1.25e6, down_bytes_per_s=5e6), 0.020)
# A phone in the foreground, for fleets of one kind.
_USUAL = _Kind(DeviceProfile(flops_per_s=3e10, memory_bytes=1e9, up_bytes_per_s=1.25e6, down_bytes_per_s=5e6), 0.020)


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Where the numbers of a fleet come from."""

    distribution: Distribution | None = None
    """``uniform``: all devices are phones of one kind, equally far from all edges. ``mixed``: laptops, Raspberry Pis
    and apps with little memory in equal parts, at random places of a square of 1,000 km, as the edges are. None: every
    number is written down below."""

    clients: dict[str, DeviceSettings] | None = None
    """Devices by client; what is left out is drawn."""

    edge: EdgeProfile = EdgeProfile()
    """Of each edge that `edges` does not name."""

    edges: dict[str, EdgeProfile] | None = None
    """Single edges, by name, whole: what is left out is the default of `EdgeProfile`, whatever `edge` says."""

    latency_s: dict[str, dict[str, float]] | None = None
    """From client to edge, by client and edge, one way, in seconds: half of a ping; what is left out is drawn."""

    def __post_init__(self) -> None:
        for client, device in (self.clients or {}).items():
            _require_positive(device, f"profile.clients.{client}")
        for client, row in (self.latency_s or {}).items():
            for edge, value in row.items():
                if not 0 <= value < math.inf:
                    raise ValueError(f"expected profile.latency_s.{client}.{edge} >= 0 seconds; got {value}")


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """The devices and links of a fleet."""

    devices: dict[str, DeviceProfile]
    """By client."""

    edges: dict[str, EdgeProfile]
    """By edge."""

    latency_s: dict[str, dict[str, float]]
    """From client to edge, one way, by client and edge."""


def draw_profile(settings: ProfileSettings, clients: Sequence[str], edges: Sequence[str], seed: int) -> NetworkProfile:
    """Fill in what the settings leave open: a function of settings, names and seed, the same in every process.

    Args:
        settings: what the user wrote.
        clients: names of all clients. [N]
        edges: names of all edges. [E]
        seed: the run's.

    Raises:
        ValueError: names that are not in the run, or numbers that are missing without a distribution.

    Example:
        >>> profile = draw_profile(ProfileSettings(distribution="uniform"), ["a", "b"], ["edge-0"], seed=0)
        >>> profile.devices["a"].flops_per_s, profile.latency_s["b"]
        (30000000000.0, {'edge-0': 0.02})
    """
    written = settings.clients or {}
    latencies = settings.latency_s or {}
    _require_known("clients", written, clients)
    _require_known("edges", settings.edges or {}, edges)
    _require_known("latency_s", latencies, clients)
    for client, row in latencies.items():
        _require_known(f"latency_s.{client}", row, edges)
    kinds: Mapping[str, _Kind] = {}
    drawn: dict[str, dict[str, float]] = {}
    if settings.distribution == "uniform":
        kinds = dict.fromkeys(clients, _USUAL)
        drawn = {client: dict.fromkeys(edges, _USUAL.access_s) for client in clients}
    elif settings.distribution == "mixed":
        kinds, places = _draw_mixed(clients, edges, seed)
        matrix = latencies_s(
            [places[client] for client in clients],
            [places[edge] for edge in edges],
            [kinds[client].access_s for client in clients],
        )
        drawn = {c: dict(zip(edges, row, strict=True)) for c, row in zip(clients, matrix.tolist(), strict=True)}
    return NetworkProfile(
        devices={
            client: _complete(client, written.get(client, DeviceSettings()), kinds.get(client)) for client in clients
        },
        edges={edge: (settings.edges or {}).get(edge, settings.edge) for edge in edges},
        latency_s={
            client: _complete_row(client, {**drawn.get(client, {}), **latencies.get(client, {})}, edges)
            for client in clients
        },
    )


def latencies_s(clients_km: npt.ArrayLike, edges_km: npt.ArrayLike, access_s: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Latency from each client to each edge, one way: that of the last mile, and the distance times `SECONDS_PER_KM`.

    Args:
        clients_km: places of the clients in a plane, in km. [N, 2]
        edges_km: places of the edges. [E, 2]
        access_s: latency of each client's last mile. [N]

    Returns:
        Seconds. [N, E]

    Example:
        >>> latencies_s([[0, 0], [300, 400]], [[0, 0]], [0.005, 0.005])
        array([[0.005],
               [0.01 ]])
    """
    apart = np.asarray(clients_km, dtype=float)[:, None] - np.asarray(edges_km, dtype=float)[None]
    access = np.asarray(access_s, dtype=float)[:, None]
    result: npt.NDArray[np.float64] = access + np.linalg.norm(apart, axis=2) * SECONDS_PER_KM
    return result


def _draw_mixed(
    clients: Sequence[str], edges: Sequence[str], seed: int
) -> tuple[dict[str, _Kind], dict[str, tuple[float, float]]]:
    """Kinds in equal parts, up to one, and a place for everybody."""
    generator = np.random.default_rng(derive_seed(seed, "profile", "mixed"))
    dealt = generator.permutation(np.arange(len(clients)) % 3)
    kinds = {client: (_FAST, _SLOW, _SMALL)[kind] for client, kind in zip(clients, dealt, strict=True)}
    points = generator.uniform(0, SIDE_KM, size=(len(clients) + len(edges), 2)).tolist()
    return kinds, {name: (x, y) for name, (x, y) in zip([*clients, *edges], points, strict=True)}


def _complete(client: str, written: DeviceSettings, kind: _Kind | None) -> DeviceProfile:
    given = {f.name: value for f in fields(written) if (value := getattr(written, f.name)) is not None}
    if kind is not None:
        return replace(kind.device, **given)
    if missing := [f.name for f in fields(DeviceProfile) if f.name not in given]:
        raise ValueError(
            f"expected a number for each of {missing} of {client}; got none: write them under profile.clients.{client},"
            " or set profile.distribution to uniform or mixed"
        )
    return DeviceProfile(**given)


def _complete_row(client: str, row: dict[str, float], edges: Sequence[str]) -> dict[str, float]:
    if missing := [edge for edge in edges if edge not in row]:
        raise ValueError(
            f"expected the latency from {client} to each edge; got none for {_shorten(missing)}: write it under"
            f" profile.latency_s.{client}, or set profile.distribution to uniform or mixed"
        )
    return {edge: row[edge] for edge in edges}


def _require_known(where: str, named: Iterable[str], known: Sequence[str]) -> None:
    if unknown := sorted(set(named) - set(known)):
        raise ValueError(
            f"profile.{where} names {_shorten(unknown)}; expected some of {_shorten(known)}: correct the names"
        )


def _shorten(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
