"""Sketches against slow loops, their noise against the formula, and calibrated decoding against least squares."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from elsa_pl.functional.sketch import (
    CountSketch,
    calibrate,
    decode_calibrated,
    decode_mean,
    decode_median,
    draw_sketch,
    encode,
)
from elsa_pl.functional.states import expected_error, moments

SHAPES = [(12,), (5, 12), (2, 3, 12), (0, 12)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(count: int, width: int, seed: int = 0) -> Tensor:
    """States with a mean, most of whose variance lies in few directions, as hidden states' does."""
    strengths = 1 / torch.arange(1, width + 1, dtype=torch.float64)
    return draw(count, width, seed=seed) * strengths @ draw(width, width, seed=100) + draw(width, seed=101)


def relative_error(found: Tensor, states: Tensor) -> float:
    return float((found - states).norm() / states.norm())


def slow_encode(state: Tensor, sketch: CountSketch) -> list[list[float]]:
    """One state, one coordinate at a time."""
    rows = [[0.0] * sketch.num_buckets for _ in sketch.buckets]
    for y, row in enumerate(rows):
        for j, value in enumerate(state.tolist()):
            row[int(sketch.buckets[y, j])] += float(sketch.signs[y, j]) * value
    return rows


def slow_estimates(rows: list[list[float]], sketch: CountSketch, coordinate: int) -> list[float]:
    return [float(sketch.signs[y, coordinate]) * row[int(sketch.buckets[y, coordinate])] for y, row in enumerate(rows)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5])
def test_against_the_slow_loop(shape: tuple[int, ...], num_rows: int) -> None:
    sketch = draw_sketch(12, 1.2, seed=num_rows, num_rows=num_rows)
    states = draw(*shape)
    sketched = encode(states, sketch)
    assert sketched.shape == (*shape[:-1], sketch.width)
    mean, median = decode_mean(sketched, sketch), decode_median(sketched, sketch)
    assert mean.shape == median.shape == states.shape
    for state, sent, by_mean, by_median in zip(
        states.view(-1, 12), sketched.view(-1, sketch.width), mean.view(-1, 12), median.view(-1, 12), strict=True
    ):
        rows = slow_encode(state, sketch)
        assert sent.tolist() == pytest.approx([value for row in rows for value in row])
        estimates = [slow_estimates(rows, sketch, j) for j in range(12)]
        assert by_mean.tolist() == pytest.approx([statistics.mean(values) for values in estimates])
        assert by_median.tolist() == pytest.approx([statistics.median(values) for values in estimates])


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
def test_gradients_are_exact(num_rows: int) -> None:
    sketch = draw_sketch(12, 1.5, seed=1, num_rows=num_rows)
    states = draw(3, 12).requires_grad_()
    sketched = draw(3, sketch.width, seed=1).requires_grad_()
    decoder = calibrate(sketch.matrix, *moments(correlated(40, 12)))
    assert torch.autograd.gradcheck(lambda x: encode(x, sketch), (states,))
    assert torch.autograd.gradcheck(lambda t: decode_mean(t, sketch), (sketched,))
    assert torch.autograd.gradcheck(lambda t: decode_median(t, sketch), (sketched,))
    assert torch.autograd.gradcheck(lambda t: decode_calibrated(t, decoder), (sketched,))
    assert torch.autograd.gradcheck(lambda x: decode_calibrated(encode(x, sketch), decoder), (states,))


def test_the_gradient_of_the_median_goes_to_the_row_that_was_chosen() -> None:
    sketch = draw_sketch(6, 1, seed=0, num_rows=3)
    sketched = draw(sketch.width).requires_grad_()
    found = decode_median(sketched, sketch)
    for j in range(6):
        (gradient,) = torch.autograd.grad(found[j], sketched, retain_graph=True)
        assert gradient.count_nonzero() == 1
        assert gradient.sum() * sketched @ gradient.abs() == found[j]


def test_mean_and_median_are_unbiased_and_as_noisy_as_expected() -> None:
    """Over draws of the sketch; the noise of six numbers in a bucket is not quite Gaussian, which suits the median."""
    num_draws, width, num_rows, num_buckets = 3000, 60, 3, 10
    states = draw(width)
    means, medians = torch.empty(num_draws, width), torch.empty(num_draws, width)
    for seed in range(num_draws):
        sketch = draw_sketch(width, width / (num_rows * num_buckets), seed=seed, num_rows=num_rows)
        sketched = encode(states, sketch)
        means[seed], medians[seed] = decode_mean(sketched, sketch), decode_median(sketched, sketch)
    variance = (states.square().sum() - states.square()) / (num_rows * num_buckets)
    for found, of_mean, least in ((means, 1.0, 0.97), (medians, 1.346, 0.9)):
        deviation = (found.mean(0) - states) / (of_mean * variance / num_draws).sqrt()
        assert deviation.abs().max() < 4.5
        ratio = found.var(0) / (of_mean * variance)
        assert least < ratio.mean() < 1.03
        assert ratio.min() > 0.75
        assert ratio.max() < 1.2


@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_relative_error_grows_like_the_root_of_the_ratio(ratio: int) -> None:
    states = draw(200, 384)
    sketch = draw_sketch(384, ratio, seed=0)
    expected = math.sqrt((384 - 1) / sketch.width)
    assert relative_error(decode_mean(encode(states, sketch), sketch), states) == pytest.approx(expected, rel=0.1)
    found = relative_error(decode_median(encode(states, sketch), sketch), states)
    assert found == pytest.approx(math.sqrt(1.346) * expected, rel=0.1)


def test_the_median_survives_one_large_number_and_the_mean_does_not() -> None:
    states = draw(1, 90) * 0.01
    states[:, 7] = 100
    sketch = draw_sketch(90, 1, seed=0, num_rows=5)
    others = torch.arange(90) != 7
    error = (decode_median(encode(states, sketch), sketch) - states)[:, others]
    assert error.abs().median() < 0.1
    error = (decode_mean(encode(states, sketch), sketch) - states)[:, others]
    assert error.abs().max() > 10


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_calibrated_decoding_against_least_squares(ratio: float) -> None:
    """The best linear decoder of the calibration states themselves is their regression on the sketches."""
    states = correlated(500, 24)
    sketch = draw_sketch(24, ratio, seed=3, num_rows=2)
    sketched = encode(states, sketch)
    matrix, (mean, covariance) = sketch.matrix.double(), moments(states)
    decoder = calibrate(matrix, mean, covariance, ridge=1e-12)
    centred = sketched - sketched.mean(0)
    regression = torch.linalg.lstsq(centred, states - states.mean(0), driver="gelsd").solution
    best = centred @ regression + states.mean(0)
    found = decode_calibrated(sketched, decoder)
    assert relative_error(found, states) == pytest.approx(relative_error(best, states), abs=1e-4)
    if ratio > 1:  # otherwise the solution is not unique
        torch.testing.assert_close(found, best, atol=1e-4, rtol=1e-4)
        gram = matrix.T @ covariance @ matrix
        error = covariance.trace() - (covariance @ matrix @ torch.linalg.inv(gram) @ matrix.T @ covariance).trace()
        assert (found - states).square().sum(1).mean().item() == pytest.approx(error.item(), rel=1e-4)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_calibrated_decoding_of_other_states(ratio: float) -> None:
    sketch = draw_sketch(48, ratio, seed=0)
    calibration, states = correlated(2000, 48), correlated(500, 48, seed=1)
    mean, covariance = moments(calibration)
    decoder = calibrate(sketch.matrix, mean, covariance)
    found = relative_error(decode_calibrated(encode(states, sketch), decoder), states)
    assert found == pytest.approx(
        expected_error(sketch.matrix, decoder.weight, decoder.bias, mean, covariance), rel=0.15
    )
    assert found < relative_error(mean.expand_as(states), states)
    assert found < 0.5 * relative_error(decode_mean(encode(states, sketch), sketch), states)


def test_no_other_weight_decodes_the_calibration_states_better() -> None:
    states = correlated(300, 24)
    sketch = draw_sketch(24, 3, seed=0, num_rows=2)
    mean, covariance = moments(states)
    decoder = calibrate(sketch.matrix, mean, covariance, ridge=1e-9)
    least = expected_error(sketch.matrix, decoder.weight, decoder.bias, mean, covariance)
    for seed in range(20):
        weight = decoder.weight + 0.01 * draw(*decoder.weight.shape, seed=seed)
        bias = mean - mean @ sketch.matrix.double() @ weight
        assert expected_error(sketch.matrix, weight, bias, mean, covariance) > least


def test_calibration_on_fewer_states_than_numbers_sent() -> None:
    states = correlated(5, 48)
    sketch = draw_sketch(48, 2, seed=0)
    decoder = calibrate(sketch.matrix, *moments(states))
    assert relative_error(decode_calibrated(encode(states, sketch), decoder), states) < 0.05


def test_ratio_and_width() -> None:
    sketch = draw_sketch(384, 4, seed=0)
    assert (sketch.num_buckets, sketch.width, sketch.ratio) == (32, 96, 4.0)
    assert sketch.matrix.shape == (384, 96)
    assert sketch.matrix.abs().sum(1).tolist() == [3.0] * 384
    assert draw_sketch(10, 3, seed=0, num_rows=2).ratio == 5, "buckets are whole, so the ratio may be higher"


def test_the_seed_decides() -> None:
    first, again, other = (draw_sketch(384, 2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.buckets, again.buckets)
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.buckets, other.buckets)
    assert not torch.equal(first.signs, other.signs)
    state = torch.get_rng_state()
    draw_sketch(384, 2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    sketch = draw_sketch(48, 2, seed=0)
    states = correlated(100, 48)
    decoder = calibrate(sketch.matrix, *moments(states))
    exact = encode(states, sketch)
    sketched = encode(states.to(dtype), sketch)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert sketched.dtype == dtype
    assert relative_error(sketched.double(), exact) < tolerance
    for found, expected in (
        (decode_mean(sketched, sketch), decode_mean(exact, sketch)),
        (decode_median(sketched, sketch), decode_median(exact, sketch)),
        (decode_calibrated(sketched, decoder), decode_calibrated(exact, decoder)),
    ):
        assert found.dtype == dtype
        assert relative_error(found.double(), expected) < tolerance


def test_nan_spreads_over_its_state_and_no_other() -> None:
    sketch = draw_sketch(12, 2, seed=0)
    states = draw(3, 12)
    states[1, 4] = float("nan")
    found = decode_mean(encode(states, sketch), sketch)
    assert found.isnan().all(1).tolist() == [False, True, False]


def test_bad_ratios() -> None:
    with pytest.raises(ValueError, match=r"none from width 384 at ratio 200: lower the ratio to 128 or less"):
        draw_sketch(384, 200, seed=0)
    for num_hidden, ratio, num_rows in ((0, 2, 3), (8, 0, 3), (8, -1, 3), (8, float("nan"), 3), (8, 2, 0)):
        with pytest.raises(ValueError, match="expected num_hidden >= 1, num_rows >= 1 and a finite ratio > 0; got"):
            draw_sketch(num_hidden, ratio, seed=0, num_rows=num_rows)


def test_bad_states() -> None:
    sketch = draw_sketch(12, 2, seed=0)
    with pytest.raises(ValueError, match=r"states of width 12 .*; got shape \[2, 11\]"):
        encode(torch.ones(2, 11), sketch)
    with pytest.raises(ValueError, match=r"floating-point states; got torch.int64"):
        encode(torch.ones(2, 12, dtype=torch.long), sketch)
    with pytest.raises(ValueError, match=r"sketched states of width 6 .*; got shape \[2, 12\]"):
        decode_median(torch.ones(2, 12), sketch)
    with pytest.raises(ValueError, match=r"width 6 .*; got shape \[2, 12\]"):
        decode_mean(torch.ones(2, 12), sketch)
    with pytest.raises(ValueError, match=r"width 6 .*; got shape \[2, 5\]"):
        decode_calibrated(torch.ones(2, 5), calibrate(sketch.matrix, *moments(draw(30, 12))))


def test_bad_calibration() -> None:
    matrix, (mean, covariance) = draw_sketch(12, 2, seed=0).matrix, moments(draw(30, 12))
    with pytest.raises(ValueError, match=r"a matrix \[12, K\], as wide as the mean; got \[11, 6\]"):
        calibrate(matrix[1:], mean, covariance)
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"finite ridge > 0; got"):
            calibrate(matrix, mean, covariance, ridge=ridge)
    with pytest.raises(ValueError, match="calibration states that differ"):
        calibrate(matrix, mean, 0 * covariance)
    with pytest.raises(ValueError, match=r"got \[12\] and \[11, 12\]: take both from moments\(\)"):
        calibrate(matrix, mean, covariance[1:])
    with pytest.raises(ValueError, match="finite mean and covariance"):
        calibrate(matrix, mean * float("nan"), covariance)
