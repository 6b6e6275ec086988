"""What stands in each process' own configuration and must be the same in all.

It is compared before any client is placed: halves that differ would train on numbers that mean something else.
"""

from collections.abc import Mapping
from dataclasses import astuple
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from elsa_pl.errors import ConfigurationError
from elsa_pl.hooks import hooks
from elsa_pl.rpc.world import World

if TYPE_CHECKING:
    from elsa_pl.tiers import SplitModel


def agree_on_adapters(world: World, mine: Mapping[str, Any]) -> None:
    """Refuse processes that differ in what adapters are, and in how they are sent and merged. Every process calls.

    Args:
        world: the processes.
        mine: settings of this process, by name.

    Raises:
        ConfigurationError: with the setting that differs, and in whose configuration.
    """
    for worker, theirs in world.exchange(dict(mine)).items():
        for setting, own in mine.items():
            if theirs[setting] != own:
                raise ConfigurationError(
                    f"{setting} differs: {own!r} at {world.worker}, {theirs[setting]!r} at {worker}: give both the same"
                )


def agree_on_links(world: World, module: "SplitModel") -> None:
    """Refuse links whose two ends would make different halves of them. Every process calls.

    Args:
        world: the processes.
        module: of this process.

    Raises:
        ConfigurationError: with the first stage that differs, and in whose configuration; or with whose secret or
            token pooling.
    """
    checks = [hook() for hook in hooks(module.trainer, "secret_check")]
    for worker, others in world.exchange(checks).items():
        for own, other in zip(checks, others, strict=False):
            if own is not None and other is not None and own != other:
                raise ConfigurationError(
                    f"{world.worker} and {worker} have different secrets for SSOP or LinkEncryption: give both the same"
                    " secret_file"
                )
    pooling = astuple(module.token_pooling)
    for worker, other in world.exchange(pooling).items():
        if other != pooling:
            raise ConfigurationError(
                f"model.token_pooling differs: uplink and downlink are {pooling} at {world.worker}, {other} at"
                f" {worker}: give both the same"
            )
    mine = {link: [stage.describe() for stage in stages] for link, stages in module.link_stages().items()}
    for worker, theirs in world.exchange(mine).items():
        for link in mine:
            for number, (own, other) in enumerate(zip_longest(mine[link], theirs[link], fillvalue="nothing")):
                if own != other:
                    raise ConfigurationError(
                        f"stage {number} of the {link} differs: {own} at {world.worker}, {other} at {worker}: give both"
                        " the same link callbacks in the same order"
                    )
