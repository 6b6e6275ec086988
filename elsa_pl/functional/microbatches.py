"""Batches cut into micro-batches, so that a single client can keep several passes in flight."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]

IGNORE_INDEX: Final = -100
"""The label of padding in causal language modelling, which the loss leaves out."""


def split_batch(batch: Batch, count: int, *, causal_lm: bool = False) -> list[tuple[Batch, float]]:
    """Cut a batch into micro-batches of texts of like length, each without padding that it does not need.

    The mean loss of the batch is the sum of the micro-batches' mean losses times their shares.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (B, T), padded on the right; ``labels`` (B,) or (B, T); others
            (B, T).
        count: micro-batches to make; fewer if there are fewer texts. 1 leaves the batch as it is.
        causal_lm: the loss is a mean over predicted tokens instead of texts.

    Returns:
        Micro-batches with their shares of the loss, which sum to 1.

    Example:
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
        >>> batch = {"input_ids": 7 * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
        >>> for part, share in split_batch(batch, 2):
        ...     print(part["labels"].tolist(), part["input_ids"].tolist(), round(share, 2))
        [1, 2] [[7, 0], [7, 7]] 0.67
        [0] [[7, 7, 7]] 0.33
    """
    if count == 1 or len(batch["input_ids"]) == 1:
        return [(batch, 1.0)]
    lengths = batch["attention_mask"].sum(1)
    parts, sizes = [], []
    for rows in torch.tensor_split(torch.argsort(lengths, stable=True), min(count, len(lengths))):
        longest = int(lengths[rows].max())
        part = {name: value[rows] if value.ndim == 1 else value[rows, :longest] for name, value in batch.items()}
        parts.append(part)
        sizes.append(num_targets(part["labels"]) if causal_lm else len(rows))
    return [(part, size / sum(sizes)) for part, size in zip(parts, sizes, strict=True)]


def num_targets(labels: Tensor) -> int:
    """Tokens that a causal language model is asked to predict: all but the first of each text and the padding.

    Args:
        labels: (B, T), the tokens themselves, and `IGNORE_INDEX` for padding.
    """
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
