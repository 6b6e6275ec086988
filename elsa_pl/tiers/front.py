"""The first part, on the client: embeddings and the first blocks. Token ids stop here."""

from collections.abc import Mapping

from torch import Tensor

from elsa_pl.tiers.tier import Tier


class FrontModule(Tier):
    """Token ids in, hidden states out."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the hidden states at the first cut.

        Args:
            batch: ``input_ids`` and ``attention_mask`` (B, T), and ``token_type_ids`` where the family has them.

        Returns:
            (B, T, D), or what a codec makes of it.
        """
        hidden: Tensor = self.part(batch)
        return self.encoded(hidden)
