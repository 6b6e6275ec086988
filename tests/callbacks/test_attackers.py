"""What attackers are given of a batch, and which attackers there are."""

import pytest
import torch
from torch import Tensor

from elsa_pl.callbacks.attackers import Known, Tokens, candidates, guess_tokens, whole_texts
from elsa_pl.callbacks.exposure import Exposure, _chosen
from elsa_pl.functional.pooling import Pooling, pool_states
from elsa_pl.links import NOBODY, Codec
from elsa_pl.links.hiding import NoiseStage
from elsa_pl.links.stages import ProjectionStage

CLS, SEP, WIDTH, VOCABULARY = 1, 2, 16, 40
SPECIAL = (0, CLS, SEP)
EMBEDDED = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
Batch = dict[str, Tensor]


def batch(count: int, seed: int, columns: int = 8) -> Batch:
    """Words between [CLS] and [SEP], two to six; the frequent ones are few."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1 / torch.arange(1, VOCABULARY - 2).float()
    words = 3 + torch.multinomial(chances.expand(count, -1), columns, replacement=True, generator=generator)
    last = torch.randint(3, columns, (count, 1), generator=generator)
    at = torch.arange(columns)
    ids = words.masked_fill(at == 0, CLS).masked_fill(at == last, SEP).masked_fill(at > last, 0)
    return {"input_ids": ids, "attention_mask": (at <= last).long()}


def part(made: Batch, pooling: Pooling | None = None, noise: float = 0.0) -> tuple[Tensor, Batch]:
    states = EMBEDDED[made["input_ids"]]
    states = states + noise * torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    return pool_states(states, made["attention_mask"], pooling), made


def test_positions_are_places_in_the_text_wherever_the_padding_is() -> None:
    ids = torch.tensor([[0, 0, 1, 7, 2], [1, 8, 9, 7, 2]])
    left = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    tokens = Tokens.of_batches([(torch.randn(2, 5, 3), left)], None)
    assert tokens.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert tokens.lengths.tolist() == [3, 3, 3, 5, 5, 5, 5, 5]


@pytest.mark.parametrize(("pooling", "shown"), [("first", [1, 1]), (4, [5, 9]), (64, [65, 65]), (1, [3, 6])])
def test_a_length_shows_as_far_as_the_pooled_mask_tells(pooling: Pooling, shown: list[int]) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    made = {"input_ids": mask, "attention_mask": mask}
    states = pool_states(torch.randn(2, 6, 3), mask, pooling)
    lengths = Tokens.of_batches([(states, made)], pooling).lengths
    assert lengths.unique_consecutive().tolist() == list(dict.fromkeys(shown))


def test_states_of_shorter_texts_are_filled_up() -> None:
    seen, public = whole_texts([torch.ones(2, 3, 4)], [torch.ones(1, 1, 4), torch.ones(1, 2, 4)])
    assert seen.shape == (2, 12)
    assert public.sum(1).tolist() == [4, 8]


@pytest.mark.parametrize("pooling", [None, 64, "first"])
def test_no_attacker_answers_with_a_special_token(pooling: Pooling | None) -> None:
    """They are never scored, so such an answer is wasted; of noise, the commonest tokens are special ones."""
    sent, read = part(batch(30, 2), pooling, noise=3.0), part(batch(80, 1), pooling, noise=3.0)
    seen, public = (Tokens.of_batches([given], pooling) for given in (sent, read))
    whole = None if pooling is None else whole_texts([sent[0]], [read[0]])
    known = seen.texts % 4 == 0
    guesses = guess_tokens(seen, Known(public, SPECIAL), known, seen.states, whole)
    assert ({"whole text", "nearest texts"} <= guesses.keys()) == (pooling is not None)
    assert not [name for name, guess in guesses.items() if torch.isin(guess, torch.tensor(SPECIAL)).any()]
    if whole is not None:
        tried = candidates(seen, Known(public, SPECIAL), guesses, whole, 3)
        assert not torch.isin(tried, torch.tensor(SPECIAL)).any()


def exposed(scale: float) -> Exposure:
    """What is seen of a link with noise."""
    stages = [NoiseStage(scale), ProjectionStage(1, learn=False)]
    fitted = Codec("uplink", "uplink", stages, WIDTH)
    fitted.fit(EMBEDDED[3:].repeat(4, 1))
    nobody = Codec("uplink", "uplink", stages, WIDTH, NOBODY)
    nobody.load(fitted.tensors())
    stages[0].seed = 7  # type: ignore[attr-defined]
    own = Codec("uplink", "uplink", stages, WIDTH, "client-0")
    own.load(fitted.tensors())
    exposure = Exposure(own, nobody, SPECIAL)
    exposure.know(*part(batch(1500, 1)))
    states, made = part(batch(150, 2))
    exposure.send(states, own.side("encoder")(states), made)
    return exposure


def test_attackers_learn_from_noise_of_their_own() -> None:
    """Better than from clean states, and what they are given is another draw than the one that was sent."""
    exposure = exposed(1.5)
    seen = Tokens.of_batches(exposure.seen["edge"], None)
    clean, noised = (Tokens.of_batches(parts, None) for parts in (exposure.public, exposure.noised))
    assert not torch.equal(clean.states, noised.states)
    known = seen.texts % 4 == 0
    scored = ~known & ~torch.isin(seen.ids, torch.tensor(SPECIAL))

    def shares(attacker: Known) -> dict[str, float]:
        guesses = guess_tokens(seen, attacker, known, seen.states)
        return {name: float((guess == seen.ids)[scored].float().mean()) for name, guess in guesses.items()}

    with_noise, without = shares(Known(clean, SPECIAL, noised)), shares(Known(clean, SPECIAL))
    assert with_noise["inverter, noised"] > with_noise["inverter"] + 0.02
    assert with_noise["nearest, in units of noise"] > with_noise["nearest"] - 0.02
    assert with_noise.keys() - without.keys() == {
        "inverter, noised",
        "inverter, hidden layer, noised",
        "nearest, in units of noise",
    }


def test_a_link_without_noise_is_learnt_from_as_it_is() -> None:
    exposure = Exposure(None, None, SPECIAL)
    exposure.know(*part(batch(4, 1)))
    assert not exposure.noised


@pytest.mark.parametrize(("sizes", "asked"), [([4] * 500, 100), ([16, 16, 7], 24), ([3, 2], 100), ([1] * 9, 4)])
def test_as_many_texts_are_taken_as_asked_for(sizes: list[int], asked: int) -> None:
    """However small the batches are, and evenly."""
    batches = [{"input_ids": torch.zeros(size, 2)} for size in sizes]
    chosen = _chosen(batches, asked)
    assert sum(map(len, chosen)) == min(asked, sum(sizes))
    before = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    taken = torch.cat([rows + start for rows, start in zip(chosen, before.tolist(), strict=True)])
    gaps = taken.diff()
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
