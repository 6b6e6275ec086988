import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elsa_pl.functional.assignment import assign, assignment_costs
from elsa_pl.functional.profiles import latencies_s


def federation(
    num_clients: int = 20, num_edges: int = 4, *, at_home: float = 0.7, separation: float = 1.5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Latencies, divergences and groups of a fleet whose behaviour and place are partly correlated.

    A square of 1,000 km with an edge in the middle of each region and a behaviour group that belongs there, as
    customers of a region have their own questions. 70% of the clients are near their group's edge (100 km standard
    deviation), the others anywhere: branches and travellers. Last miles of 5, 10 and 20 ms in equal parts, as in the
    profile ``mixed``. Behaviour is a Gaussian of 16 dimensions around the group's centre, 1.5 times as wide between the
    groups as within; the divergence is half the squared distance, as between Gaussians of equal covariance.
    """
    draw = np.random.default_rng(seed)
    side = math.isqrt(num_edges)
    ticks = (np.arange(side) + 0.5) * 1000 / side
    edges_km = np.array(list(itertools.product(ticks, ticks)))
    groups = draw.permutation(np.arange(num_clients) % num_edges)
    stays = draw.uniform(size=(num_clients, 1)) < at_home
    near = edges_km[groups] + draw.normal(size=(num_clients, 2)) * 100
    places = np.where(stays, near, draw.uniform(0, 1000, (num_clients, 2)))
    access = np.array([0.005, 0.010, 0.020])[draw.permutation(np.arange(num_clients) % 3)]
    centres = draw.normal(size=(num_edges, 16)) * separation
    points = torch.from_numpy(centres[groups] + draw.normal(size=(num_clients, 16)))
    apart = torch.cdist(points, points).square() / 2
    apart = (apart + apart.T) / 2
    return torch.from_numpy(latencies_s(places, edges_km, access)), apart.fill_diagonal_(0), torch.from_numpy(groups)


def sizes(edges: Tensor, count: int) -> list[int]:
    return torch.bincount(edges, minlength=count).tolist()


def slow_objective(edges: list[int], latency_s: Tensor, divergences: Tensor, trust: list[float]) -> float:
    """The docstring's formula, term by term, with all weights 1."""
    clients, count = latency_s.shape
    between = [float(divergences[n, k]) for n in range(clients) for k in range(clients) if n != k]
    latency_scale, behaviour_scale = np.median(latency_s), np.median(between)
    even = max(1.0, sum(1 - t for t in trust) / count)
    total = 0.0
    for n, edge in enumerate(edges):
        members = [k for k in range(clients) if edges[k] == edge]
        weight = sum(trust[k] for k in members)
        total += float(latency_s[n, edge]) / float(latency_scale)
        for k in members:
            if weight:
                total += trust[n] * trust[k] / weight * float(divergences[n, k]) / float(behaviour_scale)
            total += (1 - trust[n]) * (1 - trust[k]) / even
    return total


@pytest.mark.parametrize("seed", range(5))
def test_both_goals_are_nearly_met_at_default_weights(seed: int) -> None:
    latency_s, divergences, _ = federation(seed=seed)
    capacities = [7] * 4

    def costs(latency_weight: float = 1.0, behaviour_weight: float = 1.0) -> tuple[float, float]:
        weights = {"latency_weight": latency_weight, "behaviour_weight": behaviour_weight}
        edges = assign(latency_s, divergences, capacities, None, **weights)
        assert max(sizes(edges, 4)) <= 7
        return assignment_costs(edges, latency_s, divergences)[:2]

    latency, divergence = costs()
    assert latency <= 1.15 * costs(behaviour_weight=0.0)[0]
    assert divergence <= 1.15 * costs(latency_weight=0.0)[1]


def test_behaviour_alone_finds_the_planted_groups() -> None:
    latency_s, divergences, groups = federation()
    edges = assign(latency_s, divergences, [5] * 4, latency_weight=0.0)
    assert len({(int(edge), int(group)) for edge, group in zip(edges, groups, strict=True)}) == 4


def test_latency_alone_is_the_exact_optimum() -> None:
    latency_s, divergences, _ = federation()
    nearest = latency_s.min(1).values.sum().item()
    edges = assign(latency_s, divergences, [20] * 4, behaviour_weight=0.0)
    assert assignment_costs(edges, latency_s, None).latency_s == pytest.approx(nearest)
    assert torch.equal(edges, assign(latency_s, None, [20] * 4))
    assert torch.equal(edges, latency_s.argmin(1))


@pytest.mark.parametrize(
    ("seed", "capacities"), [(0, [3, 3, 3]), (1, [7, 2, 1]), (2, [4, 4, 0]), (3, [7, 7, 7]), (4, [3, 2, 2])]
)
def test_near_the_optimum_of_small_problems(seed: int, capacities: list[int]) -> None:
    draw = np.random.default_rng(seed)
    points = torch.from_numpy(draw.normal(size=(7, 3)))
    divergences = torch.cdist(points, points).square().fill_diagonal_(0)
    latency_s = torch.from_numpy(draw.uniform(0.01, 0.03, (7, 3)))
    trust = torch.from_numpy(draw.choice([0.0, 0.4, 1.0], size=7))
    given = (latency_s, divergences, trust)
    found = assign(latency_s, divergences, capacities, trust)
    assert all(size <= most for size, most in zip(sizes(found, 3), capacities, strict=True))
    least = min(
        slow_objective(list(edges), latency_s, divergences, trust.tolist())
        for edges in itertools.product(range(3), repeat=7)
        if all(edges.count(edge) <= capacities[edge] for edge in range(3))
    )
    assert assignment_costs(found, *given).objective <= 1.03 * least


@pytest.mark.parametrize("num_clients", [1, 2, 5, 9])
@pytest.mark.parametrize("num_edges", [1, 3])
def test_costs_equal_the_sums_of_the_formula(num_clients: int, num_edges: int) -> None:
    draw = np.random.default_rng(num_clients)
    points = torch.from_numpy(draw.normal(size=(num_clients, 2)))
    divergences = torch.cdist(points, points).fill_diagonal_(0)
    latency_s = torch.from_numpy(draw.uniform(0.01, 0.03, (num_clients, num_edges)))
    trust = torch.from_numpy(draw.choice([0.0, 0.5, 1.0], size=num_clients))
    edges = torch.from_numpy(draw.integers(num_edges, size=num_clients))
    if num_clients > 1:
        expected = slow_objective(edges.tolist(), latency_s, divergences, trust.tolist())
        costs = assignment_costs(edges, latency_s, divergences, trust)
        assert costs.objective == pytest.approx(expected)
    plain = assignment_costs(edges, latency_s, divergences)
    own = [divergences[n][edges == edges[n]].mean().item() for n in range(num_clients)]
    assert plain.divergence == pytest.approx(sum(own))
    assert plain.latency_s == pytest.approx(sum(latency_s[n, edges[n]].item() for n in range(num_clients)))


def test_weights_trade_one_goal_for_the_other() -> None:
    latency_s, divergences, _ = federation(at_home=0.3)
    costs = []
    for weight in (0.0, 0.1, 0.3, 1.0, 10.0):
        edges = assign(latency_s, divergences, [7] * 4, behaviour_weight=weight)
        costs.append(assignment_costs(edges, latency_s, divergences))
    for before, after in itertools.pairwise(costs):
        assert after.latency_s >= before.latency_s - 1e-9
        assert after.divergence <= before.divergence + 1e-9
    assert costs[-1].divergence < costs[0].divergence


def test_clients_of_low_trust_are_spread() -> None:
    latency_s, divergences, _ = federation()
    faulty = torch.tensor([0, 1, 2, 3])
    latency_s[faulty] = latency_s[latency_s[:, 0].argmin()].clone()  # neighbours, near edge 0, and alike
    divergences[faulty] = divergences[0].clone()
    divergences[:, faulty] = divergences[0].clone()[:, None]
    divergences[faulty[:, None], faulty] = 0
    trust = torch.ones(20).index_fill(0, faulty, 0.0)
    together = assign(latency_s, divergences, [8] * 4)
    apart = assign(latency_s, divergences, [8] * 4, trust)
    assert max(sizes(together[faulty], 4)) >= 3
    assert sizes(apart[faulty], 4) == [1, 1, 1, 1]
    ignored = assign(latency_s, divergences, [8] * 4, trust, spread_weight=0.0)
    assert sizes(ignored[faulty], 4) == [4, 0, 0, 0]


def test_who_is_not_trusted_has_no_say_in_who_belongs_together() -> None:
    latency_s, divergences, _ = federation()
    trust = torch.ones(20).index_fill(0, torch.tensor([5]), 0.0)
    edges = assign(latency_s, divergences, [7] * 4, trust)
    strange = divergences.clone()
    strange[5] = strange[:, 5] = 1e3
    strange[5, 5] = 0
    # the median, which is the scale, moves a little
    scaled = strange * (_median_apart(divergences) / _median_apart(strange))
    assert torch.equal(edges, assign(latency_s, scaled, [7] * 4, trust))


def _median_apart(divergences: Tensor) -> float:
    return float(np.median(divergences[~torch.eye(len(divergences), dtype=torch.bool)]))


def test_units_do_not_matter() -> None:
    latency_s, divergences, _ = federation()
    edges = assign(latency_s, divergences, [6] * 4)
    assert torch.equal(edges, assign(1000 * latency_s, divergences / 7, [6] * 4))
    assert torch.equal(edges, assign(latency_s.float(), divergences.float(), torch.tensor([6] * 4)))


def test_equal_input_gives_equal_output() -> None:
    latency_s, divergences, _ = federation(seed=3)
    first = assign(latency_s, divergences, [6] * 4)
    torch.manual_seed(1)
    assert torch.equal(first, assign(latency_s, divergences, [6] * 4))


def test_one_client_one_edge_and_identical_clients() -> None:
    assert assign(torch.tensor([[0.1]]), torch.zeros(1, 1), [1]).tolist() == [0]
    assert assign(torch.tensor([[0.2, 0.1]]), None, [1, 1]).tolist() == [1]
    assert assign(torch.rand(5, 1), torch.zeros(5, 5), [5]).tolist() == [0] * 5
    latency_s, _, _ = federation()
    same = assign(latency_s, torch.zeros(20, 20), [20] * 4)
    assert torch.equal(same, latency_s.argmin(1))
    assert sizes(assign(torch.zeros(4, 2), torch.zeros(4, 4), [2, 2]), 2) == [2, 2]


def test_nobody_is_trusted() -> None:
    latency_s, divergences, _ = federation()
    edges = assign(latency_s, divergences, [8] * 4, torch.zeros(20))
    assert sizes(edges, 4) == [5, 5, 5, 5]
    assert assignment_costs(edges, latency_s, divergences, torch.zeros(20)).divergence == 0


@pytest.mark.slow
def test_a_thousand_clients() -> None:
    latency_s, divergences, _ = federation(1000, 16)
    start = time.process_time()  # of this process alone: others may be busy too
    edges = assign(latency_s, divergences, [75] * 16)
    assert time.process_time() - start < 5
    assert max(sizes(edges, 16)) <= 75


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"capacities": [2, 1]}, r"places for 4 clients; got capacities \[2, 1\], 3 in all: raise them"),
        ({"capacities": [4]}, "each of 2 edges"),
        ({"capacities": [5, -1]}, "whole number of places"),
        ({"capacities": [2.5, 2.5]}, "whole number of places"),
        ({"latency_s": torch.full((4, 2), math.nan)}, r"latency_s that are finite.*clients \[0, 1, 2, 3\]"),
        ({"latency_s": torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, 1.0]])}, r"clients \[1\]"),
        ({"latency_s": torch.zeros(4)}, "at least one client and edge"),
        ({"latency_s": torch.zeros(0, 2)}, "at least one client and edge"),
        ({"divergences": torch.zeros(3, 3)}, r"shape \(4, 4\)"),
        ({"divergences": torch.full((4, 4), math.nan)}, "divergences that are finite"),
        ({"divergences": torch.ones(4, 4)}, "zero diagonal"),
        ({"divergences": torch.triu(torch.ones(4, 4), 1)}, "symmetric"),
        ({"trust": torch.ones(3)}, "trust in"),
        ({"trust": torch.full((4,), 1.5)}, "trust in"),
        ({"trust": torch.full((4,), math.nan)}, "trust in"),
        ({"latency_weight": -1.0}, "latency_weight >= 0"),
        ({"behaviour_weight": math.inf}, "behaviour_weight >= -inf, and finite; got inf"),
        ({"behaviour_weight": -math.inf}, "behaviour_weight >= -inf, and finite; got -inf"),
        ({"latency_weight": -1.0}, "latency_weight >= 0, and finite; got -1"),
        ({"spread_weight": math.nan}, "spread_weight >= 0"),
    ],
)
def test_bad_input(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"latency_s": torch.ones(4, 2), "divergences": None, "capacities": [2, 2]}
    with pytest.raises(ValueError, match=message):
        assign(**{**given, **changed})


@pytest.mark.parametrize("edges", [[0, 1], [0, 1, 2, 0], [0, -1, 0, 0]])
def test_costs_of_an_assignment_that_does_not_fit(edges: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected 4 indices of edges in \[0, 2\)"):
        assignment_costs(torch.tensor(edges), torch.ones(4, 2), None)


@pytest.mark.parametrize("seed", range(4))
def test_below_zero_each_edge_has_all_kinds(seed: int) -> None:
    """Four kinds of clients: of 8 on 2 edges each edge has one of each, as trying all assignments shows."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(8) % 4
    order = torch.randperm(8, generator=generator)
    kinds = kinds[order]
    noise = torch.rand(8, 8, generator=generator)
    divergences = 10.0 * (kinds[:, None] != kinds[None, :]) + noise + noise.T
    divergences.fill_diagonal_(0)
    latency_s = 0.001 * torch.rand(8, 2, generator=generator)
    edges = assign(latency_s, divergences, [4, 4], latency_weight=0.01, behaviour_weight=-1.0)
    for edge in (0, 1):
        assert sorted(kinds[edges == edge].tolist()) == [0, 1, 2, 3]
    found = assignment_costs(edges, latency_s, divergences, latency_weight=0.01, behaviour_weight=-1.0)
    halves = [
        torch.tensor([index in members for index in range(8)]).long() for members in itertools.combinations(range(8), 4)
    ]
    objectives = [
        assignment_costs(half, latency_s, divergences, latency_weight=0.01, behaviour_weight=-1.0).objective
        for half in halves
    ]
    assert found.objective == pytest.approx(min(objectives))
