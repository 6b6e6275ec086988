"""Factors against the dense products that they stand for."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from elsa_pl.functional.aggregation import exact, weighted_mean
from elsa_pl.functional.factors import factor_pairs, refactored, to_rank, with_fresh_directions

A, B = "block.0.query.lora_A.default.weight", "block.0.query.lora_B.default.weight"
SHAPES = [(6, 9), (9, 6), (20, 20), (3, 40)]
"""O and I of a layer."""


def draw(outputs: int, inputs: int, rank: int, seed: int) -> dict[str, Tensor]:
    """A sender's adapters: a layer and a head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (rank, inputs), "head.weight": (3, 2), B: (outputs, rank)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def product(adapters: dict[str, Tensor]) -> Tensor:
    return adapters[B].double() @ adapters[A].double()


def dense_mean(senders: list[dict[str, Tensor]], weights: list[float]) -> Tensor:
    dense = [weight * product(sent) for sent, weight in zip(senders, weights, strict=True)]
    return torch.stack(dense).sum(0) / sum(weights)


def best_of_rank(dense: Tensor, rank: int) -> Tensor:
    """Eckart and Young, with numpy, on the dense matrix."""
    u, values, vt = np.linalg.svd(dense.numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * values[:rank]) @ vt[:rank])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [[4], [2, 2, 2], [1, 4, 2, 3], [8] * 5])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_exact_is_the_best_of_its_rank(shape: tuple[int, int], ranks: list[int], rank: int) -> None:
    senders = [draw(*shape, count, seed) for seed, count in enumerate(ranks)]
    weights = [1.0 + 2 * index for index in range(len(ranks))]
    merged = exact(senders, weights, rank=rank)
    assert list(merged) == list(senders[0])
    assert merged[A].shape == (rank, shape[1])
    assert merged[B].shape == (shape[0], rank)
    assert all(value.dtype == torch.float32 for value in merged.values())
    expected = best_of_rank(dense_mean(senders, weights), rank)
    torch.testing.assert_close(product(merged), expected, rtol=0, atol=1e-5)
    heads = [{"head.weight": sent["head.weight"]} for sent in senders]
    assert torch.equal(merged["head.weight"], weighted_mean(heads, weights)["head.weight"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [[4], [2, 2, 2], [8] * 5])
def test_without_a_rank_nothing_is_lost(shape: tuple[int, int], ranks: list[int]) -> None:
    senders = [draw(*shape, count, seed) for seed, count in enumerate(ranks)]
    weights = [1.0] * len(ranks)
    merged = exact(senders, weights)
    assert len(merged[A]) == min(sum(ranks), *shape)
    torch.testing.assert_close(product(merged), dense_mean(senders, weights), rtol=0, atol=1e-5)


def test_exact_of_one_sender_is_its_product() -> None:
    sent = draw(12, 7, 4, seed=0)
    for rank in (4, 7, None):
        torch.testing.assert_close(product(exact([sent], [3.0], rank=rank)), product(sent), rtol=0, atol=1e-5)


def test_the_mean_of_factors_is_another() -> None:
    """Without this, averaging factors would have done."""
    senders, weights = [draw(12, 7, 2, seed) for seed in (0, 1)], [1.0, 1.0]
    expected = dense_mean(senders, weights)
    assert (product(weighted_mean(senders, weights)) - expected).norm() > 0.3 * expected.norm()
    assert (product(exact(senders, weights, rank=4)) - expected).norm() < 1e-6 * expected.norm()


def test_nothing_is_lost_in_a_common_subspace() -> None:
    """Senders that have one A average as B alone does."""
    senders = [draw(12, 7, 3, seed) for seed in range(5)]
    senders = [{**sent, A: senders[0][A]} for sent in senders]
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    merged = exact(senders, weights, rank=3)
    torch.testing.assert_close(product(merged), product(weighted_mean(senders, weights)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_of_means_is_the_flat_one(shape: tuple[int, int]) -> None:
    """Factors too: signs do not depend on the way."""
    senders = [draw(*shape, 2, seed) for seed in range(7)]
    weights = [3.0, 1.0, 10.0, 2.0, 2.0, 8.0, 5.0]
    edges = [slice(0, 3), slice(3, 4), slice(4, 7)]
    means = [exact(senders[edge], weights[edge]) for edge in edges]
    nested = exact(means, [sum(weights[edge]) for edge in edges], rank=3)
    flat = exact(senders, weights, rank=3)
    for name, value in nested.items():
        torch.testing.assert_close(value, flat[name], rtol=0, atol=1e-5)
    truncated = [exact(senders[edge], weights[edge], rank=3) for edge in edges]
    lossy = exact(truncated, [sum(weights[edge]) for edge in edges], rank=3)
    if min(shape) > 3:
        assert (product(lossy) - product(flat)).norm() > 1e-3 * product(flat).norm(), "the edges' ranks matter"


def test_scale_of_the_factors_does_not_matter() -> None:
    senders = [draw(12, 7, 2, seed) for seed in range(3)]
    turned = [{**sent, A: 10 * sent[A].flip(0), B: sent[B].flip(1) / 10} for sent in senders]
    for (name, value), other in zip(
        exact(senders, [1.0] * 3, rank=4).items(), exact(turned, [1.0] * 3, rank=4).values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5, msg=name)


def test_weight_0_and_embeddings() -> None:
    names = {A: "embed.lora_embedding_A.default", B: "embed.lora_embedding_B.default"}
    senders = [{names.get(k, k): v for k, v in draw(5, 30, 2, seed).items()} for seed in range(3)]
    broken = {name: torch.full_like(value, float("nan")) for name, value in senders[0].items()}
    merged = exact([*senders, broken], [1.0, 1.0, 1.0, 0.0], rank=6)
    back = {other: name for name, other in names.items()}
    restored = [{back.get(k, k): v for k, v in sent.items()} for sent in (merged, *senders)]
    torch.testing.assert_close(product(restored[0]), dense_mean(restored[1:], [1.0] * 3), rtol=0, atol=1e-5)


def test_directions_without_weight_can_be_trained() -> None:
    """A and B both 0 would have no gradient for ever."""
    sent = draw(12, 7, 4, seed=0)
    sent[B][:, 1:] = 0
    merged = exact([sent], [1.0], rank=4)
    torch.testing.assert_close(product(merged), product(sent), rtol=0, atol=1e-6)
    assert (merged[B] != 0).any(0).tolist() == [True, False, False, False]
    assert (merged[A].abs().amax(1) > 0.05).all()
    assert merged[A][1:].abs().max() <= 7**-0.5
    again = exact([draw(12, 7, 1, seed=1), {**sent, B: sent[B] * 0}], [1.0, 1.0], rank=4)
    assert torch.equal(again[A][1:], merged[A][1:]), "they depend on nothing but the name"
    nothing = exact([{**sent, B: sent[B] * 0}], [1.0], rank=4)
    assert nothing[B].abs().max() == 0
    assert (nothing[A].abs().amax(1) > 0.05).all()


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_rows_come_in_order_and_signs_are_fixed(rank: int) -> None:
    sent = draw(12, 7, 5, seed=3)
    a, b = refactored(sent[A], sent[B], rank)
    assert len(a) == b.shape[1] == min(rank, 5)
    norms = a.norm(dim=1)
    torch.testing.assert_close(norms, b.norm(dim=0), msg="both factors have the same share")
    assert all(first >= second for first, second in itertools.pairwise(norms.tolist()))
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()
    for name, value in zip((A, B), refactored(-sent[A], -sent[B], rank), strict=True):
        torch.testing.assert_close(value, a if name == A else b)


def test_the_first_directions_are_the_best_ones() -> None:
    sent = draw(12, 7, 5, seed=3)
    ordered = exact([sent], [1.0], rank=5)
    for rank in range(1, 6):
        torch.testing.assert_close(
            product(to_rank(ordered, rank)), best_of_rank(product(sent), rank), rtol=0, atol=1e-5
        )


def test_more_directions_add_nothing() -> None:
    sent = draw(12, 7, 3, seed=3)
    wider = to_rank(sent, 6)
    assert wider[A].shape == (6, 7)
    assert torch.equal(product(wider), product(sent))
    assert wider["head.weight"] is sent["head.weight"]
    assert to_rank(sent, 3)[A] is sent[A]
    assert all(torch.equal(value, sent[name]) for name, value in to_rank(wider, 3).items())


def test_fresh_directions_of_nothing() -> None:
    a, b = with_fresh_directions(torch.zeros(0, 7), torch.zeros(12, 0), 2, A)
    assert a.shape == (2, 7)
    assert torch.equal(b, torch.zeros(12, 2))


def test_pairs() -> None:
    assert factor_pairs([B, "head.weight", A]) == [(A, B)]
    assert factor_pairs(["x.lora_embedding_B.default", "x.lora_embedding_A.default"]) == [
        ("x.lora_embedding_A.default", "x.lora_embedding_B.default")
    ]
    assert factor_pairs(["my_lora_A.weight"]) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({A: torch.ones(2, 8)}, r"got \[\(2, 8\), \(5, 2\)\].*first sender has \[\(2, 7\)"),
        ({A: torch.ones(3, 7)}, r"got \[\(3, 7\), \(5, 2\)\]"),
        ({A: torch.ones(2, 7, 1)}, "another aggregator"),
        ({B: torch.full((5, 2), float("nan"))}, r"senders \[1\]"),
    ],
)
def test_refused(changed: dict[str, Tensor], message: str) -> None:
    senders = [draw(5, 7, 2, seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=message):
        exact([senders[0], {**senders[1], **changed}], [1.0, 1.0], rank=2)


def test_half_a_layer_is_refused() -> None:
    sent = draw(5, 7, 2, 0)
    for missing in (A, B):
        alone = {name: value for name, value in sent.items() if name != missing}
        with pytest.raises(ValueError, match="both factors"):
            exact([alone], [1.0])


@pytest.mark.parametrize("rank", [0, -1])
def test_no_rank_is_refused(rank: int) -> None:
    sent = draw(5, 7, 2, 0)
    with pytest.raises(ValueError, match=f"rank >= 1; got {rank}"):
        exact([sent], [1.0], rank=rank)
    with pytest.raises(ValueError, match=f"rank >= 1; got {rank}"):
        to_rank(sent, rank)
