"""Fewer tokens than a text has, from a cut on: the state of the first one, or means of neighbours as well.

By a later block of an encoder the first token has read the whole text, and a classifier looks at nothing else. What is
left out at the first cut never leaves the client: that is many times less to send, and of a mean or a summary nobody
reads the tokens off one by one. At the second cut, most of the model has read every token already.

Shapes: B batch, T tokens, G groups, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["first"] | int
"""``first``: the first token alone. A number n: the first token, and the means of n following ones each."""


@dataclass(frozen=True)
class TokenPooling:
    """What becomes of the tokens at the two cuts.

    Raises:
        ValueError: neither ``first``, nor at least 1, nor None.

    Example:
        >>> TokenPooling(uplink=0)
        Traceback (most recent call last):
        ValueError: expected token_pooling.uplink to be 'first', a number of tokens >= 1, or null; got 0
    """

    uplink: Pooling | None = None
    """Behind the front; None leaves all tokens."""

    downlink: Pooling | None = None
    """Behind the middle, of what came there; None leaves all of that."""

    def __post_init__(self) -> None:
        for link, pooling in (("uplink", self.uplink), ("downlink", self.downlink)):
            if pooling is not None and pooling != "first" and (isinstance(pooling, str) or pooling < 1):
                raise ValueError(
                    f"expected token_pooling.{link} to be 'first', a number of tokens >= 1, or null; got {pooling!r}"
                )

    def __bool__(self) -> bool:
        return self.uplink is not None or self.downlink is not None


def places(num_tokens: int, pooling: Pooling | None) -> tuple[Tensor, Tensor]:
    """In which group each token is, and as which of its tokens.

    Args:
        num_tokens: T.
        pooling: None: every token is a group of its own.

    Returns:
        - numbers of groups. [T]
        - numbers in the group. [T]

    Example:
        >>> places(6, 2)
        (tensor([0, 1, 1, 2, 2, 3]), tensor([0, 0, 1, 0, 1, 0]))
        >>> places(3, "first")
        (tensor([0, 0, 0]), tensor([0, 1, 2]))
    """
    numbers = torch.arange(num_tokens)
    if pooling is None:
        return numbers, torch.zeros_like(numbers)
    if pooling == "first":
        return torch.zeros_like(numbers), numbers
    behind = (numbers - 1).clamp_min(0)
    return torch.where(numbers > 0, 1 + behind // pooling, 0), torch.where(numbers > 0, behind % pooling, 0)


def pool_states(states: Tensor, mask: Tensor, pooling: Pooling | None) -> Tensor:
    r"""The state of each group.

    .. math:: g_i = \frac{\sum_{t \in i} m_t h_t}{\max(1, \sum_{t \in i} m_t)}

    Args:
        states: h. [B, T, D]
        mask: m, 1 for tokens and 0 for padding. [B, T]
        pooling: ``first`` leaves the other tokens of the only group out; None leaves the states as they are.

    Returns:
        In the states' dtype; means are taken in float32 or wider, also under autocast. [B, G, D]

    Source:
        Dai et al. 2020, arXiv 2006.03236 (Funnel-Transformer) pools tokens between blocks, the first one apart.

    Example:
        >>> states = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> pool_states(states, torch.tensor([[1, 1, 1, 0]]), 2)
        tensor([[[1.],
                 [3.],
                 [0.]]])
    """
    if pooling is None:
        return states
    if pooling == "first":
        return states[:, :1]
    groups, _ = places(states.shape[1], pooling)
    dtype = torch.promote_types(states.dtype, torch.float32)
    member = torch.nn.functional.one_hot(groups).T.to(states.device, dtype)
    weights = member * mask[:, None, :].to(member)
    with torch.autocast(states.device.type, enabled=False):  # which would make bfloat16 of float32
        pooled = (weights / weights.sum(2, keepdim=True).clamp_min(1)) @ states.to(dtype)
    return pooled.to(states.dtype)


def pool_batch(batch: Mapping[str, Tensor], pooling: Pooling | None) -> dict[str, Tensor]:
    """What the parts behind a cut see of a batch.

    Args:
        batch: ``attention_mask`` [B, T]; if there, ``input_ids`` [B, T], of which the last part needs no more than the
            shape; and what else there is.
        pooling: as in `pool_states`; None leaves the batch as it is.

    Returns:
        ``attention_mask`` and, if there, ``input_ids`` [B, G] of the first token of each group; without
        ``token_type_ids``; the rest of the batch as it is.

    Example:
        >>> pool_batch({"attention_mask": torch.tensor([[1, 1, 0, 0]]), "labels": torch.tensor([3])}, 2)
        {'attention_mask': tensor([[1, 1, 0]]), 'labels': tensor([3])}
    """
    if pooling is None:
        return dict(batch)
    _, within = places(batch["attention_mask"].shape[1], pooling)
    per_token = {"attention_mask", "input_ids", "token_type_ids"}
    pooled = {name: batch[name][:, within == 0] for name in ("attention_mask", "input_ids") if name in batch}
    return pooled | {name: value for name, value in batch.items() if name not in per_token}
