"""What the split model knows of its links: their stages, the codecs made of these, and what those were fitted to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elsa_pl.errors import ConfigurationError
from elsa_pl.functional.pooling import TokenPooling
from elsa_pl.hooks import asks, hooks
from elsa_pl.links import LINKS, PREFIX, Codec, Link, Stage
from elsa_pl.partition import SplitPlan
from elsa_pl.tiers.evaluation import EvaluatedModel
from elsa_pl.tiers.parameters import ParameterTree

_LINKS_OF: dict[str, tuple[Link, ...]] = {"three-part": LINKS, "two-part": ("uplink",), "uncut": ()}


class LinkedModel(EvaluatedModel):
    """The part of `elsa_pl.tiers.SplitModel` that is about links."""

    client_plans: dict[str, SplitPlan]
    token_pooling: TokenPooling
    adapters: ParameterTree

    def __init__(self) -> None:
        super().__init__()
        self._hidden_size = 0
        self._published: dict[str, Tensor] = {}  # what links were fitted to

    def global_adapters(self) -> dict[str, Tensor]:
        """The global adapters, by global layer name (not copies)."""
        return {name: value.detach() for name, value in self.adapters.items()}

    def link_stages(self) -> dict[Link, list[Stage]]:
        """What the callbacks do to the states of each link, in their order."""
        named = list(hooks(self.trainer, "link_stage"))
        return {link: [stage for hook in named if (stage := hook(link)) is not None] for link in LINKS}

    def codecs(self, plan: SplitPlan, client: str | None = None) -> dict[Link, Codec]:
        """New codecs for a client that is cut so; none for a link without stages.

        Args:
            plan: with the middle filled in.
            client: whose; None for codecs that are made to fit those of all clients.

        Raises:
            ConfigurationError: stages that do not fit the model or each other.
        """
        cut_at = f"{plan.front}-{plan.middle}-{plan.tail}"
        return {
            link: Codec(f"{link}.{cut_at}", link, stages, self._hidden_size, client)
            for link, stages in self.link_stages().items()
            if stages and link in _LINKS_OF[plan.kind]
        }

    def fit_stages(self, trainer: Any, plan: SplitPlan, hidden_size: int) -> None:
        """Learn what the links are, and refuse stages that do not fit, before any process starts.

        Args:
            trainer: its callbacks are the stages.
            plan: of clients without one of their own, with the middle filled in.
            hidden_size: D.

        Raises:
            ConfigurationError: with the stage and the link.
        """
        self.trainer = trainer
        self._hidden_size = hidden_size
        self.codecs(plan)
        plans = [plan, *self.client_plans.values()]
        links = [link for link in LINKS if all(link in _LINKS_OF[plan.kind] for plan in plans)]
        for link, missing, pooling in (
            ("uplink", "a middle", self.token_pooling.uplink),
            ("downlink", "a tail", self.token_pooling.downlink),
        ):
            if pooling is not None and link not in links:
                raise ConfigurationError(
                    f"token_pooling.{link} needs the {link}, which a plan without {missing} does not have: leave it"
                    " out, or cut the model in three"
                )
        for stage in self.link_stages()["uplink"]:
            if stage.undone_at_tail and "uplink" in links and "downlink" not in links:
                raise ConfigurationError(
                    f"expected a tail in every plan with {stage.describe()}; got a plan without one, where nobody"
                    " undoes it: give all plans a tail, or set undo to edge"
                )
        for check in hooks(trainer, "check_links"):
            check(links)
        if "uplink" not in links and any(self.link_stages().values()):
            raise ConfigurationError(
                "a client that computes the whole model has no links: leave out the callbacks that encode them, or"
                " give model.plan and all of model.client_plans a middle"
            )
        learning = any(stage.trains for stages in self.link_stages().values() for stage in stages)
        if learning and (asks(trainer, "on_plan_clients") or self.client_plans):
            raise ConfigurationError(
                "a link that learns is averaged over clients that are cut alike: leave out client_plans and"
                " ResourceAwareSplitting, or set learn to false in LinkProjection"
            )

    def fits_links(self) -> bool:
        """Whether some link must see states of public texts before its next use."""
        stages = [stage for stages in self.link_stages().values() for stage in stages if stage.fits]
        if any(not stage.trains for stage in stages) or not hasattr(self, "adapters"):
            return bool(stages)
        return any(name.startswith(PREFIX) and bool(value.isnan().any()) for name, value in self.adapters.items())

    def known_codecs(self, plan: SplitPlan, client: str) -> dict[Link, Codec]:
        """Codecs with all that was published for them, both sides: for looking at what crosses."""
        codecs = self.codecs(plan, client)
        for codec in codecs.values():
            codec.load({**self._published, **self.global_adapters()})
        return codecs

    def start_links(self, fitted: Mapping[str, Tensor]) -> None:
        """What trains at the ends of links starts at these values, unless it has started."""
        self._published = dict(fitted)
        with torch.no_grad():
            for name, value in self.adapters.items():
                if name.startswith(PREFIX) and value.isnan().any():
                    value.copy_(fitted[name])

    def learned_links(self) -> dict[Link, list[str]]:
        """What trains at the ends of each link, for a person to read."""
        found = {
            link: [stage.describe() for stage in stages if stage.trains] for link, stages in self.link_stages().items()
        }
        return {link: described for link, described in found.items() if described}

    def turned_links(self) -> list[str]:
        """What is undone at the tail only, so that the model learns on it, for a person to read."""
        return [stage.describe() for stage in self.link_stages()["uplink"] if stage.undone_at_tail]

    def secrets_learnt_on(self) -> list[str | None]:
        """What tells whether the model goes on with the secrets that it has learnt on; None where one is not known."""
        return [hook() for hook in hooks(self.trainer, "secret_learnt_on")]

    def check_secrets(self, learnt_on: Sequence[str | None]) -> None:
        """Refuse to go on with other secrets than those of a checkpoint.

        Args:
            learnt_on: of the checkpoint, what `secrets_learnt_on` said.

        Raises:
            ConfigurationError: one is known and another one.
        """
        for saved, own in zip(learnt_on, self.secrets_learnt_on(), strict=False):
            if saved is not None and own is not None and saved != own:
                raise ConfigurationError(
                    "expected the secret that the checkpoint was made with, on which its adapters have learnt; got"
                    " another one for SSOP: give the same secret_file, or without one the same seed"
                )
