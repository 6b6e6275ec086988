"""All that follows the first cut, on the edge, for plans without a tail: the head is here, and labels come to it."""

from torch import Tensor

from elsa_pl.tiers.tier import Tier


class RestModule(Tier):
    """Hidden states and labels in, the loss out: the server's part of a two-part split.

    Source:
        SplitLoRA, Lin et al. 2024, arXiv 2407.00952.
    """

    def forward(
        self, received: Tensor, attention_mask: Tensor, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the loss, and without gradients the logits as well.

        Args:
            received: (B, T, D), or what a codec made of it, from the front.
            attention_mask: (B, T), 1 for tokens and 0 for padding.
            labels: (B,) or (B, T); None if only logits are asked for.

        Returns:
            - the mean loss; None without labels;
            - the logits; None in training, where nobody needs them.
        """
        # Token ids do not come here. A decoder's classifier looks for the last that is no padding: any will do.
        padding = self.part.model.config.get_text_config().pad_token_id or 0
        ids = attention_mask.new_full(attention_mask.shape, padding).where(attention_mask == 0, int(padding == 0))
        batch = {"input_ids": ids, "attention_mask": attention_mask}
        output = self.part(batch if labels is None else {**batch, "labels": labels}, self.decoded(received))
        return output.loss, None if self.part.training else output.logits
