"""Coming together: everybody, or an error that says who is missing."""

import socket
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from elsa_pl.errors import ConfigurationError, LaunchError
from elsa_pl.rpc import lifecycle
from elsa_pl.rpc.lifecycle import Address, choose_transport, free_port, meet
from elsa_pl.rpc.messages import Member, Role


@pytest.fixture(autouse=True)
def _kept_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one store and keeps it; here threads play the processes, so all stores are kept."""
    kept = []

    def make(*args: Any, **kwargs: Any) -> dist.TCPStore:
        kept.append(dist.TCPStore(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(lifecycle, "dist", types.SimpleNamespace(**{**vars(dist), "TCPStore": make}))


def meet_all(places: list[tuple[str, Role]], world_size: int, timeout_s: float) -> list[list[Member] | Exception]:
    """What `meet` gives to each of several, who are threads here and processes otherwise."""
    port = free_port()
    ended = threading.Barrier(len(places))

    def one(rank: int, name: str, role: Role) -> list[Member] | Exception:
        try:
            return meet(Address("127.0.0.1", port, rank, world_size), name, role, timeout_s)
        except Exception as error:
            return error
        finally:
            ended.wait()  # rank 0 has the store, so it leaves with the others

    with ThreadPoolExecutor(len(places)) as pool:
        calls = [pool.submit(one, rank, name, role) for rank, (name, role) in enumerate(places)]
        return [call.result() for call in calls]


def test_all_come() -> None:
    expected = [Member("cloud", "cloud", 0), Member("north", "host", 1), Member("sky", "edge", 2)]
    for members in meet_all([("cloud", "cloud"), ("north", "host"), ("sky", "edge")], 3, 20):
        assert members == expected


def test_alone() -> None:
    assert meet(Address("127.0.0.1", free_port(), 0, 1), "cloud", "cloud", 5) == [Member("cloud", "cloud", 0)]


def test_somebody_is_missing() -> None:
    begun = time.monotonic()
    for error in meet_all([("cloud", "cloud"), ("north", "host")], 4, 1.0):
        assert isinstance(error, LaunchError)
        assert "2 of 4 processes (ranks [2, 3]) did not come within 1 s" in str(error)
    assert time.monotonic() - begun < 10


def test_nobody_listens() -> None:
    address = Address("127.0.0.1", free_port(), 1, 2)
    with pytest.raises(LaunchError, match=f"could not reach 127.0.0.1:{address.port} within 1 s"):
        meet(address, "north", "host", 1.0)


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"could not listen on 127.0.0.1:{port}; another program"):
            meet(Address("127.0.0.1", port, 0, 1), "cloud", "cloud", 2.0)


def test_free_ports_are_not_those_that_the_system_hands_out() -> None:
    """Else any connection could take one before its owner listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        handed_out = probe.getsockname()[1]
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if lowest < 20_000:
        pytest.skip("this machine hands out nearly all ports")
    assert handed_out >= lowest, "the system keeps to its range, or this shows nothing"
    ports = {free_port() for _ in range(50)}
    assert max(ports) < lowest
    assert len(ports) > 40, "drawn at random, for runs that start together"
    (taken, *_) = ports
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        assert taken not in {free_port() for _ in range(200)}


def test_same_name_twice() -> None:
    for error in meet_all([("cloud", "cloud"), ("north", "host"), ("north", "host")], 3, 20):
        assert isinstance(error, ConfigurationError)
        assert "'north'" in str(error)
        assert "[1, 2]" in str(error)


def test_rank_0_ends_while_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(keys: list[str]) -> bool:
        raise dist.DistNetworkError("Failed to recv, got 0 bytes")

    monkeypatch.setattr(dist.PrefixStore, "check", lambda store, keys: check(keys))
    with pytest.raises(LaunchError, match="the process of rank 0 has ended"):
        meet(Address("127.0.0.1", free_port(), 0, 2), "cloud", "cloud", 5)


def test_check_may_end_the_wait() -> None:
    def check() -> None:
        raise LaunchError("host-0 ended with exit code 1")

    with pytest.raises(LaunchError, match="host-0 ended"):
        meet(Address("127.0.0.1", free_port(), 0, 2), "cloud", "cloud", 60, check)


def test_transport() -> None:
    assert choose_transport("shm", 100) == "shm"
    assert choose_transport("uv", 1) == "uv"
    assert choose_transport("auto", 10_000) == "uv"
