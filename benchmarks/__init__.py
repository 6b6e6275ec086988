"""Measurements behind the figures of `docs/results.md`."""
