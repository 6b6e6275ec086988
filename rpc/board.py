"""A board on which named senders post values under a key, and where others wait until all have.

One mechanism carries everything that processes wait for: the updates of an edge's clients, the edges' means at the
cloud, and the collectives that Lightning asks of a strategy. Each wait has a deadline, and a sender known to be gone
is not waited for, so a dead member delays the others by seconds instead of stopping them for ever.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from elsa_pl.errors import RunFailed
from elsa_pl.rpc.messages import Failure
from elsa_pl.rpc.remote import exposed

_SLICE_S = 0.2


class _Slot:
    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.expected: tuple[str, ...] | None = None
        self.deadline = float("inf")
        self.waiting: list[Callable[[Any], None]] = []


class Board:
    """Values by key and sender.

    Args:
        name: used in error texts.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: set[str] = set()
        self._slots: dict[Any, _Slot] = {}
        self._closed: set[Any] = set()
        self._failure: str | None = None
        self._changed = threading.Condition()

    @exposed
    def post(self, key: Any, sender: str, value: Any) -> bool:
        """Add a value; returns False when the slot is already closed (the sender was too late)."""
        with self._changed:
            if key in self._closed:
                return False
            self._slots.setdefault(key, _Slot()).values[sender] = value
        self._settle()
        return True

    @exposed
    def exchange(self, key: Any, sender: str, value: Any, expected: tuple[str, ...], timeout_s: float) -> Any:
        """Post a value and answer, later, with the values of all ``expected`` senders that are not lost.

        Returns:
            A future of ``{sender: value}``; by the deadline those who are missing are counted as lost.
        """
        answer: torch.futures.Future[Any] = torch.futures.Future()
        with self._changed:
            if key in self._closed:
                raise RunFailed(f"{sender} came after the deadline of {key}: it is out of the run")
            slot = self._slots.setdefault(key, _Slot())
            slot.values[sender] = value
            slot.expected = expected
            slot.deadline = min(slot.deadline, time.monotonic() + timeout_s)
            slot.waiting.append(answer.set_result)
        self._settle()
        return answer

    def collect(self, key: Any, expected: Iterable[str], timeout_s: float) -> dict[str, Any]:
        """Wait for the values of ``expected`` senders and close the slot.

        Returns:
            What arrived in time, in the order of ``expected``; possibly nothing.

        Raises:
            RunFailed: the run was declared failed meanwhile.
        """
        names = tuple(expected)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            slot = self._slots.setdefault(key, _Slot())
            while not set(names) <= set(slot.values) | self.lost and time.monotonic() < deadline:
                self.check()
                self._changed.wait(_SLICE_S)
            self.check()
            self._slots.pop(key)
            self._closed.add(key)
            return {name: slot.values[name] for name in names if name in slot.values}

    @exposed
    def lose(self, senders: tuple[str, ...]) -> None:
        """Stop waiting for ``senders``."""
        with self._changed:
            self.lost |= set(senders)
        self._settle()

    @exposed
    def fail(self, reason: str) -> None:
        """Declare the run failed: whoever waits on this board raises. The first reason stays."""
        with self._changed:
            self._failure = self._failure or reason
            self._changed.notify_all()
            waiting = [answer for slot in self._slots.values() for answer in slot.waiting]
            self._slots.clear()
        for answer in waiting:
            answer(Failure(RunFailed.__name__, reason, ""))

    def check(self) -> None:
        """Raise if the run was declared failed.

        Raises:
            RunFailed: with the reason.
        """
        if self._failure is not None:
            raise RunFailed(self._failure)

    def expire(self) -> tuple[str, ...]:
        """Close the exchanges whose deadline has passed; returns the senders that were missing (now lost)."""
        now = time.monotonic()
        with self._changed:
            late = {
                name
                for slot in self._slots.values()
                if slot.expected is not None and slot.deadline < now
                for name in set(slot.expected) - set(slot.values) - self.lost
            }
        if late:
            self.lose(tuple(late))
        return tuple(sorted(late))

    def _settle(self) -> None:
        """Wake local waiters and answer the exchanges that are complete, outside the lock."""
        with self._changed:
            self._changed.notify_all()
            done = [
                key
                for key, slot in self._slots.items()
                if slot.expected is not None and set(slot.expected) <= set(slot.values) | self.lost
            ]
            finished = [self._slots.pop(key) for key in done]
            self._closed.update(done)
        for slot in finished:
            ordered = {name: slot.values[name] for name in slot.expected or () if name in slot.values}
            for answer in slot.waiting:
                answer(ordered)
