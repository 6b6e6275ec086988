"""``report.html`` of a run or of a suite: one file that opens offline, on a phone as well."""
