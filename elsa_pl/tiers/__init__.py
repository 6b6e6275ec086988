"""What each place of the split computes, and the module that composes them."""

from elsa_pl.tiers.front import FrontModule
from elsa_pl.tiers.middle import MiddleModule
from elsa_pl.tiers.split import SplitModel
from elsa_pl.tiers.tail import TailModule

__all__ = ["FrontModule", "MiddleModule", "SplitModel", "TailModule"]
