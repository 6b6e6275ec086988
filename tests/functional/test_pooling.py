"""Pooling of tokens against loops, and its gradients."""

import pytest
import torch

from elsa_pl.functional.pooling import Pooling, TokenPooling, places, pool_batch, pool_states

POOLINGS: list[Pooling] = ["first", 1, 2, 3, 50]


def batch(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States of three texts, and their mask: one text is whole, one has a single token."""
    states = torch.randn(3, num_tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([num_tokens, 1, max(1, num_tokens // 2)])
    return states, (torch.arange(num_tokens) < lengths[:, None]).long()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8])
def test_means_of_groups(pooling: Pooling, num_tokens: int) -> None:
    states, mask = batch(num_tokens)
    pooled = pool_states(states, mask, pooling)
    behind = pool_batch({"attention_mask": mask, "input_ids": mask.cumsum(1)}, pooling)
    assert pooled.shape[:2] == behind["attention_mask"].shape == behind["input_ids"].shape
    for text in range(3):
        torch.testing.assert_close(pooled[text, 0], states[text, 0])
        size = num_tokens if pooling == "first" else pooling
        for group in range(1, pooled.shape[1]):
            members = [
                states[text, token]
                for token in range(1 + (group - 1) * size, min(1 + group * size, num_tokens))
                if mask[text, token]
            ]
            assert behind["attention_mask"][text, group] == bool(members)
            expected = torch.stack(members).mean(0) if members else torch.zeros(4, dtype=torch.float64)
            torch.testing.assert_close(pooled[text, group], expected)


@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_places_name_each_token_once(pooling: Pooling | None) -> None:
    groups, within = places(9, pooling)
    assert len({*zip(groups.tolist(), within.tolist(), strict=True)}) == 9
    assert groups[0] == within[0] == 0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_are_exact(pooling: Pooling) -> None:
    states, mask = batch(5)
    assert torch.autograd.gradcheck(lambda x: pool_states(x, mask, pooling), states.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_taken_in_full_precision(dtype: torch.dtype) -> None:
    states, mask = batch(8)
    states = states.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool_states(states, mask, 3)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, pool_states(states.double(), mask, 3).to(dtype))


def test_groups_of_one_change_nothing_but_padding() -> None:
    states, mask = batch(6)
    torch.testing.assert_close(pool_states(states, mask, 1)[mask.bool()], states[mask.bool()])
    assert pool_states(states, mask, None) is states


@pytest.mark.parametrize("wrong", [0, -1, "last"])
@pytest.mark.parametrize("link", ["uplink", "downlink"])
def test_what_is_no_pooling(wrong: Pooling, link: str) -> None:
    with pytest.raises(ValueError, match=f"token_pooling.{link} to be 'first', a number of tokens >= 1, or null"):
        TokenPooling(**{link: wrong})


def test_it_is_true_where_something_is_pooled() -> None:
    assert [bool(TokenPooling(*kinds)) for kinds in ((), ("first",), (None, 3))] == [False, True, True]
