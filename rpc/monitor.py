"""Notices peers that are gone.

The cloud looks after every process and tells the others whom they need not wait for; every other process looks after
the cloud, and ends when it is gone: without the cloud there is no run, and an orphan would hold memory for ever.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elsa_pl.errors import RemoteError
from elsa_pl.rpc.remote import exposed, start_call

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_GRACE_S = 8.0
_JOIN_S = 2.0


class Pulse:
    """The service that answers a monitor."""

    @exposed
    def ping(self) -> bool:
        """Show that this process is there."""
        return True

    @exposed
    def take(self, payload: Tensor) -> None:
        """Receive bytes and do nothing with them: how long that takes is the caller's question."""

    @exposed
    def give(self, num_bytes: int) -> Tensor:
        """Send so many bytes of no meaning."""
        return torch.zeros(num_bytes, dtype=torch.uint8)


class Monitor(threading.Thread):
    """Pings workers until stopped.

    Args:
        workers: whom to look after.
        on_lost: called once for each worker that is gone.
        on_tick: called after every round of pings.
        timeout_s: seconds without an answer after which a worker that still accepts connections is gone too.
    """

    def __init__(
        self,
        workers: Sequence[str],
        on_lost: Callable[[str], None],
        on_tick: Callable[[], None] = lambda: None,
        *,
        timeout_s: float,
    ) -> None:
        super().__init__(name="elsa-monitor", daemon=True)
        self._workers = list(workers)
        self._on_lost, self._on_tick, self._timeout_s = on_lost, on_tick, timeout_s
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            calls = []
            for worker in list(self._workers):
                try:
                    calls.append((worker, start_call(worker, "pulse", "ping", timeout_s=self._timeout_s)))
                except RemoteError as error:
                    self._give_up(worker, error)
            for worker, call in calls:
                try:
                    call.wait()
                except RemoteError as error:
                    if not error.kind:  # an error of its own is an answer too
                        self._give_up(worker, error)
            if not self._stopped.is_set():
                self._on_tick()

    def _give_up(self, worker: str, error: RemoteError) -> None:
        if self._stopped.is_set():  # RPC is ending, not the peer
            return
        log.debug("lost %s: %s", worker, error)
        self._workers.remove(worker)
        self._on_lost(worker)

    def stop(self) -> None:
        """Stop pinging. Call it before RPC ends."""
        self._stopped.set()
        self.join(_JOIN_S)


def end_soon(reason: str) -> None:
    """End this process even if its main thread is stuck in C++, after some seconds for an orderly end."""

    def end() -> None:
        time.sleep(_GRACE_S)
        print(f"{reason}; this process did not end by itself", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=end, name="elsa-end", daemon=True).start()
