import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from elsa_pl.functional.profiles import (
    SECONDS_PER_KM,
    SIDE_KM,
    DeviceProfile,
    DeviceSettings,
    EdgeProfile,
    ProfileSettings,
    draw_profile,
    latencies_s,
)

CLIENTS = [f"client-{index}" for index in range(10)]
EDGES = ["edge-0", "edge-1"]
WHOLE = DeviceSettings(flops_per_s=1e9, memory_bytes=1e8, up_bytes_per_s=1e6, down_bytes_per_s=2e6)


def test_uniform_is_the_same_everywhere() -> None:
    profile = draw_profile(ProfileSettings(distribution="uniform"), CLIENTS, EDGES, seed=0)
    assert list(profile.devices) == CLIENTS
    assert list(profile.edges) == EDGES
    assert len(set(profile.devices.values())) == 1
    assert {seconds for row in profile.latency_s.values() for seconds in row.values()} == {0.020}


@pytest.mark.parametrize("num_clients", [1, 2, 3, 10, 30])
def test_mixed_has_its_kinds_in_equal_parts(num_clients: int) -> None:
    clients = [f"client-{index}" for index in range(num_clients)]
    profile = draw_profile(ProfileSettings(distribution="mixed"), clients, EDGES, seed=0)
    counts = Counter(profile.devices.values())
    assert len(counts) == min(3, num_clients)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_latencies_of_mixed_are_a_last_mile_and_a_way_through_the_square() -> None:
    profile = draw_profile(ProfileSettings(distribution="mixed"), CLIENTS, EDGES, seed=0)
    farthest = SECONDS_PER_KM * SIDE_KM * math.sqrt(2)
    for row in profile.latency_s.values():
        assert abs(row["edge-0"] - row["edge-1"]) <= farthest
        assert all(0.005 <= seconds <= 0.020 + farthest for seconds in row.values())
    assert len({seconds for row in profile.latency_s.values() for seconds in row.values()}) == 20


def test_draws_depend_on_seed_and_names_only() -> None:
    settings = ProfileSettings(distribution="mixed")
    first = draw_profile(settings, CLIENTS, EDGES, seed=0)
    random.seed(1)
    np.random.default_rng(1).random()
    assert draw_profile(settings, CLIENTS, EDGES, seed=0) == first
    assert draw_profile(settings, CLIENTS, EDGES, seed=1) != first


def test_what_is_written_wins() -> None:
    settings = ProfileSettings(
        distribution="mixed",
        clients={"client-3": DeviceSettings(flops_per_s=7.0)},
        edge=EdgeProfile(flops_per_s=8.0),
        edges={"edge-1": EdgeProfile(flops_per_s=9.0, cloud_latency_s=0.0)},
        latency_s={"client-4": {"edge-1": 0.5}},
    )
    drawn = draw_profile(ProfileSettings(distribution="mixed"), CLIENTS, EDGES, seed=0)
    profile = draw_profile(settings, CLIENTS, EDGES, seed=0)
    assert profile.devices["client-3"].flops_per_s == 7.0
    assert profile.devices["client-3"].memory_bytes == drawn.devices["client-3"].memory_bytes
    assert profile.devices["client-4"] == drawn.devices["client-4"]
    assert (profile.edges["edge-0"].flops_per_s, profile.edges["edge-1"].flops_per_s) == (8.0, 9.0)
    assert profile.latency_s["client-4"] == {"edge-0": drawn.latency_s["client-4"]["edge-0"], "edge-1": 0.5}


def test_everything_is_written() -> None:
    settings = ProfileSettings(clients={"a": WHOLE}, latency_s={"a": {"e": 0.0}})
    profile = draw_profile(settings, ["a"], ["e"], seed=0)
    assert profile.devices == {
        "a": DeviceProfile(flops_per_s=1e9, memory_bytes=1e8, up_bytes_per_s=1e6, down_bytes_per_s=2e6)
    }
    assert profile.latency_s == {"a": {"e": 0.0}}
    assert profile.edges == {"e": EdgeProfile()}


def test_settings_are_read_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--profile", type=ProfileSettings)
    text = """
    profile:
      distribution: mixed
      clients: {client-0: {flops_per_s: 1.0e+9}}
      edges: {edge-0: {flops_per_s: 1.0e+12}}
      latency_s: {client-1: {edge-0: 0.03}}
    """
    settings = parser.instantiate(parser.parse_string(text)).profile
    assert settings == ProfileSettings(
        distribution="mixed",
        clients={"client-0": DeviceSettings(flops_per_s=1e9)},
        edges={"edge-0": EdgeProfile(flops_per_s=1e12)},
        latency_s={"client-1": {"edge-0": 0.03}},
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 5)])
def test_latencies_equal_the_slow_loop(shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    clients, edges = draw.uniform(0, 1000, (shape[0], 2)), draw.uniform(0, 1000, (shape[1], 2))
    access = draw.uniform(0, 0.02, shape[0])
    got = latencies_s(clients, edges, access)
    assert got.shape == shape
    for n in range(shape[0]):
        for e in range(shape[1]):
            assert got[n, e] == pytest.approx(access[n] + 1e-5 * math.dist(clients[n], edges[e]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"\['flops_per_s', 'memory_bytes', 'up_bytes_per_s', 'down_bytes_per_s'\] of a; got none"),
        (
            {"clients": {"a": DeviceSettings(flops_per_s=1.0)}},
            r"\['memory_bytes', .*write them under profile.clients.a",
        ),
        ({"clients": {"a": WHOLE}}, "latency from a to each edge; got none for e, f"),
        (
            {"clients": {"a": WHOLE}, "latency_s": {"a": {"e": 1.0}}},
            "got none for f: write it under profile.latency_s.a",
        ),
        ({"distribution": "mixed", "clients": {"b": WHOLE}}, "profile.clients names b; expected some of a"),
        ({"distribution": "mixed", "edges": {"g": EdgeProfile()}}, "profile.edges names g; expected some of e, f"),
        ({"distribution": "mixed", "latency_s": {"b": {}}}, "profile.latency_s names b"),
        ({"distribution": "mixed", "latency_s": {"a": {"g": 1.0}}}, "profile.latency_s.a names g"),
    ],
)
def test_names_and_numbers_that_are_missing_or_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_profile(ProfileSettings(**settings), ["a"], ["e", "f"], seed=0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_rates_above_zero(bad: float) -> None:
    numbers = {"flops_per_s": 1.0, "memory_bytes": 1.0, "up_bytes_per_s": 1.0, "down_bytes_per_s": 1.0}
    for name in numbers:
        with pytest.raises(ValueError, match=rf"DeviceProfile.{name} > 0 and finite; got {bad}"):
            DeviceProfile(**{**numbers, name: bad})
        with pytest.raises(ValueError, match=rf"profile.clients.a.{name} > 0"):
            ProfileSettings(clients={"a": DeviceSettings(**{name: bad})})
    with pytest.raises(ValueError, match=r"EdgeProfile.flops_per_s > 0"):
        EdgeProfile(flops_per_s=bad)
    if bad != 0:
        with pytest.raises(ValueError, match=r"EdgeProfile.cloud_latency_s >= 0"):
            EdgeProfile(cloud_latency_s=bad)
        with pytest.raises(ValueError, match=r"profile.latency_s.a.e >= 0 seconds"):
            ProfileSettings(latency_s={"a": {"e": bad}})
