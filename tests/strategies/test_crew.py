"""Threads for the passes in flight."""

import threading
import time

import pytest

from elsa_pl.strategies.crew import Crew


def crew_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("elsa-pass-")]


def test_order_of_results() -> None:
    crew = Crew(3)
    delays = [0.15, 0.0, 0.1, 0.05, 0.0]

    def wait(index: int) -> int:
        time.sleep(delays[index])
        return index

    assert crew.map(wait, range(5)) == [0, 1, 2, 3, 4]
    crew.dismiss()


def test_so_many_at_a_time() -> None:
    crew, lock, three = Crew(3), threading.Lock(), threading.Barrier(3)
    counts = {"now": 0, "most": 0}

    def work(_: int) -> None:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        three.wait(20)
        time.sleep(0.05)
        with lock:
            counts["now"] -= 1

    crew.map(work, range(9))
    crew.dismiss()
    assert counts == {"now": 0, "most": 3}


def test_an_error_stands_in_its_place() -> None:
    crew = Crew(2)

    def invert(value: int) -> float:
        return 1 / value

    results = crew.map(invert, [1, 0, 2])
    assert isinstance(results[1], ZeroDivisionError)
    assert [results[0], results[2]] == [1.0, 0.5]
    assert crew.map(invert, [4]) == [0.25], "the thread goes on"
    crew.dismiss()


@pytest.mark.parametrize("size", [0, 2])
def test_nothing_to_do(size: int) -> None:
    crew = Crew(size)
    assert crew.map(abs, []) == []
    crew.dismiss()


def test_threads_end() -> None:
    before = len(crew_threads())
    crew = Crew(4)
    assert len(crew_threads()) == before + 4
    assert all(thread.daemon for thread in crew_threads()), "or a client that hangs would hold the process"
    crew.dismiss()
    deadline = time.monotonic() + 5
    while len(crew_threads()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
