"""Suites of runs: methods x data sets x cases x seeds, their figures in one table, and a report of it.

python -m elsa_pl.experiments run configs/suites/accuracy.yaml --data_root DATA_ROOT
python -m elsa_pl.experiments report runs/experiments/accuracy
"""

from elsa_pl.experiments.cells import Cell, run_cells
from elsa_pl.experiments.results import COLUMNS, FORMAT, read_results
from elsa_pl.experiments.suites import Suite, load_suite

__all__ = ["COLUMNS", "FORMAT", "Cell", "Suite", "load_suite", "read_results", "run_cells"]
