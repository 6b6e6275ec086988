"""Attackers who see all states of a text, and what is guessed without any: on texts of planted topics."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.priors import likeliest, token_prior
from elsa_pl.functional.text_attacks import Texts, nearest_texts_attack, text_classifier_attack

NUM_TOPICS, LENGTH, WIDTH = 8, 5, 24
ZERO = torch.tensor([0])
Attack = Callable[["Drawn", "Drawn"], Tensor]


class Drawn(NamedTuple):
    texts: Texts
    tokens: Tensor


def write(num_texts: int, seed: int, told: float = 1.0) -> Drawn:
    """Each topic has a word of its own at each position, which nine of ten texts keep to; states tell the topic."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(NUM_TOPICS, (num_texts,), generator=generator)
    words = 100 + topics[:, None] * LENGTH + torch.arange(LENGTH)
    strays = torch.randint(100, 100 + NUM_TOPICS * LENGTH, words.shape, generator=generator)
    words = torch.where(torch.rand(words.shape, generator=generator) < 0.1, strays, words)
    points = torch.randn(NUM_TOPICS, WIDTH, generator=torch.Generator().manual_seed(9))
    states = told * points[topics] + 0.3 * torch.randn(num_texts, WIDTH, generator=generator)
    texts, positions = torch.arange(num_texts).repeat_interleave(LENGTH), torch.arange(LENGTH).repeat(num_texts)
    return Drawn(Texts(states, texts, positions), words.flatten())


def classify(seen: Drawn, public: Drawn) -> Tensor:
    return text_classifier_attack(seen.texts, public.texts, public.tokens)


def look_up(seen: Drawn, public: Drawn) -> Tensor:
    at, theirs = seen.texts.positions, public.texts.positions
    prior = token_prior(at, torch.zeros_like(at), (theirs, torch.zeros_like(theirs)), public.tokens)
    return nearest_texts_attack(seen.texts, public.texts, public.tokens, prior)


ATTACKS = pytest.mark.parametrize("attack", [classify, look_up])


def recovered(guesses: Tensor, drawn: Drawn) -> float:
    return float((guesses == drawn.tokens).float().mean())


@ATTACKS
def test_planted_tokens_are_recovered(attack: Attack) -> None:
    """From one state for five tokens: nearly all that keep to the topic."""
    seen = write(40, 2)
    assert recovered(attack(seen, write(400, 1)), seen) > 0.85


@ATTACKS
def test_states_that_carry_nothing_give_chance(attack: Attack) -> None:
    """The likeliest word of a position is that of one topic in eight."""
    seen = write(200, 2, told=0.0)
    assert 0.05 < recovered(attack(seen, write(400, 1, told=0.0)), seen) < 0.25


@ATTACKS
def test_the_global_generator_is_not_touched_and_answers_repeat(attack: Attack) -> None:
    seen, public = write(20, 2), write(60, 1)
    before = torch.get_rng_state()
    first = attack(seen, public)
    torch.rand(1)
    with torch.inference_mode():
        assert torch.equal(attack(seen, public), first)
    torch.set_rng_state(before)


def test_several_guesses_begin_with_the_only_one() -> None:
    seen, public = write(20, 2), write(200, 1)
    several = text_classifier_attack(seen.texts, public.texts, public.tokens, num_guesses=4)
    assert torch.equal(several[:, 0], classify(seen, public))
    assert all(len(row.unique()) == 4 for row in several)


def test_all_states_of_a_text_count() -> None:
    """Whoever has but some of the numbers cannot do so well."""
    seen, public = write(100, 2), write(400, 1)

    half = [Drawn(Texts(d.texts.states[:, :2], d.texts.texts, d.texts.positions), d.tokens) for d in (seen, public)]
    assert recovered(classify(*half), seen) < recovered(classify(seen, public), seen) - 0.1


# ---- what is guessed without states ----------------------------------------------------------------------------------


def test_a_length_that_shows_tells_more_than_the_position() -> None:
    """All texts end with one word, wherever that is, and their second word depends on the length."""
    lengths = torch.tensor([3, 4, 5]).repeat(10)
    rows = [(p, n, 1 if p == n - 1 else 10 * n if p == 1 else 5) for n in lengths.tolist() for p in range(n)]
    positions, shown, tokens = torch.tensor(rows).T
    hidden = torch.full_like(shown, 9)
    with_lengths = likeliest(token_prior(positions, shown, (positions, shown), tokens))
    without = likeliest(token_prior(positions, hidden, (positions, hidden), tokens))
    assert (with_lengths == tokens).all()
    assert (without == tokens).float().mean() < 0.8


def test_an_unseen_length_falls_back_on_position_and_end() -> None:
    positions, lengths = torch.tensor([0, 1, 2, 0, 1, 2, 3]), torch.tensor([3, 3, 3, 4, 4, 4, 4])
    tokens = torch.tensor([7, 8, 9, 7, 8, 8, 9])
    at = torch.arange(6)
    guessed = likeliest(token_prior(at, torch.full_like(at, 6), (positions, lengths), tokens))
    assert guessed[[0, 1, 5]].tolist() == [7, 8, 9]


def test_a_prior_sums_to_one() -> None:
    drawn = write(30, 1)
    at = drawn.texts.positions
    prior = token_prior(at, at, (at, at), drawn.tokens)
    assert torch.allclose(prior.log_shares.exp().sum(1), torch.ones(len(prior.log_shares)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Texts(torch.ones(1, 2), torch.tensor([0, 1]), torch.tensor([0, 0])), "numbers of texts below 1"),
        (lambda: Texts(torch.ones(1, 2), torch.tensor([0.0]), torch.tensor([0])), "texts as whole numbers"),
        (lambda: classify(write(2, 1), write(1, 1)), "two or more public texts"),
        (
            lambda: text_classifier_attack(write(2, 1).texts, write(2, 1).texts, write(2, 1).tokens, max_epochs=0),
            "max_epochs",
        ),
        (lambda: token_prior(ZERO, ZERO, (ZERO, ZERO), torch.tensor([1, 2])), "whole num"),
        (
            lambda: nearest_texts_attack(
                write(2, 1).texts,
                write(3, 1).texts,
                write(3, 1).tokens,
                token_prior(ZERO, ZERO, (ZERO, ZERO), torch.tensor([1])),
            ),
            "a prior of 10 tokens",
        ),
    ],
)
def test_what_does_not_fit(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
