"""The first part, on the client: embeddings and the first blocks. Token ids stop here."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from elsa_pl.functional.pooling import Pooling, pool_states
from elsa_pl.links import LinkEnd
from elsa_pl.partition import Part
from elsa_pl.tiers.tier import OptimizerFactory, PrecisionContext, Tier


class FrontModule(Tier):
    """Token ids in, hidden states out.

    Args:
        part, make_optimizer, precision, device, encode: see `Tier`.
        pooling: what becomes of the tokens at the first cut; see `elsa_pl.functional.pooling`.
    """

    def __init__(
        self,
        part: Part,
        make_optimizer: OptimizerFactory,
        precision: PrecisionContext = nullcontext,
        device: torch.device | str = "cpu",
        *,
        encode: LinkEnd | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__(part, make_optimizer, precision, device, encode=encode)
        self._pooling = pooling

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The hidden states at the first cut, before the link's stages: (B, G, D), G the tokens after pooling."""
        return pool_states(self.part(batch), batch["attention_mask"], self._pooling)

    def slots(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor] | None:
        """Slots for the texts of a step's passes, see `elsa_pl.links.reuse`; None where the link remembers none."""
        return next((slots for end in self._ends if (slots := end.slots(batches)) is not None), None)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the hidden states at the first cut.

        Args:
            batch: ``input_ids`` and ``attention_mask`` (B, T), and ``token_type_ids`` where the family has them.

        Returns:
            (B, G, D), or what a codec makes of it.
        """
        return self.encoded(self.states(batch))
