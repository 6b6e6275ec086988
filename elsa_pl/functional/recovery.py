"""How much of a private text an attacker has read, between the two figures that say what it means.

A share of recovered tokens says little alone. A third may be nothing but the commonest word guessed every time, the
*floor*; and nobody who looks tokens up in public text finds one that does not occur there, which is the *cap*. Of
several attackers the best one counts: a defence against the others is none.

Special tokens, such as [CLS] or padding, are no secret: they are left out of the truth.

Shapes: N tokens of the private text, M tokens of the public one.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def token_recovery(guesses: Tensor, truth: Tensor, special: Collection[int] = ()) -> float:
    """Share of the private tokens that are guessed right.

    Args:
        guesses: token ids, or classes. [N]
        truth: what they should be. [N]
        special: ids that do not count where they are the truth; such as a tokenizer's ``all_special_ids``.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: tensors that are no whole numbers or of unlike lengths, or a truth of special tokens only.

    Example:
        >>> token_recovery(torch.tensor([101, 7, 9, 9]), torch.tensor([101, 7, 8, 9]), special=[101])
        0.6666666666666666
    """
    _require_ids(guesses, "guesses")
    _require_ids(truth, "truth")
    if len(guesses) != len(truth):
        raise ValueError(
            f"expected a guess for each of {len(truth)} tokens; got {len(guesses)}: give the attacker the same rows"
        )
    counted = _counted(truth, special)
    return _share((guesses.to(truth.device) == truth)[counted])


def majority_floor(truth: Tensor, special: Collection[int] = (), public_tokens: Tensor | None = None) -> float:
    """Recovery of whoever sees nothing and always guesses the commonest token.

    Args:
        truth: private token ids, or classes. [N]
        special: as in `token_recovery`, and never the guess.
        public_tokens: where the attacker has looked up which is the commonest. None takes the private text itself: the
            most that any single guess can have. [M]

    Returns:
        From 0 to 1.

    Raises:
        ValueError: tensors that are no whole numbers, or hold special tokens only.

    Example:
        >>> majority_floor(torch.tensor([7, 7, 8, 101, 101, 101]), special=[101])
        0.6666666666666666
        >>> majority_floor(torch.tensor([7, 7, 8, 101, 101, 101]), special=[101], public_tokens=torch.tensor([8, 8, 7]))
        0.3333333333333333
    """
    _require_ids(truth, "truth")
    counted = truth[_counted(truth, special)]
    known = counted
    if public_tokens is not None:
        _require_ids(public_tokens, "public_tokens")
        known = public_tokens[_counted(public_tokens, special, "public text")].to(truth.device)
    tokens, counts = known.unique(return_counts=True)
    return _share(counted == tokens[counts.argmax()])


def cap(truth: Tensor, public_tokens: Tensor, special: Collection[int] = ()) -> float:
    """Share of the private tokens that occur in the public text: nobody who looks tokens up there finds more.

    Args:
        truth: private token ids. [N]
        public_tokens: ids of the public text. [M]
        special: as in `token_recovery`.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: tensors that are no whole numbers, no public text, or a truth of special tokens only.

    Example:
        >>> cap(torch.tensor([7, 8, 9, 9]), torch.tensor([9, 5]))
        0.5
    """
    _require_ids(truth, "truth")
    _require_ids(public_tokens, "public_tokens")
    counted = _counted(truth, special)
    return _share(torch.isin(truth, public_tokens.to(truth.device))[counted])


def best_of_all(
    guesses: Mapping[str, Tensor], truth: Tensor, special: Collection[int] = ()
) -> tuple[str, dict[str, float]]:
    """The attacker that recovers most, and the recovery of each.

    Choosing by the truth favours the attacker a little: with many attackers who all guess at random, the best of them
    lies above the floor.

    Args:
        guesses: of each attacker, by name. [N] each
        truth: private token ids. [N]
        special: as in `token_recovery`.

    Returns:
        The best one's name, the first of equals, and the recoveries, best first.

    Raises:
        ValueError: no attacker, or as `token_recovery`, naming the attacker.

    Example:
        >>> truth = torch.tensor([7, 8])
        >>> best_of_all({"naive": torch.tensor([7, 7]), "inverter": torch.tensor([7, 8])}, truth)
        ('inverter', {'inverter': 1.0, 'naive': 0.5})
    """
    if not guesses:
        raise ValueError("expected the guesses of at least one attacker; got none")
    found = {}
    for name, guessed in guesses.items():
        try:
            found[name] = token_recovery(guessed, truth, special)
        except ValueError as error:
            raise ValueError(f"attacker {name!r}: {error}") from error
    table = dict(sorted(found.items(), key=lambda pair: -pair[1]))
    return next(iter(table)), table


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)


def _counted(tokens: Tensor, special: Collection[int], what: str = "truth") -> Tensor:
    """Which tokens are not special [N]; at least one."""
    left_out = torch.tensor(sorted(special), dtype=torch.long, device=tokens.device)
    counted = ~torch.isin(tokens, left_out)
    if not counted.any():
        raise ValueError(
            f"expected a {what} with tokens besides the special ones; got {len(tokens)} that are all special: give "
            "other texts"
        )
    return counted


def _require_ids(tokens: Tensor, what: str) -> None:
    if tokens.ndim != 1 or not len(tokens) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            f"expected {what} as whole numbers, one for each token and at least one; got {tokens.dtype} "
            f"{list(tokens.shape)}: flatten batch and tokens, leaving out the padding"
        )
