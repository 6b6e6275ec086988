"""An aggregator of your own: the mean, where no sender may pull farther than half of the senders do.

    PYTHONPATH=examples python train.py fit --config configs/debug.yaml \
        --trainer.callbacks+=centred_clipping.CentredClipping

The rule is a pure function of adapters and weights. The callback takes the hook that the strategy calls at the edges
and at the cloud before it merges, and leaves it one update to merge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from elsa_pl.functional.aggregation import median


def centred_clipping(adapters: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of what each sender adds to the median, each cut to the median length.

    Args:
        adapters: one mapping for each sender, all with the same names and shapes, and finite.
        weights: one above 0 for each sender.

    Source:
        Karimireddy, He and Jaggi 2021, arXiv 2012.10333, who clip around the mean of the round before.
    """
    centre = median(adapters, weights)
    added = [{name: sent[name] - value for name, value in centre.items()} for sent in adapters]
    lengths = torch.stack([torch.cat([part.flatten() for part in parts.values()]).norm() for parts in added])
    factors = (lengths.median() / lengths.clamp(min=1e-12)).clamp(max=1.0)
    shares = factors * torch.tensor(weights) / sum(weights)
    return {
        name: value + sum(share * parts[name] for share, parts in zip(shares.tolist(), added, strict=True))
        for name, value in centre.items()
    }


class CentredClipping(Callback):
    """Merges by `centred_clipping`. Beside `TrustScoring` it comes after it, since weights must be final."""

    def on_before_aggregate(self, trainer: "pl.Trainer", scope: str, updates: list[Any]) -> list[Any]:
        """Called where adapters are merged, with what arrived: ``scope`` is ``edge`` or ``cloud``."""
        counted = [
            update
            for update in updates
            if update.weight > 0 and all(tensor.isfinite().all() for tensor in update.adapters.values())
        ]
        if not counted:
            return []
        weights = [update.weight for update in counted]
        merged = centred_clipping([update.adapters for update in counted], weights)
        return [replace(counted[0], weight=sum(weights), adapters=merged)]
