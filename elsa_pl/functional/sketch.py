"""Count sketches of hidden states: fewer numbers on a link, from hashing alone or decoded with public knowledge.

A sketch adds the D numbers of a state, with random signs, into K < D buckets. It needs no data and both ends make it
from a seed. What was added up cannot be told apart again, though: *mean* and *median* decoding see every other number
of a bucket as noise, and hidden states are dense, so the error grows like the root of the ratio and beyond ratio 1
exceeds that of sending nothing. *Calibrated* decoding reads the same numbers with the mean and covariance of the states
of public texts, and is the best linear decoder there is.

    states [*, D] --encode--> sketched [*, K] --decode_mean, decode_median or decode_calibrated--> [*, D]

Backward: encoding, mean and calibrated decoding are linear, so their backward is exact and what crosses the link
backwards are K numbers as well. The median's backward is exact too wherever no two rows agree: the gradient goes to the
row that was chosen. Nothing here is straight-through.

Numbers that are not finite are not looked for: they spread over the whole state.

Shapes: D hidden, Y hash rows, Z buckets of a row, K = Y Z transmitted width, * any number of leading dimensions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from elsa_pl.functional.states import linear, require_moments, require_width


@dataclass(frozen=True, eq=False)
class CountSketch:
    """Hash and sign of every coordinate in every row; made by `draw_sketch`."""

    buckets: Tensor
    """Bucket of each coordinate, in [0, Z). [Y, D]"""
    signs: Tensor
    """1 or -1. [Y, D]"""
    num_buckets: int
    """Z, of each row."""

    @property
    def width(self) -> int:
        """K, how many numbers are sent for each state."""
        return len(self.buckets) * self.num_buckets

    @property
    def ratio(self) -> float:
        """D / K, at least what `draw_sketch` was asked for."""
        return self.buckets.shape[1] / self.width

    @cached_property
    def matrix(self) -> Tensor:
        """The sketch as a linear map, A: row y of the sketch is in columns y Z to (y + 1) Z; [D, K].

        A dense product: for widths up to some hundreds as fast as adding into buckets, and on a GPU always in the same
        order.
        """
        num_rows, num_hidden = self.buckets.shape
        matrix = torch.zeros(num_rows, num_hidden, self.num_buckets, device=self.signs.device)
        matrix.scatter_(2, self.buckets.unsqueeze(2), self.signs.unsqueeze(2))
        return matrix.transpose(0, 1).reshape(num_hidden, self.width)


@dataclass(frozen=True, eq=False)
class CalibratedDecoder:
    """What the receiver needs to decode: D K + D numbers, made by `calibrate`."""

    weight: Tensor
    """W. [K, D]"""
    bias: Tensor
    """What is decoded from a sketch of zeros. [D]"""


def draw_sketch(num_hidden: int, ratio: float, seed: int, *, num_rows: int = 3) -> CountSketch:
    r"""Draw hashes and signs, all independent and uniform, with :math:`Z = \lfloor D / (\rho Y) \rfloor` buckets a row.

    Args:
        num_hidden: D, at least 1.
        ratio: :math:`\rho`, D over the numbers sent, above 0. Below 1 a sketch is longer than the state.
        seed: the same at both ends, and not a secret.
        num_rows: Y, at least 1.

    Returns:
        The sketch, on the CPU.

    Raises:
        ValueError: a number outside its range, or a ratio that leaves no bucket.

    Source:
        Charikar, Chen and Farach-Colton 2002, "Finding frequent items in data streams"; ELSA, arXiv 2601.13824, applies
        it to hidden states.

    Example:
        >>> sketch = draw_sketch(384, 5, seed=0)
        >>> sketch.num_buckets, sketch.width, sketch.ratio
        (25, 75, 5.12)
    """
    if num_hidden < 1 or num_rows < 1 or not 0 < ratio < float("inf"):
        raise ValueError(
            f"expected num_hidden >= 1, num_rows >= 1 and a finite ratio > 0; got {num_hidden}, {num_rows} and {ratio}"
        )
    num_buckets = int(num_hidden / (ratio * num_rows))
    if num_buckets < 1:
        raise ValueError(
            f"expected at least one bucket in each of {num_rows} rows; got none from width {num_hidden} at ratio "
            f"{ratio}: lower the ratio to {num_hidden / num_rows:g} or less, or take fewer rows"
        )
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_hidden)
    buckets = torch.randint(num_buckets, shape, generator=generator)
    signs = torch.randint(2, shape, generator=generator) * 2.0 - 1.0
    return CountSketch(buckets, signs, num_buckets)


def encode(states: Tensor, sketch: CountSketch) -> Tensor:
    r"""Add the coordinates of each state into buckets.

    .. math::
        t_{yz} = \sum_{j : h_y(j) = z} s_y(j)\, x_j, \qquad\text{that is}\qquad t = x A

    Args:
        states: [*, D]
        sketch: from `draw_sketch`.

    Returns:
        In the states' dtype, row by row. [*, K]

    Raises:
        ValueError: states of another width, or of no floating-point dtype.

    Example:
        >>> sketch = CountSketch(torch.tensor([[0, 1, 0]]), torch.tensor([[1.0, 1.0, -1.0]]), num_buckets=2)
        >>> encode(torch.tensor([5.0, 3.0, 1.0]), sketch)
        tensor([4., 3.])
    """
    return linear(states, sketch.matrix)


def decode_mean(sketched: Tensor, sketch: CountSketch) -> Tensor:
    r"""Estimate each coordinate by the mean of its buckets.

    .. math::
        \hat x_j = \frac1Y \sum_y s_y(j)\, t_{y h_y(j)}, \qquad E \hat x = x, \qquad
        \operatorname{Var} \hat x_j = \frac{\lVert x \rVert^2 - x_j^2}{Y Z}

    over draws of the sketch. The squared error is :math:`(D - 1) / K \approx \rho` times the squared length of the
    state, however it is spread over its coordinates: above 1 from ratio 1 on.

    Args:
        sketched: from `encode`. [*, K]
        sketch: the same as there.

    Returns:
        In the dtype of `sketched`. [*, D]

    Raises:
        ValueError: a sketch of another width, or of no floating-point dtype.

    Example:
        >>> sketch = CountSketch(torch.tensor([[0, 1, 0]]), torch.tensor([[1.0, 1.0, -1.0]]), num_buckets=2)
        >>> decode_mean(torch.tensor([4.0, 3.0]), sketch)
        tensor([ 4.,  3., -4.])
    """
    return linear(sketched, sketch.matrix.T / len(sketch.buckets))


def decode_median(sketched: Tensor, sketch: CountSketch) -> Tensor:
    r"""Estimate each coordinate by the median of its buckets; of an even number, the mean of the middle two.

    .. math::
        \hat x_j = \operatorname{median}_y\; s_y(j)\, t_{y h_y(j)}, \qquad E \hat x = x

    for an odd number of rows, over draws of the sketch, since the noise of a row is symmetric. A few large coordinates
    among many small ones hardly hurt the others, which is what the median is for. In dense states a row's noise is
    nearly Gaussian with variance :math:`\lVert x \rVert^2 / Z`, of which a median of three keeps 0.449 and a mean a
    third: the squared error is about 1.35 times that of `decode_mean`.

    Args:
        sketched: from `encode`. [*, K]
        sketch: the same as there.

    Returns:
        In the dtype of `sketched`. [*, D]

    Raises:
        ValueError: a sketch of another width, or of no floating-point dtype.

    Source:
        Charikar, Chen and Farach-Colton 2002; the decoder of ELSA, arXiv 2601.13824.

    Example:
        >>> sketch = CountSketch(torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.ones(3, 2), num_buckets=2)
        >>> decode_median(encode(torch.tensor([1.0, 9.0]), sketch), sketch)
        tensor([1., 9.])
    """
    require_width(sketched, sketch.width, "sketched states")
    num_rows, num_hidden = sketch.buckets.shape
    rows = sketched.reshape(-1, num_rows, sketch.num_buckets).transpose(0, 1)
    matrices = sketch.matrix.to(sketched).view(num_hidden, num_rows, sketch.num_buckets).permute(1, 2, 0)
    estimates = rows @ matrices  # [Y, N, D]; one term of each sum is not 0, so it is exact in every dtype
    if num_rows == 3:  # the usual number, 40 times as fast as sorting
        first, second, third = estimates
        median = torch.maximum(torch.minimum(first, second), torch.minimum(torch.maximum(first, second), third))
    else:
        middle = estimates.sort(0).values[(num_rows - 1) // 2 : num_rows // 2 + 1]
        median = middle.mean(0)
    return median.view(*sketched.shape[:-1], num_hidden)


def calibrate(matrix: Tensor, mean: Tensor, covariance: Tensor, *, ridge: float = 1e-4) -> CalibratedDecoder:
    r"""The linear decoder of least expected squared error for states with these moments.

    .. math::
        \hat x = \mu + (t - \mu A)\, W, \qquad W = (A^T C A + \epsilon I)^{-1} A^T C

    Without the ridge, states with mean :math:`\mu` and covariance C are decoded with the error

    .. math::
        E \lVert \hat x - x \rVert^2 = \operatorname{tr} C - \operatorname{tr}(C A (A^T C A)^{-1} A^T C)

    which is never more than :math:`\operatorname{tr} C`, that of sending nothing but the mean; `expected_error` gives
    it with the ridge.

    Args:
        matrix: A, of any linear encoder; `CountSketch.matrix` for a sketch. [D, K]
        mean: from `moments` of calibration states. [D]
        covariance: from `moments`. [D, D]
        ridge: :math:`\epsilon` in units of the mean diagonal entry of :math:`A^T C A`, above 0. It keeps the inverse
            finite where the calibration states vary in fewer than K directions.

    Returns:
        The decoder, in float32.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, a ridge that is not above 0, or calibration
            states that are all the same.

    Source:
        Linear minimum-mean-square estimation, for example Kay 1993, "Fundamentals of statistical signal processing:
        estimation theory", section 12.3. ELSA, arXiv 2601.13824, takes the median.

    Example:
        >>> matrix = torch.tensor([[1.0], [1.0]])  # of two numbers the sum is sent
        >>> decoder = calibrate(matrix, torch.tensor([5.0, 0.0]), torch.diag(torch.tensor([3.0, 1.0])), ridge=1e-9)
        >>> decode_calibrated(torch.tensor([9.0]), decoder)
        tensor([8., 1.])
    """
    require_moments(mean, covariance)
    if matrix.ndim != 2 or matrix.shape[0] != len(mean) or not matrix.shape[1]:
        raise ValueError(f"expected a matrix [{len(mean)}, K], as wide as the mean; got {list(matrix.shape)}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"expected a finite ridge > 0; got {ridge}: at 0 the inverse may not exist")
    matrix, mean, covariance = (given.double() for given in (matrix, mean, covariance))
    cross = matrix.T @ covariance
    gram = cross @ matrix
    loading = ridge * gram.diagonal().mean()
    if not loading > 0:
        raise ValueError("expected calibration states that differ where the sketch looks; got none: give other probes")
    gram.diagonal().add_(loading)
    weight = torch.linalg.solve(gram, cross)
    return CalibratedDecoder(weight.float(), (mean - mean @ matrix @ weight).float())


def decode_calibrated(sketched: Tensor, decoder: CalibratedDecoder) -> Tensor:
    """Decode with what public texts say about the states: ``sketched @ weight + bias``.

    Args:
        sketched: from `encode`, with the sketch that the decoder was calibrated for. [*, K]
        decoder: from `calibrate`.

    Returns:
        In the dtype of `sketched`. [*, D]

    Raises:
        ValueError: a sketch of another width, or of no floating-point dtype.

    Example:
        >>> decode_calibrated(torch.ones(2), CalibratedDecoder(torch.eye(2), torch.tensor([1.0, 2.0])))
        tensor([2., 3.])
    """
    return linear(sketched, decoder.weight, decoder.bias)
