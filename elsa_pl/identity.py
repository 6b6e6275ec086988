"""Whether a checkpoint fits the settings: adapters mean something for one model, cut and label list only.

Without this check, adapters of another cut or of other labels either fail with a list of tensor names or, where the
shapes happen to agree, give numbers that mean nothing.
"""

from collections.abc import Mapping
from typing import Any

from elsa_pl.errors import ConfigurationError


def check_identity(found: Mapping[str, Any], expected: Mapping[str, Any], path: str) -> None:
    """Compare what a checkpoint's adapters belong to with the settings.

    Args:
        found: from the checkpoint, by setting: see ``SplitModel.identity``.
        expected: from the settings.
        path: the checkpoint, for the error.

    Raises:
        ConfigurationError: naming each setting that differs.

    Example:
        >>> check_identity({"model.lora.rank": 8}, {"model.lora.rank": 8}, "last.ckpt")
        >>> check_identity({"model.lora.rank": 8}, {"model.lora.rank": 4}, "last.ckpt")
        Traceback (most recent call last):
        elsa_pl.errors.ConfigurationError: last.ckpt does not fit the settings: model.lora.rank is 8 in the checkpoint
        and 4 in the settings; give the settings that it was made with (--run FOLDER takes them from its folder), or
        another checkpoint
    """
    different = [
        f"{name} is {found.get(name)!r} in the checkpoint and {value!r} in the settings"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if different:
        raise ConfigurationError(
            f"{path} does not fit the settings: {'; '.join(different)}; give the settings that it was made with"
            " (--run FOLDER takes them from its folder), or another checkpoint"
        )
