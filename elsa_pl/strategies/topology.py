"""Who runs where: the layouts, and the places of cloud, edges and clients among the processes.

Pure functions of the settings and of the names that the processes announced. Roles go by RPC name; a rank only tells
a process of a simulation which of the layout's names it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elsa_pl.errors import ConfigurationError
from elsa_pl.rpc.messages import Member, Role

Layout = Literal["single", "tiers", "full", "site"]

CLOUD = "cloud"


def processes(layout: Layout, num_edges: int, num_hosts: int) -> list[tuple[str, Role]]:
    """Name and role of each process of a simulation layout, in rank order; rank 0 is the cloud.

    - ``single``: one process for everything.
    - ``tiers``: the cloud's process also runs the edges; hosts run the clients.
    - ``full``: a process for the cloud, for each edge and for each host.

    Example:
        >>> processes("tiers", 2, 1)
        [('cloud', 'cloud'), ('host-0', 'host')]
    """
    names: list[tuple[str, Role]] = [(CLOUD, "cloud")]
    if layout == "full":
        names += [(f"edge-{index}", "edge") for index in range(num_edges)]
    if layout in ("tiers", "full"):
        names += [(f"host-{index}", "host") for index in range(num_hosts)]
    return names


@dataclass(frozen=True)
class Topology:
    """Places of cloud, edges and clients.

    Attributes:
        cloud: the cloud's worker.
        edges: edge name to worker.
        hosts: client to the worker that hosts it, in client order.
        assignment: client to edge.
        evaluators: the workers that hold evaluation data, in order.
    """

    cloud: str
    edges: dict[str, str]
    hosts: dict[str, str]
    assignment: dict[str, str]
    evaluators: tuple[str, ...]

    @property
    def clients(self) -> list[str]:
        """All clients, in the order that all processes share."""
        return list(self.hosts)

    def clients_of(self, edge: str) -> list[str]:
        """The clients assigned to an edge."""
        return [client for client, its_edge in self.assignment.items() if its_edge == edge]

    def lost_with(self, worker: str) -> tuple[str, ...]:
        """What does not answer any more once a worker is gone: itself, its edges, their clients and its own."""
        edges = {edge for edge, place in self.edges.items() if place == worker}
        clients = [c for c in self.clients if self.hosts[c] == worker or self.assignment[c] in edges]
        return (worker, *sorted(edges - {worker}), *(name for name in clients if name != worker))


def simulate(
    layout: Layout, members: Sequence[Member], clients: Sequence[str], num_edges: int, edge_of: dict[str, str]
) -> Topology:
    """Places in the layouts ``single``, ``tiers`` and ``full``.

    Clients are spread over the hosts in consecutive blocks, and dealt to the edges in turn unless ``edge_of`` says
    otherwise.

    Raises:
        ConfigurationError: more edges or hosts than clients, or ``edge_of`` names what is not there.
    """
    if num_edges > len(clients):
        raise ConfigurationError(
            f"every edge needs a client: got num_edges={num_edges} for {len(clients)} clients; lower num_edges or raise"
            " data.num_clients"
        )
    workers = [member.name for member in members if member.role == "host"] or [CLOUD]
    if len(workers) > len(clients):
        raise ConfigurationError(
            f"every host needs a client: got num_hosts={len(workers)} for {len(clients)} clients; lower num_hosts"
        )
    edges = {f"edge-{index}": f"edge-{index}" if layout == "full" else CLOUD for index in range(num_edges)}
    hosts = {client: workers[index * len(workers) // len(clients)] for index, client in enumerate(clients)}
    return Topology(CLOUD, edges, hosts, _assign(clients, list(edges), edge_of), tuple(workers))


def sites(members: Sequence[Member], edge_of: dict[str, str]) -> Topology:
    """Places in the layout ``site``: each host is the client of its own name.

    Raises:
        ConfigurationError: not exactly one cloud, no edge, no host, or more edges than hosts.
    """
    by_role = {role: [member.name for member in members if member.role == role] for role in ("cloud", "edge", "host")}
    counts = ", ".join(f"{len(names)} x {role}" for role, names in by_role.items())
    if len(by_role["cloud"]) != 1 or not by_role["edge"] or len(by_role["edge"]) > len(by_role["host"]):
        raise ConfigurationError(
            f"the site layout needs one cloud, at least one edge, and at least as many hosts as edges; got {counts}:"
            " set role and name for each process"
        )
    clients = by_role["host"]
    edges = {name: name for name in by_role["edge"]}
    hosts = {client: client for client in clients}
    return Topology(by_role["cloud"][0], edges, hosts, _assign(clients, list(edges), edge_of), tuple(clients))


def _assign(clients: Sequence[str], edges: list[str], edge_of: dict[str, str]) -> dict[str, str]:
    unknown = [name for name in edge_of if name not in clients] + [e for e in edge_of.values() if e not in edges]
    if unknown:
        raise ConfigurationError(
            f"edge_of names {unknown}; the clients are {list(clients)[:8]} and the edges {edges}: correct the names"
        )
    return {client: edge_of.get(client, edges[index % len(edges)]) for index, client in enumerate(clients)}
