"""Who runs where, in each layout."""

import pytest

from elsa_pl.errors import ConfigurationError
from elsa_pl.rpc.messages import Member, Role
from elsa_pl.strategies.topology import Layout, Topology, processes, simulate, sites

CLIENTS = [f"client-{index}" for index in range(5)]


def members(*places: tuple[str, Role]) -> list[Member]:
    return [Member(name, role, rank) for rank, (name, role) in enumerate(places)]


def place(layout: Layout, num_edges: int, num_hosts: int, edge_of: dict[str, str] | None = None) -> Topology:
    here = members(*processes(layout, num_edges, num_hosts))
    return simulate(layout, here, CLIENTS, num_edges, edge_of or {})


def test_processes() -> None:
    assert processes("single", 3, 2) == [("cloud", "cloud")]
    assert processes("tiers", 3, 2) == [("cloud", "cloud"), ("host-0", "host"), ("host-1", "host")]
    assert [name for name, _ in processes("full", 2, 1)] == ["cloud", "edge-0", "edge-1", "host-0"]


def test_single() -> None:
    topology = place("single", 2, 1)
    assert topology.edges == {"edge-0": "cloud", "edge-1": "cloud"}
    assert set(topology.hosts.values()) == {"cloud"}
    assert topology.evaluators == ("cloud",)


def test_hosts_take_consecutive_blocks() -> None:
    topology = place("tiers", 1, 2)
    assert topology.hosts == dict(zip(CLIENTS, ["host-0"] * 3 + ["host-1"] * 2, strict=True))
    assert topology.evaluators == ("host-0", "host-1")
    assert topology.clients == CLIENTS


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 4, 5])
def test_no_host_is_idle(num_hosts: int) -> None:
    assert len(set(place("full", 2, num_hosts).hosts.values())) == num_hosts


def test_clients_are_dealt_to_the_edges() -> None:
    topology = place("full", 2, 1)
    assert topology.edges == {"edge-0": "edge-0", "edge-1": "edge-1"}
    assert topology.clients_of("edge-0") == ["client-0", "client-2", "client-4"]
    assert topology.clients_of("edge-1") == ["client-1", "client-3"]


def test_edge_of() -> None:
    topology = place("tiers", 2, 1, {"client-0": "edge-1"})
    assert topology.assignment["client-0"] == "edge-1"
    assert topology.assignment["client-2"] == "edge-0"


@pytest.mark.parametrize("edge_of", [{"client-9": "edge-0"}, {"client-0": "edge-9"}])
def test_edge_of_unknown(edge_of: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"edge_of names \['(client|edge)-9'\]"):
        place("single", 2, 1, edge_of)


def test_more_edges_or_hosts_than_clients() -> None:
    with pytest.raises(ConfigurationError, match="num_edges=6 for 5 clients"):
        place("single", 6, 1)
    with pytest.raises(ConfigurationError, match="num_hosts=6 for 5 clients"):
        place("tiers", 1, 6)


def test_lost_with_a_host() -> None:
    assert place("full", 2, 2).lost_with("host-1") == ("host-1", "client-3", "client-4")


def test_lost_with_an_edge() -> None:
    assert place("full", 2, 2).lost_with("edge-1") == ("edge-1", "client-1", "client-3")


def test_lost_with_a_site() -> None:
    topology = sites(members(("sky", "cloud"), ("north", "host"), ("east", "edge"), ("south", "host")), {})
    assert topology.lost_with("north") == ("north",)
    assert topology.lost_with("east") == ("east", "north", "south")


def test_sites() -> None:
    topology = sites(
        members(("north", "host"), ("sky", "cloud"), ("south", "host"), ("e", "edge"), ("f", "edge")), {"north": "f"}
    )
    assert topology.cloud == "sky"
    assert topology.hosts == {"north": "north", "south": "south"}
    assert topology.edges == {"e": "e", "f": "f"}
    assert topology.assignment == {"north": "f", "south": "f"}
    assert topology.evaluators == ("north", "south")


@pytest.mark.parametrize(
    ("places", "counts"),
    [
        ([("a", "host"), ("b", "edge")], "0 x cloud, 1 x edge, 1 x host"),
        ([("a", "cloud"), ("b", "cloud"), ("c", "edge"), ("d", "host")], "2 x cloud, 1 x edge, 1 x host"),
        ([("a", "cloud"), ("b", "host")], "1 x cloud, 0 x edge, 1 x host"),
        ([("a", "cloud"), ("b", "edge")], "1 x cloud, 1 x edge, 0 x host"),
        ([("a", "cloud"), ("b", "edge"), ("c", "edge"), ("d", "host")], "1 x cloud, 2 x edge, 1 x host"),
    ],
)
def test_sites_that_do_not_make_a_run(places: list[tuple[str, Role]], counts: str) -> None:
    with pytest.raises(ConfigurationError, match=counts):
        sites(members(*places), {})
