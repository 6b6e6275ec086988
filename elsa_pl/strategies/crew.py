"""A crew of threads for the passes that are in flight at the same time.

The threads are daemons and live as long as the strategy: `concurrent.futures` joins its threads when the interpreter
exits, and one that waits for a dead edge would hold the process until the call's deadline.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_SLICE_S = 0.2
_JOIN_S = 2.0


class Crew:
    """Runs a function over items on at most ``size`` threads.

    Args:
        size: number of threads.
    """

    def __init__(self, size: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[Any], Any], Any, int, queue.SimpleQueue[Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"elsa-pass-{index}", daemon=True) for index in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, item, index, results = job
            try:
                results.put((index, function(item), None))
            except Exception as error:
                results.put((index, None, error))

    def map(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        watch: Callable[[Item, Result | Exception], None] = lambda item, result: None,
    ) -> list[Result | Exception]:
        """Results in the order of ``items``; an exception stands in the place of its result.

        The caller waits in short slices, so that signals are heard.

        Args:
            function: called on a thread of the crew.
            items: its arguments.
            watch: called on the caller's thread with each item and its result, in the order in which they end.
        """
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for index, item in enumerate(items):
            self._jobs.put((function, item, index, results))
        gathered: list[Any] = [None] * len(items)
        missing = len(items)
        while missing:
            try:
                index, value, error = results.get(timeout=_SLICE_S)
            except queue.Empty:
                continue
            gathered[index] = value if error is None else error
            watch(items[index], gathered[index])
            missing -= 1
        return gathered

    def dismiss(self) -> None:
        """Let the threads end, and wait a moment: one that still runs when the interpreter ends can crash it."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)
