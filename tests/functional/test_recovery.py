"""Scores of attackers, counted by hand."""

import pytest
import torch

from elsa_pl.functional.recovery import best_of_all, cap, majority_floor, token_recovery

TRUTH = torch.tensor([101, 5, 5, 6, 7, 102])
SPECIAL = [101, 102, 0]


def test_special_tokens_do_not_count() -> None:
    guesses = torch.tensor([101, 5, 6, 6, 6, 102])
    assert token_recovery(guesses, TRUTH) == 4 / 6
    assert token_recovery(guesses, TRUTH, SPECIAL) == 2 / 4
    assert token_recovery(torch.full_like(TRUTH, 101), TRUTH, SPECIAL) == 0


def test_floor_is_one_guess_for_all() -> None:
    assert majority_floor(TRUTH, SPECIAL) == 2 / 4
    assert majority_floor(TRUTH, SPECIAL, torch.tensor([101, 101, 101, 7, 7, 5])) == 1 / 4, "special tokens: no guess"
    assert majority_floor(TRUTH, SPECIAL, torch.tensor([9])) == 0
    guesses = [token_recovery(torch.full_like(TRUTH, token), TRUTH, SPECIAL) for token in range(200)]
    assert max(guesses) == majority_floor(TRUTH, SPECIAL)


def test_cap_is_what_public_text_holds() -> None:
    assert cap(TRUTH, torch.tensor([5, 101, 102, 8]), SPECIAL) == 2 / 4
    assert cap(TRUTH, TRUTH, SPECIAL) == 1
    assert cap(TRUTH, torch.tensor([8])) == 0


def test_the_best_comes_first() -> None:
    guesses = {"none": torch.zeros_like(TRUTH), "all": TRUTH, "five": torch.full_like(TRUTH, 5), "too": TRUTH.clone()}
    best, table = best_of_all(guesses, TRUTH, SPECIAL)
    assert best == "all"
    assert list(table.items()) == [("all", 1.0), ("too", 1.0), ("five", 0.5), ("none", 0.0)]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="a guess for each of 6 tokens; got 5: give the attacker the same rows"):
        token_recovery(TRUTH[1:], TRUTH)
    for given in (TRUTH.float(), TRUTH[:0], TRUTH.view(2, 3)):
        with pytest.raises(ValueError, match="truth as whole numbers, one for each token and at least one; got"):
            cap(given, TRUTH)
        with pytest.raises(ValueError, match="public_tokens as whole numbers"):
            cap(TRUTH, given)
        with pytest.raises(ValueError, match="public_tokens as whole numbers"):
            majority_floor(TRUTH, SPECIAL, given)
    with pytest.raises(ValueError, match="a truth with tokens besides the special ones; got 2 that are all special"):
        token_recovery(TRUTH[[0, 5]], TRUTH[[0, 5]], SPECIAL)
    with pytest.raises(ValueError, match="a public text with tokens besides the special ones"):
        majority_floor(TRUTH, SPECIAL, torch.tensor([101]))
    with pytest.raises(ValueError, match="at least one attacker; got none"):
        best_of_all({}, TRUTH)
    with pytest.raises(ValueError, match="attacker 'short': expected a guess for each of 6"):
        best_of_all({"short": TRUTH[1:]}, TRUTH)
