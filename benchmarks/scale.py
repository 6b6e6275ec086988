"""Seconds and memory of what grows with the number of clients: divergences of all pairs, and assignment to edges.

    python -m benchmarks.scale

Each measurement runs in a process of its own, because peak memory is a property of a process. The peak includes
Python, PyTorch and the fingerprints themselves.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

WIDTH = 64
FLEETS = (1_000, 10_000)
NUM_CLIENTS, NUM_EDGES = 1_000, 16
_CLIENTS_DRAWN_AT_ONCE = 500


def draw_fingerprints(num_clients: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussians that differ as those of clients do: a common covariance with decaying spectrum, and changes to it."""
    generator = torch.Generator().manual_seed(0)
    spectrum = 1 / torch.arange(1, WIDTH + 1).sqrt()
    means = torch.randn(num_clients, WIDTH, generator=generator) * spectrum
    covariances = torch.empty(num_clients, WIDTH, WIDTH)
    for start in range(0, num_clients, _CLIENTS_DRAWN_AT_ONCE):
        block = covariances[start : start + _CLIENTS_DRAWN_AT_ONCE]
        factors = (torch.eye(WIDTH) + 0.05 * torch.randn(block.shape, generator=generator)) * spectrum[:, None]
        torch.bmm(factors, factors.mT, out=block)
    return means, covariances


def time_divergences(num_clients: int) -> str:
    from elsa_pl.functional.divergence import symmetric_kl

    means, covariances = draw_fingerprints(num_clients)
    start = time.perf_counter()
    divergences = symmetric_kl(means, covariances)
    seconds = time.perf_counter() - start
    assert divergences.shape == (num_clients, num_clients)
    return f"divergences of {num_clients:>6,} clients, width {WIDTH}: {seconds:6.2f} s, peak {peak_mb():6.0f} MB"


def time_assignment() -> str:
    from elsa_pl.functional.assignment import assign
    from elsa_pl.functional.divergence import symmetric_kl

    generator = torch.Generator().manual_seed(0)
    divergences = symmetric_kl(*draw_fingerprints(NUM_CLIENTS)).double()
    clients, edges = (torch.rand(count, 2, generator=generator).double() for count in (NUM_CLIENTS, NUM_EDGES))
    latency_s = 0.005 + 0.05 * torch.cdist(clients, edges)
    capacities = torch.full((NUM_EDGES,), NUM_CLIENTS * 5 // (4 * NUM_EDGES))
    trust = torch.rand(NUM_CLIENTS, generator=generator).double()
    start = time.perf_counter()
    assigned = assign(latency_s, divergences, capacities, trust)
    seconds = time.perf_counter() - start
    assert len(assigned) == NUM_CLIENTS
    return f"assignment of {NUM_CLIENTS:>6,} clients to {NUM_EDGES} edges:  {seconds:6.2f} s"


def peak_mb() -> float:
    """Most memory that this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, help="measure divergences of so many clients, in this process")
    parser.add_argument("--assignment", action="store_true", help="measure assignment, in this process")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.clients:
        print(time_divergences(settings.clients))
    elif settings.assignment:
        print(time_assignment())
    else:
        for part in [*(["--clients", str(count)] for count in FLEETS), ["--assignment"]]:
            subprocess.run([sys.executable, "-m", "benchmarks.scale", *part], check=True)


if __name__ == "__main__":
    main()
