"""What the partitions share: checks, dealing examples out by counts, and errors that name settings that work."""

import copy
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from elsa_pl.datamodules.batches import Indices

Drawn = TypeVar("Drawn")

MAX_DRAWS: Final = 20
"""How many times ``dirichlet`` and ``groups`` draw before they give up."""


def label_codes(labels: npt.ArrayLike, num_clients: int) -> tuple[Indices, Indices]:
    """Return labels as numbers from 0 to C-1 [E], and how many examples each has [C]."""
    require_positive("num_clients", num_clients)
    _, codes, totals = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    return codes.astype(np.int64), totals.astype(np.int64)


def deal(codes: Indices, counts: Indices, generator: np.random.Generator) -> list[Indices]:
    """Pick examples at random so that client n gets ``counts[c, n]`` of label c."""
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    num_clients = counts.shape[1]
    owner = np.repeat(np.tile(np.arange(num_clients), len(counts)), counts.ravel())
    order = order[np.argsort(owner, kind="stable")]
    return list(np.split(order, np.cumsum(counts.sum(axis=0))[:-1]))


def draw_or_explain(
    draw: Callable[[float, int, np.random.Generator], tuple[Indices, Drawn]],
    alpha: float,
    num_clients: int,
    generator: np.random.Generator,
    min_examples: int,
    name: str,
    fewest: int = 1,
) -> Drawn:
    """Return what ``draw`` made besides the sizes, or raise with an alpha and a client count that work."""
    start = copy.deepcopy(generator)
    sizes, drawn = draw(alpha, num_clients, generator)
    if sizes.min() >= min_examples:
        return drawn

    def works(alpha: float, num_clients: int) -> bool:
        return bool(draw(alpha, num_clients, copy.deepcopy(start))[0].min() >= min_examples)

    larger = next((a for a in _larger(alpha) if works(a, num_clients)), None)
    fewer = next((n for n in range(num_clients - 1, fewest - 1, -1) if works(alpha, n)), None)
    advice = [f"alpha={larger:g}"] if larger is not None else []
    advice += [f"num_clients={fewer}"] if fewer is not None else []
    small = [f"client-{i} ({sizes[i]})" for i in np.flatnonzero(sizes < min_examples)]
    raise ValueError(
        f"expected at least min_examples={min_examples} examples for every client, got {shorten(small)} "
        f"in the last of {MAX_DRAWS} {name} draws with alpha={alpha:g}, num_clients={num_clients}: "
        + (f"with the same seed {' or '.join(advice)} works" if advice else "use more data or partition=iid")
    )


def _larger(alpha: float) -> list[float]:
    """Return round numbers above alpha: 1, 2, 3, 5 times powers of ten, up to 1000."""
    return [m * 10.0**e for e in range(-3, 3) for m in (1, 2, 3, 5) if m * 10.0**e > alpha] + [1000.0]


def require_positive(name: str, value: float) -> None:
    """Refuse what is not a positive finite number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"expected {name} > 0, got {value}: give a positive number")


def require_enough(num_examples: int, num_clients: int, min_examples: int, name: str) -> None:
    """Refuse a partition for which there are too few examples; ``name`` is its name."""
    if num_examples >= num_clients * max(1, min_examples):
        return
    most = num_examples // max(1, min_examples)
    raise ValueError(
        f"expected at least {max(1, min_examples)} examples for each of {num_clients} clients, got "
        f"{num_examples} in all for partition {name}: " + (f"use num_clients <= {most}" if most else "use more data")
    )


def shorten(items: list[str], most: int = 8) -> str:
    """Join at most so many, and say how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def sorted_parts(parts: Sequence[Indices]) -> list[Indices]:
    """Return the rows of each client in ascending order."""
    return [np.sort(part).astype(np.int64) for part in parts]
