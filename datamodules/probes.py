"""Probe texts: public, the same for everybody, and the only texts on which the clients' models are compared.

They come from a file, or are taken out of the training texts before these are divided. In the file nothing but texts is
accepted: probes go to every process and to the edges, where labels and owners must never be.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from elsa_pl.datamodules.batches import Indices
from elsa_pl.datamodules.sources import Columns, Rows, load_rows

if TYPE_CHECKING:
    from elsa_pl.datamodules.loading import Loaded


class Probes:
    """The probe texts of a run, read when they are first asked for.

    Args:
        file: .csv, .tsv, .json, .jsonl or .parquet, with the text columns of the task and no other; None for training
            texts.
        num_probes: how many texts, >= 0; 0: all of the file, or none.
        columns: of the task.
        what: the texts are; ``<what>_file`` is the setting's name in errors.

    Raises:
        ValueError: ``num_probes`` is negative.
    """

    def __init__(self, file: str | None, num_probes: int, columns: Columns, what: str = "probe") -> None:
        if num_probes < 0:
            raise ValueError(f"expected num_probes >= 0, got {num_probes}: raise num_probes")
        self.file = file
        self.num_probes = num_probes
        self._columns, self._what = columns, what
        self._read: Rows | None = None

    def of(self, loaded: "Loaded | None", own_client: str | None) -> Rows:
        """Return the texts: those of the file, or else those that were set aside.

        Args:
            loaded: the data, where this process has some.
            own_client: of a site.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it has other columns or too few rows, is not what it must be otherwise, or no probes are asked
                for at all.
            RuntimeError: training texts are asked for before the data is loaded.
        """
        if self.file is not None:
            if self._read is None:
                self._read = self._load(self.file)
            return self._read
        if not self.num_probes:
            advice = "data.probe_file" if own_client else "data.num_probes (such as 128) or data.probe_file"
            raise ValueError(f"expected probe texts, got none: set {advice}")
        if loaded is None:
            raise RuntimeError(
                "expected the data to be loaded before training texts can be probes: call load() first, or set "
                "data.probe_file, which a process without data needs"
            )
        assert loaded.probes is not None
        return loaded.probes

    def _load(self, file: str) -> Rows:
        table = load_rows(self._what, file, replace(self._columns, label=None, client=None), private=False)
        if len(table) < self.num_probes:
            raise ValueError(
                f"expected at least num_probes={self.num_probes} rows in probe_file {file}, got {len(table)}: lower "
                "data.num_probes, leave it at 0 to use all rows, or add texts"
            )
        rows = Rows.of(table, self._what, None, given=False)
        return rows.take(np.arange(self.num_probes)) if self.num_probes else rows


def set_probes_aside(strata: npt.ArrayLike, num_probes: int, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """Take exactly so many examples out, from each stratum in proportion to its size; none loses its last one.

    The seats of a parliament are divided so, by the method of Sainte-Laguë: of a stratum with E examples in random
    order, number k from 0 stands at (k + 1/2) / E, and those that stand first are taken.

    Args:
        strata: the label or the owner of each example. [E]
        num_probes: >= 1.
        generator: decides which examples.

    Returns:
        Indices of the kept examples and of the probes, both sorted.

    Raises:
        ValueError: there are not so many examples to spare.

    Example:
        >>> set_probes_aside(["a", "b", "b", "b", "b"], 2, np.random.default_rng(0))[1].tolist()
        [2, 4]
    """
    _, codes, totals = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    spare = len(codes) - len(totals)
    if num_probes > spare:
        raise ValueError(
            f"expected num_probes <= {spare}, the training rows less one of each label or owner, got {num_probes} "
            f"with {len(codes)} rows: lower data.num_probes, set data.probe_file, or use more data"
        )
    order = generator.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    number = np.arange(len(codes)) - np.repeat(np.cumsum(totals) - totals, totals)
    size = np.repeat(totals, totals)
    place = np.where(number < size - 1, (number + 0.5) / size, np.inf)
    # between strata of equal size at random, not by the alphabet
    first = np.lexsort((generator.random(len(codes)), place))[:num_probes]
    probes = np.sort(order[first])
    return np.setdiff1d(np.arange(len(codes)), probes), probes
