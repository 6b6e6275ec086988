"""The Lightning strategy: processes, collectives and aggregation in two levels."""

from elsa_pl.strategies.hierarchical import HierarchicalStrategy

__all__ = ["HierarchicalStrategy"]
