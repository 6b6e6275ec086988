"""What plans by resources are worth in a mixed fleet: simulated seconds of a round against the best single plan.

    python -m benchmarks.fleets [--clients 24] [--edges 2] [--batch_size 16] [--num_tokens 64]

From the cost model and drawn fleets of laptops, small computers and phones alone; ``benchmarks.cuts`` holds the cost
model against measured steps. No training: plans do not change what is learnt, since every cut computes what the uncut
model does (``tests/test_behaviour.py`` trains with and without). Clients are assigned by latency.
"""

import argparse
import math
import statistics

import torch

from benchmarks.setting import build_model
from elsa_pl.functional.assignment import assign
from elsa_pl.functional.clock import trip_seconds
from elsa_pl.functional.costs import Workload, shape_of
from elsa_pl.functional.plans import best_single_plan, choose_plans, fleet_seconds
from elsa_pl.functional.profiles import ProfileSettings, draw_profile
from elsa_pl.models import uncut

NUM_CLASSES, LOCAL_STEPS, SEEDS = 6, 10, (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--edges", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_tokens", type=int, default=64)
    args = parser.parse_args()
    model = build_model(NUM_CLASSES)
    shape = shape_of(uncut(model).config)
    adapter_bytes = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    workload = Workload(shape=shape, batch_size=args.batch_size, num_tokens=args.num_tokens)
    clients = [f"client-{index}" for index in range(args.clients)]
    edges = [f"edge-{index}" for index in range(args.edges)]
    print(
        f"MiniLM, {args.clients} clients of a mixed fleet, {args.edges} edges, {LOCAL_STEPS} steps of"
        f" {args.batch_size} x {args.num_tokens} tokens a round"
    )
    gains = []
    for seed in SEEDS:
        profile = draw_profile(ProfileSettings(distribution="mixed"), clients, edges, seed)
        latency_s = torch.tensor([[profile.latency_s[client][edge] for edge in edges] for client in clients])
        places = assign(latency_s, None, [math.ceil(1.25 * len(clients) / len(edges))] * len(edges))
        assignment = {client: edges[place] for client, place in zip(clients, places.tolist(), strict=True)}
        single = best_single_plan(workload, profile, assignment)
        own = choose_plans(workload, profile, assignment)
        trip_s = 2 * max(
            trip_seconds(adapter_bytes, bytes_per_s=edge.cloud_bytes_per_s, latency_s=edge.cloud_latency_s)
            for edge in profile.edges.values()
        )
        rounds_s = [
            trip_s + LOCAL_STEPS * max(fleet_seconds(workload, plans, profile, assignment).values())
            for plans in (dict.fromkeys(clients, single), own)
        ]
        gains.append(1 - rounds_s[1] / rounds_s[0])
        print(
            f"  seed {seed}: best single plan {'|'.join(map(str, single))} {rounds_s[0]:.1f} s, plans of their own"
            f" ({len(set(own.values()))} different) {rounds_s[1]:.1f} s: {gains[-1]:.0%} less"
        )
    print(f"  mean: {statistics.mean(gains):.0%} less")


if __name__ == "__main__":
    main()
