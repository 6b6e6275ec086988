import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from elsa_pl.functional.clock import edge_seconds, step_seconds
from elsa_pl.functional.costs import ModelShape, Plan, Workload, step_costs
from elsa_pl.functional.plans import allowed_plans, best_single_plan, choose_plans, fleet_seconds
from elsa_pl.functional.profiles import (
    DeviceProfile,
    DeviceSettings,
    EdgeProfile,
    NetworkProfile,
    ProfileSettings,
    draw_profile,
)

MINILM = ModelShape(
    num_layers=6,
    hidden_size=384,
    intermediate_size=1536,
    num_heads=12,
    num_kv_heads=12,
    head_size=32,
    vocab_size=30522,
    num_positions=512,
    num_classes=6,
)
WORK = Workload(shape=MINILM, batch_size=16, num_tokens=64)


def fleet(num_clients: int, num_edges: int, seed: int = 0) -> tuple[NetworkProfile, dict[str, str]]:
    clients = [f"client-{index}" for index in range(num_clients)]
    edges = [f"edge-{index}" for index in range(num_edges)]
    profile = draw_profile(ProfileSettings(distribution="mixed"), clients, edges, seed)
    return profile, {client: edges[index % num_edges] for index, client in enumerate(clients)}


def slowest(plans: Mapping[str, Plan], profile: NetworkProfile, assignment: Mapping[str, str]) -> float:
    return max(fleet_seconds(WORK, plans, profile, assignment).values())


@pytest.mark.parametrize(
    ("num_layers", "min_front", "min_tail"), [(3, 1, 1), (6, 1, 1), (6, 2, 1), (6, 3, 2), (12, 1, 4)]
)
def test_allowed_plans_are_all_there_are(num_layers: int, min_front: int, min_tail: int) -> None:
    expected = {
        plan
        for plan in itertools.product(range(num_layers), repeat=3)
        if sum(plan) == num_layers and plan[0] >= min_front and plan[1] >= 1 and plan[2] >= min_tail
    }
    got = allowed_plans(num_layers, min_front=min_front, min_tail=min_tail)
    assert set(got) == expected
    assert len(got) == len(expected)


@pytest.mark.parametrize("edge_rate", [1e10, 1e11, 1e12])
@pytest.mark.parametrize("device_rate", [3e9, 3e10])
def test_one_client_gets_the_plan_of_least_time(edge_rate: float, device_rate: float) -> None:
    device = DeviceProfile(flops_per_s=device_rate, memory_bytes=150e6, up_bytes_per_s=1e6, down_bytes_per_s=4e6)
    edges = {"edge": EdgeProfile(flops_per_s=edge_rate)}
    profile = NetworkProfile(devices={"alone": device}, edges=edges, latency_s={"alone": {"edge": 0.01}})
    chosen = choose_plans(WORK, profile, {"alone": "edge"})["alone"]

    def seconds(plan: Plan) -> float:
        costs = step_costs(WORK, plan)
        return step_seconds(costs, device, latency_s=0.01, edge_s=costs.middle_flops / edge_rate)

    fitting = [plan for plan in allowed_plans(6) if step_costs(WORK, plan).client_bytes <= device.memory_bytes]
    assert 1 < len(fitting) < 10
    assert chosen in fitting
    assert seconds(chosen) == pytest.approx(min(map(seconds, fitting)))
    equally_fast = [plan for plan in fitting if seconds(plan) == pytest.approx(seconds(chosen))]
    assert chosen.front == max(plan.front for plan in equally_fast)
    assert choose_plans(WORK, profile, {}) == {}


@pytest.mark.parametrize("min_front", [1, 2, 3, 4])
def test_floors_and_memory_always_hold(min_front: int) -> None:
    profile, assignment = fleet(12, 2)
    small = Workload(shape=MINILM, batch_size=4, num_tokens=32)
    plans = choose_plans(small, profile, assignment, min_front=min_front)
    assert list(plans) == list(assignment)
    for client, plan in plans.items():
        assert plan.front >= min_front
        assert plan.middle >= 1
        assert plan.tail >= 1
        assert sum(plan) == 6
        assert step_costs(small, plan).client_bytes <= profile.devices[client].memory_bytes
    assert best_single_plan(small, profile, assignment, min_front=min_front).front >= min_front


@pytest.mark.parametrize("seed", range(6))
def test_plans_of_an_edge_are_the_best_of_all_combinations(seed: int) -> None:
    draw = np.random.default_rng(seed)
    clients = [f"client-{index}" for index in range(4)]
    settings = ProfileSettings(
        distribution="mixed",
        edge=EdgeProfile(flops_per_s=10 ** draw.uniform(9.5, 11.3)),
        clients={client: DeviceSettings(flops_per_s=10 ** draw.uniform(9.5, 11)) for client in clients},
    )
    profile = draw_profile(settings, clients, ["edge"], seed)
    assignment = dict.fromkeys(clients, "edge")
    costs = {plan: step_costs(WORK, plan) for plan in [Plan(1, 4, 1), Plan(2, 3, 1), Plan(3, 2, 1), Plan(4, 1, 1)]}
    least = np.inf
    for plans in itertools.product(costs, repeat=len(clients)):
        chosen = dict(zip(clients, plans, strict=True))
        if any(costs[chosen[c]].client_bytes > profile.devices[c].memory_bytes for c in clients):
            continue
        waits = edge_seconds({c: costs[chosen[c]].middle_flops for c in clients}, profile.edges["edge"].flops_per_s)
        seconds = [
            step_seconds(costs[chosen[c]], profile.devices[c], latency_s=profile.latency_s[c]["edge"], edge_s=waits[c])
            for c in clients
        ]
        least = min(least, max(seconds))
    assert slowest(choose_plans(WORK, profile, assignment), profile, assignment) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_fleet_is_faster_with_plans_of_its_own(seed: int) -> None:
    """24 clients at 2 edges, a third each of laptops, Raspberry Pis and apps that may keep 128 MB."""
    profile, assignment = fleet(24, 2, seed)
    single = best_single_plan(WORK, profile, assignment)
    plans = choose_plans(WORK, profile, assignment)
    before = slowest(dict.fromkeys(assignment, single), profile, assignment)
    assert slowest(plans, profile, assignment) <= 0.75 * before
    assert len(set(plans.values())) > 1


def test_the_best_single_plan_is_the_best_of_all() -> None:
    profile, assignment = fleet(9, 2)
    single = best_single_plan(WORK, profile, assignment)
    fitting = [
        plan
        for plan in allowed_plans(6)
        if all(step_costs(WORK, plan).client_bytes <= profile.devices[c].memory_bytes for c in assignment)
    ]
    seconds = {plan: slowest(dict.fromkeys(assignment, plan), profile, assignment) for plan in fitting}
    assert seconds[single] == pytest.approx(min(seconds.values()))


def test_alike_clients_get_alike_plans_and_nothing_is_gained() -> None:
    clients = [f"client-{index}" for index in range(6)]
    profile = draw_profile(ProfileSettings(distribution="uniform"), clients, ["edge"], seed=0)
    assignment = dict.fromkeys(clients, "edge")
    single = dict.fromkeys(clients, best_single_plan(WORK, profile, assignment))
    own = choose_plans(WORK, profile, assignment)
    assert slowest(own, profile, assignment) <= slowest(single, profile, assignment) * (1 + 1e-9)


def test_a_device_too_small_names_what_it_needs_and_has() -> None:
    settings = ProfileSettings(distribution="mixed", clients={"client-1": DeviceSettings(memory_bytes=50e6)})
    profile = draw_profile(settings, ["client-0", "client-1"], ["edge-0"], seed=0)
    assignment = {"client-0": "edge-0", "client-1": "edge-0"}
    needed = step_costs(WORK, (2, 3, 1)).client_bytes / 1e6
    message = rf"client-1 holds no allowed cut: expected at least {needed:.0f} MB .* 2\|3\|1; got 50 MB: lower batch"
    with pytest.raises(ValueError, match=message):
        choose_plans(WORK, profile, assignment, min_front=2)
    with pytest.raises(ValueError, match="client-1 holds no allowed cut"):
        best_single_plan(WORK, profile, assignment)


@pytest.mark.parametrize(("min_front", "min_tail"), [(0, 1), (1, 0), (5, 1), (3, 3)])
def test_floors_that_cannot_be_met(min_front: int, min_tail: int) -> None:
    with pytest.raises(ValueError, match=f"got min_front={min_front}, min_tail={min_tail}, num_layers=6: lower"):
        allowed_plans(6, min_front=min_front, min_tail=min_tail)
