"""The first part, on the client: embeddings and the first blocks. Token ids stop here."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from elsa_pl.tiers.tier import Tier


class FrontModule(Tier):
    """Token ids in, hidden states out."""

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The hidden states at the first cut, before the link's stages: (B, G, D), G the tokens after pooling."""
        return self.pooled(self.part(batch), batch["attention_mask"])

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
