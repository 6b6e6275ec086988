"""A partitioner of your own: clients whose numbers of examples fall by a power law.

    python examples/unequal_sizes.py data/train.csv data/owned.csv --num_clients 10 --exponent 1.5
    python train.py fit --config configs/text_classification.yaml --data.train_file data/owned.csv \
        --data.test_file data/test.csv --data.partition column --data.client_column client

The data module takes any division that a column of the training file names, so a partitioner writes that column.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd


def unequal_sizes(
    num_examples: int, num_clients: int, exponent: float, generator: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Divide examples at random into parts of sizes like 1, 2^-exponent, 3^-exponent and so on; each has one at least.

    Args:
        num_examples: E, at least as many as clients.
        num_clients: N.
        exponent: 0 gives equal sizes.
        generator: decides who gets which.

    Returns:
        The indices of each client's examples, sorted.

    Raises:
        ValueError: fewer examples than clients.
    """
    if not 1 <= num_clients <= num_examples:
        raise ValueError(f"expected 1 <= num_clients <= {num_examples}, the examples; got {num_clients}: lower it")
    shares = np.arange(1, num_clients + 1) ** -exponent
    ends = np.round(np.cumsum(shares) / shares.sum() * (num_examples - num_clients)).astype(int)
    ends += np.arange(1, num_clients + 1)  # one for each, and the rest by share
    return [np.sort(part) for part in np.split(generator.permutation(num_examples), ends[:-1])]


def main(args: Sequence[str] | None = None) -> None:
    """Read a CSV file, and write it with a column that names the owner of each row."""
    parser = argparse.ArgumentParser(description="Write a CSV file with a column `client`.")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--num_clients", type=int, default=10)
    parser.add_argument("--exponent", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    rows = pd.read_csv(given.source)
    parts = unequal_sizes(len(rows), given.num_clients, given.exponent, np.random.default_rng(given.seed))
    for number, part in enumerate(parts):
        rows.loc[part, "client"] = f"client-{number}"
    rows.to_csv(given.target, index=False)


if __name__ == "__main__":
    main()
