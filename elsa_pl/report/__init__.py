"""``report.html`` of a run or of a suite: one file that opens offline, on a phone as well."""

from elsa_pl.report.runs import write_run_report
from elsa_pl.report.suites import write_suite_report

__all__ = ["write_run_report", "write_suite_report"]
