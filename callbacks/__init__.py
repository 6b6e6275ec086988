"""Lightning callbacks that other projects can use too: they need lightning, torch and `elsa_pl.functional` only."""

from elsa_pl.callbacks.progress import RoundProgress

__all__ = ["RoundProgress"]
