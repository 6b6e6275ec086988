"""Named services and the calls between them: the only way in which one process asks another for something.

A process *serves* objects under names; a peer *calls* an exposed method of one by worker, service and method name.
Without this indirection every feature would ship its own remote functions, and each would have to get deadlines,
error texts and Ctrl-C right by itself.
"""

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.distributed import rpc

from elsa_pl.errors import RemoteError
from elsa_pl.rpc.messages import Failure

Method = TypeVar("Method", bound=Callable[..., Any])

_services: dict[str, object] = {}

# The main thread waits in slices of this length, because a wait inside C++ is deaf to Ctrl-C and SIGTERM.
_SLICE_S = 0.2


def exposed(method: Method) -> Method:
    """Mark a method as callable from other processes; all others are refused."""
    method.__exposed__ = True  # type: ignore[attr-defined]  # functions take attributes
    return method


def serve(name: str, service: object) -> None:
    """Offer the exposed methods of ``service`` to peers under ``name``, which must be free."""
    if name in _services:
        raise ValueError(f"a service named {name!r} is already served in this process: choose another name")
    _services[name] = service


def withdraw(name: str) -> None:
    """Stop offering ``name``; unknown names are fine, so that a teardown can run twice."""
    _services.pop(name, None)


def _find(service: str, method: str) -> Callable[..., Any]:
    found = getattr(_services.get(service), method, None)
    if not getattr(found, "__exposed__", False):
        raise LookupError(f"no exposed method {method!r} of a service {service!r} in this process")
    return cast(Callable[..., Any], found)


def _failure(error: BaseException) -> Failure:
    return Failure(type(error).__name__, str(error), traceback.format_exc())


def _invoke(service: str, method: str, *args: Any) -> Any:
    try:
        return _find(service, method)(*args)
    except Exception as error:
        return _failure(error)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]  # torch leaves it untyped
def _invoke_async(service: str, method: str, *args: Any) -> Any:
    """Like `_invoke`, for methods that return a future: the answer leaves when the future completes."""
    try:
        return _find(service, method)(*args)
    except Exception as error:
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(_failure(error))
        return done


class PendingCall:
    """A call under way; `wait` gives its result.

    Raises:
        RemoteError: from `wait`, when the peer is gone, the deadline has passed or the method failed there; the text
            names worker, method and elapsed seconds.
    """

    def __init__(self, worker: str, method: str, future: "torch.futures.Future[Any]") -> None:
        self._worker, self._method, self._future, self._start = worker, method, future, time.monotonic()

    def wait(self, check: Callable[[], None] = lambda: None) -> Any:
        """Wait for the result; in the main thread ``check`` is called meanwhile and may raise."""
        try:
            if threading.current_thread() is threading.main_thread():
                answered = threading.Event()
                self._future.add_done_callback(lambda _: answered.set())
                while not answered.wait(_SLICE_S):
                    check()
            result = self._future.wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error) else "no answer"
            raise RemoteError(f"{self._describe()}: {reason}") from error
        if isinstance(result, Failure):
            raise RemoteError(
                f"{self._describe()}: {result.kind}: {result.message}", kind=result.kind, trace=result.trace
            )
        return result

    def _describe(self) -> str:
        return f"{self._worker}: {self._method} failed after {time.monotonic() - self._start:.1f} s"


def start_call(
    worker: str, service: str, method: str, *args: Any, timeout_s: float, answers_later: bool = False
) -> PendingCall:
    """Call ``method`` of ``service`` on ``worker`` and return at once.

    Args:
        worker: RPC name of the process that serves it; the caller's own name is fine.
        service: name given to `serve` there.
        method: an exposed method.
        args: tensors, plain values, or types of `elsa_pl.rpc.messages`.
        timeout_s: seconds until the call counts as failed.
        answers_later: the method returns a future; no thread is held on the far side meanwhile.
    """
    function = _invoke_async if answers_later else _invoke
    try:
        future = rpc.rpc_async(worker, function, args=(service, method, *args), timeout=timeout_s)
    except RuntimeError as error:  # a peer known to be dead is refused at once
        raise RemoteError(f"{worker}: {method} could not be called: {str(error).splitlines()[0]}") from error
    return PendingCall(worker, method, future)


def call(worker: str, service: str, method: str, *args: Any, timeout_s: float, answers_later: bool = False) -> Any:
    """Call and wait; see `start_call`.

    Raises:
        RemoteError: the peer is gone, the deadline has passed, or the method failed there.
    """
    return start_call(worker, service, method, *args, timeout_s=timeout_s, answers_later=answers_later).wait()
