"""Calls between real processes: what is refused, what an error says, and what a dead peer does."""

import io
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import rpc

from elsa_pl.errors import RemoteError
from elsa_pl.rpc import lifecycle, remote
from elsa_pl.rpc.messages import Update
from elsa_pl.rpc.unpickling import AllowListUnpickler

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ["here", "there", "doomed"]
PEER = """
import os, pathlib, sys, threading, time
import torch
from elsa_pl.rpc import lifecycle, remote

class Desk:
    @remote.exposed
    def double(self, value):
        return 2 * value
    @remote.exposed
    def echo(self, value):
        return value
    @remote.exposed
    def fail(self):
        raise KeyError("no such drawer")
    @remote.exposed
    def sleep(self, seconds):
        time.sleep(seconds)
    @remote.exposed
    def later(self, seconds):
        future = torch.futures.Future()
        threading.Timer(seconds, lambda: future.set_result(threading.active_count())).start()
        return future
    @remote.exposed
    def strange(self):
        return pathlib.Path("/")
    def hidden(self):
        return "secret"
    drawer = "not a method"

port, rank, parent = map(int, sys.argv[2:])
remote.serve("desk", Desk())
lifecycle.meet(lifecycle.Address("127.0.0.1", port, rank, 3), sys.argv[1], "host", 60)
lifecycle.start(sys.argv[1], transport="uv", num_threads=4, timeout_s=20)
while os.getppid() == parent:
    time.sleep(0.1)
os._exit(0)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """This process as ``here``, and two more that serve a ``desk``."""
    port = lifecycle.free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TP_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    peers = {
        name: subprocess.Popen(
            [sys.executable, "-c", PEER, name, str(port), str(rank), str(os.getpid())], env=environment
        )
        for rank, name in enumerate(NAMES)
        if rank
    }
    before = os.environ.get("TP_SOCKET_IFNAME")
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    try:
        members = lifecycle.meet(lifecycle.Address("127.0.0.1", port, 0, 3), "here", "cloud", 60)
        assert [(member.name, member.rank) for member in members] == [(name, rank) for rank, name in enumerate(NAMES)]
        lifecycle.start("here", transport="uv", num_threads=4, timeout_s=20)
        yield peers
        lifecycle.stop(together=False)
    finally:
        if before is None:
            del os.environ["TP_SOCKET_IFNAME"]
        for peer in peers.values():
            peer.kill()
            peer.wait()


def call(method: str, *args: Any, timeout_s: float = 20.0, worker: str = "there", **options: Any) -> Any:
    return remote.call(worker, "desk", method, *args, timeout_s=timeout_s, **options)


pytestmark = pytest.mark.usefixtures("world")


def test_call() -> None:
    assert call("double", 21) == 42
    assert torch.equal(call("double", torch.arange(3)), torch.tensor([0, 2, 4]))


def test_messages_travel() -> None:
    sent = Update("client-0", 3.0, {"layer": torch.randn(2, 3)})
    got = call("echo", sent)
    assert (got.sender, got.weight) == ("client-0", 3.0)
    assert torch.equal(got.adapters["layer"], sent.adapters["layer"])


@pytest.mark.parametrize("method", ["hidden", "drawer", "nothing", "__init__", "__class__"])
def test_only_exposed_methods(method: str) -> None:
    with pytest.raises(RemoteError, match=f"no exposed method '{method}' of a service 'desk'") as error:
        call(method)
    assert error.value.kind == "LookupError"


def test_unknown_service() -> None:
    with pytest.raises(RemoteError, match="no exposed method 'double' of a service 'bench'"):
        remote.call("there", "bench", "double", 1, timeout_s=20)


def test_error_over_there() -> None:
    with pytest.raises(RemoteError, match=r"^there: fail failed after \d+\.\d s: KeyError: 'no such drawer'$") as error:
        call("fail")
    assert error.value.kind == "KeyError"
    assert 'raise KeyError("no such drawer")' in error.value.trace or "in fail" in error.value.trace


def test_timeout() -> None:
    with pytest.raises(RemoteError, match=r"^there: sleep failed after \d\.\d s: ") as error:
        call("sleep", 3.0, timeout_s=0.5)
    assert error.value.kind == "", "no answer is no answer"


def test_answers_later_hold_no_thread() -> None:
    """More calls wait than the peer has threads, and it still answers others."""
    waiting = [remote.start_call("there", "desk", "later", 2.0, timeout_s=20, answers_later=True) for _ in range(16)]
    begun = time.monotonic()
    assert call("double", 1) == 2
    assert time.monotonic() - begun < 1.8, "it had to wait for a thread"
    assert all(pending.wait() for pending in waiting)


def test_check_is_called_while_waiting() -> None:
    def check() -> None:
        raise InterruptedError("enough")

    pending = remote.start_call("there", "desk", "sleep", 1.0, timeout_s=20)
    with pytest.raises(InterruptedError, match="enough"):
        pending.wait(check)


def test_calls_from_threads() -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(call("double", n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(results) == [2 * n for n in range(8)]


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


def test_foreign_functions_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    for function, argument in ((os.system, f"touch {target}"), (eval, f"open({str(target)!r}, 'w')")):
        with pytest.raises(Exception, match=r"refused .* in an RPC message"):
            rpc.rpc_sync("there", function, args=(argument,), timeout=20)
    assert not target.exists()
    assert call("double", 1) == 2, "it still serves"


def test_foreign_objects_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    with pytest.raises(RemoteError, match="refused"):
        call("echo", Exploit(target))
    assert not target.exists()
    assert call("double", 1) == 2, "it still serves"


def test_foreign_answers_are_refused() -> None:
    """What comes back goes through the same allow-list."""
    with pytest.raises(Exception, match="refused pathlib"):
        call("strange")


@pytest.mark.parametrize(
    "value", [os.system, eval, print, setattr, subprocess.Popen, Path("/"), Exploit(Path("x")), pickle.loads, open]
)
def test_allow_list(value: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        AllowListUnpickler(io.BytesIO(pickle.dumps((value,)))).load()


def test_getattr_reaches_the_receivers_only() -> None:
    """torch's pickler refers to its own receiver by getattr, which would otherwise reach everything."""
    chain = b"cbuiltins\ngetattr\n(ctorch.distributed.rpc.internal\n_InternalRPCPickler\nV__init__\ntR."
    with pytest.raises(pickle.UnpicklingError, match="refused attribute '__init__'"):
        AllowListUnpickler(io.BytesIO(chain)).load()


def test_dead_peer(world: dict[str, "subprocess.Popen[bytes]"]) -> None:
    """Last, since nobody brings it back: calls under way and later ones fail at once, and others go on."""
    pending = remote.start_call("doomed", "desk", "sleep", 30.0, timeout_s=60)
    assert call("double", 1, worker="doomed") == 2
    world["doomed"].kill()
    world["doomed"].wait()
    begun = time.monotonic()
    with pytest.raises(RemoteError, match=r"^doomed: sleep failed after ") as under_way:
        pending.wait()
    with pytest.raises(RemoteError, match=r"^doomed: double ") as later:
        call("double", 1, worker="doomed")
    assert under_way.value.kind == later.value.kind == ""
    assert time.monotonic() - begun < 10
    assert call("double", 1) == 2


def test_a_name_is_served_once() -> None:
    remote.serve("table", object())
    with pytest.raises(ValueError, match="'table' is already served"):
        remote.serve("table", object())
    remote.withdraw("table")
    remote.withdraw("table")
    remote.serve("table", object())
    remote.withdraw("table")
