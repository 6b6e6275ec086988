"""The attacker who tries texts out: it finds a text that its encoding tells, and never ends farther away."""

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.search import search_attack

EMBEDDED = torch.randn(5, 20, 64, generator=torch.Generator().manual_seed(0)).double()


def encode(ids: Tensor) -> Tensor:
    """A sum of vectors, of each token at each place another one: all share one state."""
    return torch.stack([EMBEDDED[place, ids[:, place]] for place in range(ids.shape[1])]).sum(0)[:, None]


def test_it_finds_what_the_encoding_tells() -> None:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(20, (6, 4), generator=generator)
    everything = torch.arange(20).expand(6, 4, 20)
    guessed = search_attack(encode(texts), encode, everything, torch.ones(6, 4, dtype=torch.bool), num_sweeps=9)
    assert (guessed == texts).float().mean() == 1


def test_what_is_not_free_stays_and_nothing_gets_worse() -> None:
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(20, (8, 5), generator=generator)
    candidates = torch.randint(20, (8, 5, 3), generator=generator)
    free = torch.tensor([True, True, False, True, False]).expand(8, 5)
    guessed = search_attack(encode(texts), encode, candidates, free)
    assert torch.equal(guessed[~free], candidates[..., 0][~free])
    assert (guessed[..., None] == candidates).any(2).all()
    assert not torch.equal(guessed, candidates[..., 0])
    ended, begun = ((encode(ids) - encode(texts)).square().sum((1, 2)) for ids in (guessed, candidates[..., 0]))
    assert (ended <= begun).all()


@pytest.mark.parametrize(("tokens", "sweeps"), [(3, 1), (2, 0)])
def test_shapes_that_do_not_fit(tokens: int, sweeps: int) -> None:
    with pytest.raises(ValueError, match="expected candidates"):
        search_attack(torch.ones(1, 1), encode, torch.ones(1, 2, 3).long(), torch.ones(1, tokens).bool(), sweeps)


def test_a_prior_decides_between_texts_that_are_encoded_alike() -> None:
    """Of two ways to the same sum; and without weight it has no say."""
    candidates = torch.tensor([[[0, 3, 5], [0, 3, 5]]])
    log_prior = torch.tensor([[[0.0, -1.0, -9.0], [0.0, -9.0, -1.0]]])
    free = torch.ones(1, 2, dtype=torch.bool)

    def total(ids: Tensor) -> Tensor:
        return ids.sum(1, keepdim=True)

    def search(weight: float) -> list[int]:
        seen = torch.tensor([[8.0]])
        found = search_attack(seen, total, candidates, free, log_prior=log_prior, prior_weight=weight)
        return found[0].tolist()

    assert search(0.0) == [5, 3]
    assert search(0.05) == [3, 5]
    with pytest.raises(ValueError, match="expected log_prior"):
        search_attack(torch.ones(1, 1), total, candidates, free, log_prior=log_prior[:, :1])
