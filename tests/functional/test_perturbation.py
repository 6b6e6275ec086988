"""Rotations of the semantic subspace: what they keep, what they take, and how the complement travels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from elsa_pl.functional import sketch as sketches
from elsa_pl.functional.perturbation import (
    complement_moments,
    draw_rotation,
    perturb,
    receive,
    restore,
    rotated_moments,
    semantic_subspace,
)
from elsa_pl.functional.states import linear, moments

WIDTH = 12
RANKS = [1, 2, 7, 12]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(count: int = 100, seed: int = 0) -> Tensor:
    strengths = 1 / torch.arange(1, WIDTH + 1, dtype=torch.float64)
    return draw(count, WIDTH, seed=seed) * strengths @ draw(WIDTH, WIDTH, seed=100) + draw(WIDTH, seed=101)


def codec(subspace: Tensor, ratio: float = 2) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A sketch of the complement, with the decoder calibrated for it."""
    sketch = sketches.draw_sketch(WIDTH, ratio, seed=0, num_rows=2)
    decoder = sketches.calibrate(sketch.matrix, *complement_moments(*moments(correlated()), subspace))
    return partial(sketches.encode, sketch=sketch), partial(sketches.decode_calibrated, decoder=decoder)


def outside(states: Tensor, subspace: Tensor) -> Tensor:
    return states - states @ subspace @ subspace.T


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (0, 12)])
def test_against_the_slow_loop(rank: int, shape: tuple[int, ...]) -> None:
    subspace, rotation = semantic_subspace(correlated(), rank), draw_rotation(rank, "secret")
    matrix = torch.eye(WIDTH).double()
    for i in range(WIDTH):
        for j in range(WIDTH):
            for a in range(rank):
                matrix[i, j] -= subspace[i, a] * subspace[j, a]
                for b in range(rank):
                    matrix[i, j] += subspace[i, a] * rotation[a, b] * subspace[j, b]
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(WIDTH).double())
    states = draw(*shape)
    sent = perturb(states, subspace, rotation)
    assert sent.shape == shape
    for state, found in zip(states.view(-1, WIDTH), sent.view(-1, WIDTH), strict=True):
        expected = [sum(float(state[i] * matrix[i, j]) for i in range(WIDTH)) for j in range(WIDTH)]
        assert found.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rank", RANKS)
def test_the_subspace_holds_most_of_the_length(rank: int) -> None:
    states = correlated()
    subspace = semantic_subspace(states, rank)
    torch.testing.assert_close(subspace.T @ subspace, torch.eye(rank).double())
    strengths = torch.linalg.svdvals(states)
    torch.testing.assert_close((states @ subspace).square().sum(), strengths[:rank].square().sum())
    torch.testing.assert_close(semantic_subspace(states.flip(0), rank), subspace)


def test_a_subspace_of_as_many_directions_as_states() -> None:
    states = draw(4, WIDTH)
    torch.testing.assert_close(outside(states, semantic_subspace(states, 4)), torch.zeros(4, WIDTH).double())


@pytest.mark.parametrize("rank", [1, 2, 7, 64, 200])
def test_rotations_are_orthogonal(rank: int) -> None:
    rotation = draw_rotation(rank, 7)
    assert rotation.dtype == torch.float64
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(rank).double())
    narrow = draw_rotation(rank, 7, dtype=torch.float32)
    torch.testing.assert_close(narrow, rotation.float(), atol=1e-6, rtol=0)


def test_rotations_are_uniform() -> None:
    """Mean 0 and variance 1/r of each entry; without the signs the diagonal would lean to one side."""
    rotations = torch.stack([draw_rotation(3, "secret", step) for step in range(3000)])
    assert rotations.mean(0).abs().max() < 5 / (3 * 3000) ** 0.5
    assert (rotations.square().mean(0) - 1 / 3).abs().max() < 0.03
    assert rotations.diagonal(dim1=1, dim2=2).sum(1).square().mean().item() == pytest.approx(1, abs=0.1)
    assert torch.linalg.det(rotations).mean().abs() < 0.1, "mirrored as often as not"


def test_secret_and_step_decide() -> None:
    first = draw_rotation(5, "secret", step=3)
    assert torch.equal(first, draw_rotation(5, "secret", step=3))
    for other in (draw_rotation(5, "secret", step=4), draw_rotation(5, "other", step=3), draw_rotation(5, 3)):
        assert (first - other).abs().max() > 0.1
    state = torch.get_rng_state()
    draw_rotation(5, "secret")
    assert torch.equal(torch.get_rng_state(), state)


def test_large_secrets_count_in_full() -> None:
    """A torch.Generator on the CPU looks at the last 32 bits of its seed only."""
    assert not torch.equal(draw_rotation(4, 5), draw_rotation(4, 5 + 2**32))
    assert not torch.equal(draw_rotation(4, 5), draw_rotation(4, 5 + 2**100))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", [(12,), (2, 3, 12)])
def test_restored_states_are_the_states(rank: int, shape: tuple[int, ...]) -> None:
    subspace, rotation = semantic_subspace(correlated().float(), rank), draw_rotation(rank, "secret")
    states = draw(*shape, dtype=torch.float32)
    received = receive(perturb(states, subspace, rotation), subspace)
    torch.testing.assert_close(restore(received, subspace, rotation), states, atol=1e-5, rtol=0)
    wrong = restore(received, subspace, draw_rotation(rank, "other"))
    if rank > 1:  # in one dimension a rotation is 1 or -1, so that two secrets agree as often as not
        assert (received - states).abs().max() > 1e-2
        assert (wrong - states).norm() > 0.1 * states.norm()


def test_lengths_angles_and_the_complement_stay() -> None:
    subspace, rotation = semantic_subspace(correlated(), 5), draw_rotation(5, "secret")
    states = draw(6, WIDTH)
    sent = perturb(states, subspace, rotation)
    torch.testing.assert_close(sent @ sent.T, states @ states.T)
    torch.testing.assert_close(outside(sent, subspace), outside(states, subspace))
    assert (sent - states).norm() > 0.1


@pytest.mark.parametrize("rank", RANKS)
def test_dropping_sends_the_coordinates_only(rank: int) -> None:
    calibration = correlated()
    mean, covariance = moments(calibration)
    subspace, rotation = semantic_subspace(calibration, rank), draw_rotation(rank, "secret")
    sent = perturb(calibration, subspace, rotation, complement="drop")
    assert sent.shape == (100, rank)
    torch.testing.assert_close(sent, calibration @ subspace @ rotation)
    restored = restore(receive(sent, subspace, complement="drop", mean=mean), subspace, rotation)
    torch.testing.assert_close(restored @ subspace, calibration @ subspace)
    torch.testing.assert_close(outside(restored, subspace), outside(mean, subspace).expand_as(restored))
    lost = (restored - calibration).square().sum(1).mean()
    torch.testing.assert_close(lost, complement_moments(mean, covariance, subspace)[1].trace())
    bare = receive(sent, subspace, complement="drop")
    torch.testing.assert_close(bare, perturb(calibration, subspace, rotation) - outside(calibration, subspace))


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_sketching_the_complement(rank: int) -> None:
    """The coordinates come back exactly, the complement as the decoder has it: better than dropped."""
    calibration = correlated()
    subspace, rotation = semantic_subspace(calibration, rank), draw_rotation(rank, "secret")
    encode, decode = codec(subspace)
    sent = perturb(calibration, subspace, rotation, complement="sketch", encode=encode)
    assert sent.shape == (100, rank + 6)
    received = receive(sent, subspace, complement="sketch", decode=decode)
    restored = restore(received, subspace, rotation)
    torch.testing.assert_close(restored @ subspace, calibration @ subspace)
    torch.testing.assert_close(
        outside(restored, subspace),
        outside(decode(encode(outside(calibration, subspace))), subspace),
        atol=1e-6,
        rtol=0,
    )
    mean, _ = moments(calibration)
    sent = perturb(calibration, subspace, rotation, complement="drop")
    dropped = restore(receive(sent, subspace, complement="drop", mean=mean), subspace, rotation)
    assert (restored - calibration).norm() < (dropped - calibration).norm()


def test_an_exact_codec_of_the_complement_loses_nothing() -> None:
    subspace, rotation = semantic_subspace(correlated(), 5), draw_rotation(5, "secret")
    states = draw(2, 3, WIDTH)
    sent = perturb(states, subspace, rotation, complement="sketch", encode=torch.clone)
    assert sent.shape == (2, 3, 5 + WIDTH)
    received = receive(sent, subspace, complement="sketch", decode=torch.clone)
    torch.testing.assert_close(received, perturb(states, subspace, rotation))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_gradients_are_exact(rank: int) -> None:
    subspace, rotation = semantic_subspace(correlated(), rank), draw_rotation(rank, "secret")
    mean, _ = moments(correlated())
    encode, decode = codec(subspace)
    states = draw(2, WIDTH).requires_grad_()
    functions: list[Callable[[Tensor], Any]] = [
        lambda x: perturb(x, subspace, rotation),
        lambda x: perturb(x, subspace, rotation, complement="drop"),
        lambda x: perturb(x, subspace, rotation, complement="sketch", encode=encode),
        lambda x: receive(x[:, :rank], subspace, complement="drop", mean=mean),
        lambda x: receive(torch.cat([x, x], 1)[:, : rank + 6], subspace, complement="sketch", decode=decode),
        lambda x: restore(x, subspace, rotation),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (states,))


def test_the_gradient_is_turned_back_as_the_states_are() -> None:
    subspace, rotation = semantic_subspace(correlated(), 5), draw_rotation(5, "secret")
    states, gradient = draw(3, WIDTH).requires_grad_(), draw(3, WIDTH, seed=1)
    perturb(states, subspace, rotation).backward(gradient)
    assert states.grad is not None
    torch.testing.assert_close(states.grad, restore(gradient, subspace, rotation))


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_rotated_moments_are_those_over_many_rotations(rank: int) -> None:
    states = correlated()
    subspace = semantic_subspace(states, rank)
    mean, covariance = rotated_moments(*moments(states), subspace)
    seen = torch.cat([perturb(states, subspace, draw_rotation(rank, "secret", step)) for step in range(2000)])
    around = seen - mean
    scale = covariance.diagonal().max()
    torch.testing.assert_close(seen.mean(0), mean, atol=0.08 * scale.sqrt().item(), rtol=0)
    torch.testing.assert_close(around.T @ around / len(seen), covariance, atol=0.08 * scale.item(), rtol=0)


def test_complement_moments_are_those_of_the_complement() -> None:
    states = correlated()
    subspace = semantic_subspace(states, 4)
    found = complement_moments(*moments(states), subspace)
    for value, expected in zip(found, moments(outside(states, subspace)), strict=True):
        torch.testing.assert_close(value, expected)


def test_decoding_perturbed_states_needs_no_secret() -> None:
    """A sketch of rotated states, decoded with the rotated moments, then restored: better than nothing was sent."""
    calibration, states = correlated(), correlated(50, seed=1)
    subspace = semantic_subspace(calibration, 3)
    sketch = sketches.draw_sketch(WIDTH, 2, seed=0, num_rows=2)
    decoder = sketches.calibrate(sketch.matrix, *rotated_moments(*moments(calibration), subspace))
    for secret in range(5):
        rotation = draw_rotation(3, secret)
        sketched = sketches.encode(perturb(states, subspace, rotation), sketch)
        found = restore(sketches.decode_calibrated(sketched, decoder), subspace, rotation)
        assert (found - states).norm() < 0.9 * states.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    calibration = correlated().float()
    subspace, rotation = semantic_subspace(calibration, 5), draw_rotation(5, "secret")
    encode, decode = codec(subspace)
    states = draw(4, WIDTH).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    kept = receive(perturb(states, subspace, rotation), subspace)
    assert kept.dtype == restore(kept, subspace, rotation).dtype == dtype
    torch.testing.assert_close(restore(kept, subspace, rotation), states, atol=tolerance, rtol=0)
    sent = perturb(states, subspace, rotation, complement="sketch", encode=encode)
    received = receive(sent, subspace, complement="sketch", decode=decode)
    assert sent.dtype == received.dtype == dtype
    torch.testing.assert_close(
        linear(restore(received, subspace, rotation), subspace), linear(states, subspace), atol=tolerance, rtol=0
    )
    sent = perturb(states, subspace, rotation, complement="drop")
    received = receive(sent, subspace, complement="drop", mean=calibration.mean(0))
    assert sent.dtype == received.dtype == dtype


def test_bad_ranks() -> None:
    for rank in (0, WIDTH + 1):
        with pytest.raises(ValueError, match=rf"1 <= rank <= 12, from 100 states of width 12; got {rank}: lower"):
            semantic_subspace(correlated(), rank)
    with pytest.raises(ValueError, match=r"1 <= rank <= 5, from 5 states of width 12; got 6: .* give more probes"):
        semantic_subspace(correlated(5), 6)
    with pytest.raises(ValueError, match="got 2: give more varied probes"):
        semantic_subspace(draw(20, 2) @ draw(2, WIDTH), 3)
    with pytest.raises(ValueError, match="finite calibration states; got nan or inf in 100 of 100"):
        semantic_subspace(correlated() * float("nan"), 3)
    with pytest.raises(ValueError, match="rank >= 1; got 0"):
        draw_rotation(0, "secret")


def test_bad_shapes() -> None:
    subspace, rotation = semantic_subspace(correlated(), 3), draw_rotation(3, "secret")
    for function in (perturb, restore):
        with pytest.raises(ValueError, match=r"states of width 12 .*; got shape \[2, 11\]"):
            function(torch.ones(2, 11), subspace, rotation)
        with pytest.raises(ValueError, match=r"a rotation \[3, 3\], .*; got \[4, 4\]: draw it with rank=3"):
            function(torch.ones(2, WIDTH), subspace, draw_rotation(4, "secret"))
        with pytest.raises(ValueError, match=r"a subspace \[D, r\] with 1 <= r <= D; got \[3, 12\]"):
            function(torch.ones(2, WIDTH), subspace.T, rotation)
    with pytest.raises(ValueError, match=r"width 12 .*; got shape \[2, 3\]"):
        receive(torch.ones(2, 3), subspace)
    with pytest.raises(ValueError, match=r"width 3 .*; got shape \[2, 12\]"):
        receive(torch.ones(2, WIDTH), subspace, complement="drop")
    with pytest.raises(ValueError, match=r"more than 3 numbers .*; got shape \[2, 3\]: both ends"):
        receive(torch.ones(2, 3), subspace, complement="sketch", decode=torch.clone)
    with pytest.raises(ValueError, match=r"a mean of width 12 .*; got shape \[11\]"):
        rotated_moments(torch.ones(11), torch.eye(11), subspace)


def test_bad_complements() -> None:
    subspace, rotation = semantic_subspace(correlated(), 3), draw_rotation(3, "secret")
    states: Any = torch.ones(2, WIDTH)
    wrong: Any = "hide"
    with pytest.raises(ValueError, match="one of keep, sketch, drop; got 'hide'"):
        perturb(states, subspace, rotation, complement=wrong)
    with pytest.raises(ValueError, match="one of keep, sketch, drop; got 'hide'"):
        receive(states, subspace, complement=wrong)
    with pytest.raises(ValueError, match=r"encode for complement='sketch', and for no other; got none with"):
        perturb(states, subspace, rotation, complement="sketch")
    with pytest.raises(ValueError, match=r"decode for .*; got one with complement='drop'"):
        receive(states, subspace, complement="drop", decode=torch.clone)
    with pytest.raises(ValueError, match=r"encode for .*; got one with complement='keep'"):
        perturb(states, subspace, rotation, encode=torch.clone)
    with pytest.raises(ValueError, match=r"only where the complement is dropped; got \[12\] with complement='keep'"):
        receive(states, subspace, mean=torch.ones(WIDTH))
    with pytest.raises(ValueError, match=r"a mean \[12\], .*; got \[11\] with complement='drop'"):
        receive(states[:, :3], subspace, complement="drop", mean=torch.ones(11))
