"""The middle part, on the edge: one session per client, so that concurrent requests share no mutable state."""

from contextlib import nullcontext

import torch
from torch import Tensor

from elsa_pl.functional.pooling import Pooling, pool_states
from elsa_pl.links import LinkEnd
from elsa_pl.partition import Part
from elsa_pl.tiers.tier import OptimizerFactory, PrecisionContext, Tier


class MiddleModule(Tier):
    """Hidden states in, hidden states out. It sees an attention mask, and never token ids or labels.

    Args:
        part, make_optimizer, precision, device, decode, encode: see `Tier`.
        pooling: what becomes of the tokens at the second cut; see `elsa_pl.functional.pooling`.
    """

    def __init__(
        self,
        part: Part,
        make_optimizer: OptimizerFactory,
        precision: PrecisionContext = nullcontext,
        device: torch.device | str = "cpu",
        *,
        decode: LinkEnd | None = None,
        encode: LinkEnd | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__(part, make_optimizer, precision, device, decode=decode, encode=encode)
        self._pooling = pooling

    def forward(self, received: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states at the second cut.

        Args:
            received: (B, T, D), or what a codec made of it, from the front.
            attention_mask: (B, T), 1 for tokens and 0 for padding.

        Returns:
            (B, G, D), G the tokens after pooling, or what a codec makes of it.
        """
        out: Tensor = self.part({"attention_mask": attention_mask}, self.decoded(received))
        return self.encoded(pool_states(out, attention_mask, self._pooling))
