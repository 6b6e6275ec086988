"""The middle part, on the edge: one session per client, so that concurrent requests share no mutable state."""

from torch import Tensor

from elsa_pl.tiers.tier import Tier


class MiddleModule(Tier):
    """Hidden states in, hidden states out. It sees an attention mask, and never token ids or labels."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states at the second cut.

        Args:
            hidden: (B, T, D), from the front.
            attention_mask: (B, T), 1 for tokens and 0 for padding.

        Returns:
            (B, T, D).
        """
        out: Tensor = self.part({"attention_mask": attention_mask}, hidden)
        return out
