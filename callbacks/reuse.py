"""A callback that saves sending what an edge has seen before."""

import lightning.pytorch as pl

from elsa_pl.callbacks.links import LinkCallback
from elsa_pl.callbacks.probing import is_federated
from elsa_pl.errors import ConfigurationError
from elsa_pl.links.reuse import ReuseStage


class LinkReuse(LinkCallback):
    """Does not send the states of a text again while they change little from one epoch to the next.

    The edge goes on with what it decoded last time, and no gradient of that text comes back: the front does not learn
    from it in that step. Padding is never sent. Only the uplink in training is concerned. Always the first stage, and
    not together with `SSOP`, `LinkNoise` or a stage that learns: the middle would learn on what earlier values of that
    stage had made of a text.

    Both ends keep the states of at most ``capacity`` texts of each client, 4 bytes for each number of them, until the
    client gets another edge or cut or the process ends: of 4096 texts of 20 tokens in a width of 384 that is 126 MB. A
    checkpoint has none of them: a resumed run sends every text once more, and differs from an uninterrupted one by
    that. Whoever reads the link learns which passes have a text in common, even
    with `LinkEncryption`, but neither the text nor a hash of it.

    Args:
        threshold: change below which a text is not sent: the Euclidean norm of the difference to the states that were
            sent last, over that of those. 0 leaves out padding and nothing else.
        capacity: texts; those that come first are kept.

    Raises:
        ConfigurationError: from the start of a run, no `elsa_pl` strategy, or stages that do not go together with it.
        ValueError: a threshold below 0, or a capacity below 1.

    Source:
        SplitCom, arXiv 2602.10564, which adapts the threshold in the course of a run;
        `elsa_pl.links.reuse` has the mechanism.
    """

    def __init__(self, threshold: float = 0.2, *, capacity: int = 4096) -> None:
        super().__init__(ReuseStage(threshold, capacity), ("uplink",), None, None)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if not is_federated(trainer):
            raise ConfigurationError("LinkReuse is for the links of elsa_pl: it needs HierarchicalStrategy")
        super().setup(trainer, pl_module, stage)
