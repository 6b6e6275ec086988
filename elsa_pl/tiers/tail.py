"""The last part, on the client: the last blocks, the norm and the head. Labels and logits stay here."""

from collections.abc import Mapping

from torch import Tensor
from transformers.utils import ModelOutput

from elsa_pl.tiers.tier import Tier


class TailModule(Tier):
    """Hidden states in, logits out, and the loss where the batch has labels."""

    def forward(self, received: Tensor, batch: Mapping[str, Tensor]) -> ModelOutput:
        """Return the model's own output.

        Args:
            received: (B, G, D), or what a codec made of it, from the middle.
            batch: ``input_ids`` and ``attention_mask`` (B, G), after pooling; ``labels`` (B,) or (B, T).

        Returns:
            With ``logits``, and ``loss`` if there are labels.
        """
        out: ModelOutput = self.part(batch, self.decoded(received))
        return out
