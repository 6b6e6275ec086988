"""The Lightning strategy: processes, collectives and aggregation in two levels."""

from lightning.pytorch.strategies import StrategyRegistry

from elsa_pl.strategies.hierarchical import HierarchicalStrategy

__all__ = ["HierarchicalStrategy"]

# `Trainer(strategy="HierarchicalStrategy")`, and the same in a YAML file; Lightning puts names into lower case
StrategyRegistry.register("hierarchicalstrategy", HierarchicalStrategy, "split and hierarchical federated training")
