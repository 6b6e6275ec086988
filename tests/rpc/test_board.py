"""The board: who waits for whom, until when, and what ends the wait."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from elsa_pl.errors import RunFailed
from elsa_pl.rpc.board import Board
from elsa_pl.rpc.messages import Failure

EVERYBODY = ("a", "b", "c")


@pytest.fixture
def board() -> Board:
    return Board("board")


def in_background(function: Callable[[], Any]) -> "Future[Any]":
    """The function's result; it runs in a thread, and has begun to wait when this returns."""
    pool = ThreadPoolExecutor(1)
    result = pool.submit(function)
    pool.shutdown(wait=False)
    time.sleep(0.1)
    return result


def test_collect_keeps_the_order_asked_for(board: Board) -> None:
    assert board.post("key", "b", 2)
    assert board.post("key", "a", 1)
    assert list(board.collect("key", ["a", "b"], 1.0).items()) == [("a", 1), ("b", 2)]


def test_collect_waits_for_the_last(board: Board) -> None:
    board.post("key", "a", 1)
    result = in_background(lambda: board.collect("key", ["a", "b"], 10.0))
    assert not result.done()
    board.post("key", "b", 2)
    assert result.result(2.0) == {"a": 1, "b": 2}


def test_keys_are_apart(board: Board) -> None:
    board.post(("edges", 0, 1), "a", 1)
    board.post(("edges", 1, 1), "a", 2)
    assert board.collect(("edges", 1, 1), ["a"], 1.0) == {"a": 2}
    assert board.collect(("edges", 0, 1), ["a"], 1.0) == {"a": 1}


def test_collect_of_nobody(board: Board) -> None:
    assert board.collect("key", [], 1.0) == {}


def test_deadline(board: Board) -> None:
    board.post("key", "b", 2)
    begun = time.monotonic()
    assert board.collect("key", EVERYBODY, 0.3) == {"b": 2}
    assert 0.25 < time.monotonic() - begun < 2


def test_too_late(board: Board) -> None:
    board.post("key", "a", 1)
    board.collect("key", ["a"], 1.0)
    assert not board.post("key", "b", 2)


def test_nobody_waits_for_the_lost(board: Board) -> None:
    board.post("key", "a", 1)
    result = in_background(lambda: board.collect("key", EVERYBODY, 10.0))
    board.lose(("b",))
    assert not result.done()
    board.lose(("c",))
    assert result.result(2.0) == {"a": 1}


def test_a_value_of_the_lost_counts(board: Board) -> None:
    board.post("key", "a", 1)
    board.lose(("a", "b"))
    assert board.collect("key", ["a", "b"], 10.0) == {"a": 1}


def test_failure_ends_the_wait(board: Board) -> None:
    result = in_background(lambda: board.collect("key", EVERYBODY, 10.0))
    board.fail("the disk is full")
    with pytest.raises(RunFailed, match="the disk is full"):
        result.result(2.0)


def test_first_failure_stays(board: Board) -> None:
    board.fail("first")
    board.fail("second")
    with pytest.raises(RunFailed, match="first"):
        board.check()
    board.post("key", "a", 1)
    with pytest.raises(RunFailed, match="first"):
        board.collect("key", ["a"], 10.0)


def test_exchange_answers_all_alike(board: Board) -> None:
    answers = [board.exchange("key", name, index, EVERYBODY, 10.0) for index, name in enumerate("cab")]
    for answer in answers:
        assert list(answer.wait().items()) == [("a", 1), ("b", 2), ("c", 0)]


def test_exchange_waits(board: Board) -> None:
    answer = board.exchange("key", "a", 1, ("a", "b"), 10.0)
    assert not answer.done()
    board.exchange("key", "b", 2, ("a", "b"), 10.0)
    assert answer.wait() == {"a": 1, "b": 2}


def test_exchange_without_the_lost(board: Board) -> None:
    answer = board.exchange("key", "a", 1, EVERYBODY, 10.0)
    board.lose(("b", "c"))
    assert answer.wait() == {"a": 1}


def test_exchange_when_all_others_are_lost_already(board: Board) -> None:
    board.lose(("b", "c"))
    assert board.exchange("key", "a", 1, EVERYBODY, 10.0).wait() == {"a": 1}


def test_exchange_expires(board: Board) -> None:
    answer = board.exchange("key", "a", 1, EVERYBODY, 0.05)
    assert board.expire() == ()
    time.sleep(0.1)
    assert board.expire() == ("b", "c")
    assert answer.wait() == {"a": 1}
    assert board.lost == {"b", "c"}
    assert board.expire() == ()


def test_exchange_after_its_end(board: Board) -> None:
    board.exchange("key", "a", 1, EVERYBODY, 0.0)
    time.sleep(0.01)
    board.expire()
    with pytest.raises(RunFailed, match="b came after the deadline"):
        board.exchange("key", "b", 2, EVERYBODY, 10.0)


def test_exchange_fails(board: Board) -> None:
    answer = board.exchange("key", "a", 1, EVERYBODY, 10.0)
    board.fail("the disk is full")
    assert answer.wait() == Failure("RunFailed", "the disk is full", "")


def test_many_senders_at_once(board: Board) -> None:
    """Threads of RPC post while others collect: no value may be lost and nobody may hang."""
    names = tuple(f"client-{index}" for index in range(16))
    rounds = range(20)
    start = threading.Barrier(len(names) + 1)

    def send(name: str) -> None:
        start.wait()
        for key in rounds:
            board.exchange(("barrier", key), name, None, names, 30.0).wait()
            board.post(key, name, (name, key))

    threads = [threading.Thread(target=send, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    start.wait()
    for key in rounds:
        assert board.collect(key, names, 30.0) == {name: (name, key) for name in names}
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
