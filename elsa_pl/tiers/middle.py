"""The middle part, on the edge: one session per client, so that concurrent requests share no mutable state."""

from torch import Tensor

from elsa_pl.tiers.tier import Tier


class MiddleModule(Tier):
    """Hidden states in, hidden states out. It sees an attention mask, and never token ids or labels."""

    def forward(self, received: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states at the second cut.

        Args:
            received: (B, T, D), or what a codec made of it, from the front.
            attention_mask: (B, T), 1 for tokens and 0 for padding.

        Returns:
            (B, G, D), G the tokens after pooling, or what a codec makes of it.
        """
        out: Tensor = self.part({"attention_mask": attention_mask}, self.decoded(received))
        return self.encoded(self.pooled(out, attention_mask))
