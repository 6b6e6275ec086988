import math

import numpy as np
import pytest

from elsa_pl.functional.clock import client_seconds, edge_seconds, round_seconds, step_seconds, trip_seconds
from elsa_pl.functional.costs import StepCosts
from elsa_pl.functional.profiles import DeviceProfile

DEVICE = DeviceProfile(flops_per_s=1e9, memory_bytes=1e9, up_bytes_per_s=1e6, down_bytes_per_s=4e6)


def served_in_slices(work: dict[str, float], rate: float, slice_s: float) -> dict[str, float]:
    """Processor sharing the slow way: in each slice of time all that are waiting get equal parts of the rate."""
    left, now, done = dict(work), 0.0, {client: 0.0 for client, flops in work.items() if flops == 0}
    while waiting := [client for client in left if client not in done]:
        now += slice_s
        for client in waiting:
            left[client] -= rate * slice_s / len(waiting)
            if left[client] <= 0:
                done[client] = now
    return done


@pytest.mark.parametrize("num_clients", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_edge_shares_itself_equally(num_clients: int, seed: int) -> None:
    draws = np.random.default_rng(seed).uniform(0, 3, num_clients)
    work = {f"client-{index}": float(flops) for index, flops in enumerate(draws)}
    work["idle"] = 0.0
    got = edge_seconds(work, flops_per_s=2.0)
    slow = served_in_slices(work, 2.0, 0.001)
    assert list(got) == list(work)
    for client in work:
        assert got[client] == pytest.approx(slow[client], abs=0.005)


def test_the_last_is_done_when_all_work_is() -> None:
    work = {"a": 5.0, "b": 1.0, "c": 2.0}
    assert max(edge_seconds(work, 4.0).values()) == pytest.approx(sum(work.values()) / 4.0)
    assert edge_seconds(dict.fromkeys("abc", 2.0), 4.0) == dict.fromkeys("abc", 1.5)
    assert edge_seconds({}, 1.0) == {}


def test_the_times_of_a_client_add_up() -> None:
    assert client_seconds(DEVICE, latency_s=0.1) == 0
    assert client_seconds(DEVICE, latency_s=0.1, flops=2e9) == pytest.approx(2.0)
    assert client_seconds(DEVICE, latency_s=0.1, up_bytes=3e6) == pytest.approx(3.0)
    assert client_seconds(DEVICE, latency_s=0.1, down_bytes=2e6) == pytest.approx(0.5)
    assert client_seconds(DEVICE, latency_s=0.1, num_messages=6) == pytest.approx(0.6)
    assert client_seconds(
        DEVICE, latency_s=0.1, flops=2e9, up_bytes=3e6, down_bytes=2e6, num_messages=6, edge_s=1.0
    ) == pytest.approx(7.1)


def test_a_step_is_what_its_costs_say() -> None:
    costs = StepCosts(
        front_flops=1e9,
        middle_flops=9e9,
        tail_flops=2e9,
        up_bytes=1e6,
        down_bytes=8e6,
        parameter_bytes=0,
        activation_bytes=0,
        link_bytes=0,
    )
    assert step_seconds(costs, DEVICE, latency_s=0.01, edge_s=0.5) == pytest.approx(3 + 1 + 2 + 6 * 0.01 + 0.5)


def test_a_trip_is_latency_and_bytes() -> None:
    assert trip_seconds(2e6, bytes_per_s=1e6, latency_s=0.3) == pytest.approx(2.3)


@pytest.mark.parametrize(
    ("edge_rounds", "expected"),
    [
        ({}, 0.0),
        ({"e": []}, 0.0),
        ({"e": [{}]}, 0.0),
        ({"e": [{"a": 1.0}]}, 1.5),
        ({"e": [{"a": 1.0, "b": 2.0}, {"a": 3.0}]}, 5.5),
        ({"e": [{"a": 1.0}], "f": [{"b": 4.0}, {}]}, 14.0),
        ({"e": [{"a": 20.0}], "f": [{"b": 4.0}], "unused": [{}]}, 20.5),
    ],
)
def test_a_round_waits_for_the_slowest(edge_rounds: dict[str, list[dict[str, float]]], expected: float) -> None:
    assert round_seconds(edge_rounds, {"e": 0.5, "f": 10.0}) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_counts_that_cannot_be(bad: float) -> None:
    for name in ("latency_s", "flops", "up_bytes", "down_bytes", "num_messages", "edge_s"):
        with pytest.raises(ValueError, match=f"at least 0 for {name}; got {bad}"):
            client_seconds(DEVICE, **{"latency_s": 0.0, name: bad})  # type: ignore[arg-type]  # any argument
    with pytest.raises(ValueError, match="at least 0 for a"):
        edge_seconds({"a": bad}, 1.0)
    with pytest.raises(ValueError, match="at least 0 for a"):
        round_seconds({"e": [{"a": bad}]}, {"e": 0.0})
    with pytest.raises(ValueError, match="at least 0 for num_bytes"):
        trip_seconds(bad, bytes_per_s=1.0, latency_s=0.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_rates_above_zero(bad: float) -> None:
    with pytest.raises(ValueError, match="rate above 0"):
        edge_seconds({"a": 1.0}, bad)
    with pytest.raises(ValueError, match="bandwidth above 0"):
        trip_seconds(1.0, bytes_per_s=bad, latency_s=0.0)


def test_an_edge_that_cannot_reach_the_cloud() -> None:
    with pytest.raises(ValueError, match="each edge to the cloud; got none for e"):
        round_seconds({"e": [{"a": 1.0}]}, {"f": 1.0})
