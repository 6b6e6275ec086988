"""Coming together, starting RPC, and ending it.

`meet` runs before RPC exists: every process announces its name and role in a TCP store and waits, in short slices,
until all have. Without it a process that fails before it joins (a wrong path on one site, say) would leave the
others inside RPC's own start, which waits in C++ and hears no signal.

`stop` ends in the same way: after success, and with a deadline, it waits until all have come.
"""

import ctypes
import dataclasses
import json
import logging
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch.distributed as dist
from torch.distributed import rpc

from elsa_pl.errors import ConfigurationError, ElsaError, LaunchError
from elsa_pl.rpc import unpickling
from elsa_pl.rpc.messages import Member, Role

log = logging.getLogger(__name__)

Transport = Literal["auto", "uv", "shm"]

_POLL_S = 0.05
_FIRST_PORT, _PORT_TRIES = 10_000, 100
_met: tuple[dist.Store, "Address"] | None = None
# shm burns about half a core per idle process (it busy-polls), so it needs cores to spare.
_CORES_PER_PROCESS_FOR_SHM = 4


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the processes of a run meet."""

    host: str
    port: int
    rank: int
    world_size: int


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on.

    Not one of those that the system hands out by itself: before its owner listens, any connection of another program
    could be given it, even one of those that already try to reach it.

    Raises:
        LaunchError: none of many was free.
    """
    import socket

    draw = random.SystemRandom()  # seeded runs that start together must not draw alike
    ports = range(_FIRST_PORT, _first_ephemeral_port())
    for port in draw.sample(ports, _PORT_TRIES):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"found no free port in {_PORT_TRIES} tries between {ports[0]} and {ports[-1]}: name one"
        " (trainer.strategy.init_args.port)"
    )


def _first_ephemeral_port() -> int:
    """The lowest port that the system hands out by itself; a higher one where it hands out nearly all."""
    settings = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(settings.read_text().split()[0]) if settings.exists() else 49152  # IANA's
    return max(lowest, 2 * _FIRST_PORT)


def meet(
    address: Address, name: str, role: Role, timeout_s: float, check: Callable[[], None] = lambda: None
) -> list[Member]:
    """Announce this process and wait for all others.

    Args:
        address: the store's address, this process' rank and the number of processes.
        name: RPC name; must be unique in the run.
        role: what this process is for.
        timeout_s: seconds to wait for the others.
        check: called while waiting; may raise, for example when a child process has died.

    Returns:
        The members in rank order.

    Raises:
        LaunchError: the port is taken, the store cannot be reached, or processes are missing at the deadline.
        ConfigurationError: two processes have the same name.
    """
    serves = address.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = dist.TCPStore(
            address.host,
            address.port,
            address.world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, dist.DistError) as error:
        if serves:
            raise LaunchError(
                f"could not listen on {address.host}:{address.port}; another program uses the port or the address is"
                f" not of this machine: choose another port, or 0 for any free one ({str(error).splitlines()[0]})"
            ) from error
        raise LaunchError(
            f"could not reach {address.host}:{address.port} within {timeout_s:.0f} s: is the process of rank 0"
            " running, and is the address reachable from here?"
        ) from error
    store = dist.PrefixStore(f"elsa_pl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
    try:
        store.set(f"member/{address.rank}", json.dumps([name, role]))
        announced = _wait_for_all(store, address.world_size, timeout_s, check)
    except ElsaError:
        raise
    except (RuntimeError, dist.DistError) as error:
        raise LaunchError(
            f"lost {address.host}:{address.port} while waiting for the others: the process of rank 0 has ended, and"
            " its own output says why"
        ) from error
    members = [Member(name, role, rank) for rank, (name, role) in enumerate(announced)]
    _check_names(members)
    global _met
    _met = store, address
    return members


def _wait_for_all(
    store: dist.Store, world_size: int, timeout_s: float, check: Callable[[], None]
) -> list[tuple[str, Role]]:
    keys = [f"member/{rank}" for rank in range(world_size)]
    deadline = time.monotonic() + timeout_s
    while not store.check(keys):
        check()
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise LaunchError(
                f"{len(missing)} of {world_size} processes (ranks {missing}) did not come within {timeout_s:.0f} s:"
                " start them, or lower the number of processes"
            )
        time.sleep(_POLL_S)
    return [json.loads(store.get(key)) for key in keys]


def _check_names(members: list[Member]) -> None:
    ranks: dict[str, list[int]] = {}
    for member in members:
        ranks.setdefault(member.name, []).append(member.rank)
    for name, same in ranks.items():
        if len(same) > 1:
            raise ConfigurationError(
                f"every process needs a name of its own; ranks {same} all call themselves {name!r}: rename all but one"
            )


def choose_transport(transport: Transport, processes_here: int) -> Transport:
    """Resolve ``auto``: ``shm`` where each process of this machine has cores to spare, else ``uv``."""
    if transport != "auto":
        return transport
    cores = len(os.sched_getaffinity(0))
    chosen: Transport = "shm" if cores >= _CORES_PER_PROCESS_FOR_SHM * processes_here else "uv"
    log.info("transport %s: %d cores for %d processes", chosen, cores, processes_here)
    return chosen


def _reuse_store(url: str, **_: object) -> Iterator[tuple[dist.Store, int, int]]:
    """Rendezvous handler of ``elsa://``: hands RPC the store in which the processes have met already."""
    assert _met is not None, "meet() comes before start()"
    store, address = _met
    yield store, address.rank, address.world_size


dist.register_rendezvous_handler("elsa", _reuse_store)


def _limit_memory() -> None:
    """Let all threads share two heaps.

    A pass runs on whichever of RPC's threads is free, and glibc gives each thread a heap of its own and keeps what was
    freed there: after some rounds every heap has grown to the size of a pass (2.4 GB instead of 0.9 for one client).
    ``MALLOC_ARENA_MAX`` in the environment decides, if it is there.
    """
    m_arena_max, num_heaps = -8, 2  # from malloc.h
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(m_arena_max, num_heaps)


def start(
    name: str,
    *,
    transport: Transport,
    num_threads: int,
    timeout_s: float,
    device_maps: dict[str, dict[int, int]] | None = None,
) -> None:
    """Start RPC in this process, with our allow-list in front of everything that it unpickles.

    Args:
        name: RPC name of this process; `meet` has been called.
        transport: ``uv`` (idle processes sleep) or ``shm`` (faster, and busy-polls).
        num_threads: requests served at the same time.
        timeout_s: seconds until a call without a deadline of its own fails.
        device_maps: for each peer, which CUDA device here is which CUDA device there.
    """
    unpickling.install()
    _limit_memory()
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=num_threads,
        rpc_timeout=timeout_s,
        init_method="elsa://",
        device_maps=cast(Any, device_maps or {}),
        _transports=["uv"] if transport == "uv" else None,
        # CUDA tensors need channels of their own, which TensorPipe then chooses by itself
        _channels=["basic"] if transport == "uv" and not device_maps else None,
    )
    assert _met is not None, "meet() comes before start()"
    _, address = _met
    with warnings.catch_warnings():
        # RPC's own start still hands a gloo backend to a function that wants a process group
        warnings.filterwarnings("ignore", message="You are using a Backend", category=UserWarning)
        # It prefixes keys with the number of its starts in this process, which a second run's fresh children do not
        # share: they would wait for each other for ever. Our store is a new one for each run and needs no prefix.
        rpc._init_counter = 0
        rpc.init_rpc(name, rank=address.rank, world_size=address.world_size, rpc_backend_options=options)


def stop(*, together: bool, timeout_s: float = 10.0) -> None:
    """End RPC in this process.

    Not by the graceful form of ``rpc.shutdown``: it waits for every peer in C++, up to the store's timeout, whatever
    timeout it is given.

    Args:
        together: first wait until every process has come here. Only after success: a dead peer never comes.
        timeout_s: seconds to wait for that.
    """
    if together and not _all_done(timeout_s):
        log.warning("the other processes did not end within %.0f s", timeout_s)
    rpc.shutdown(graceful=False)


def _all_done(timeout_s: float) -> bool:
    assert _met is not None, "meet() comes before stop()"
    store, address = _met
    deadline = time.monotonic() + timeout_s
    try:
        store.set(f"done/{address.rank}", "")
        while not store.check([f"done/{rank}" for rank in range(address.world_size)]):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
    except (RuntimeError, dist.DistError):
        log.debug("rank 0 has ended already, and it saw everybody first")
    return True
