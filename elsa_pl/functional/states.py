"""What the codecs of hidden states share: moments of calibration states, maps that keep the dtype, errors to expect.

A codec is fitted to the states of public texts at the cut, never to private data. Its numbers are computed in double
precision once, kept in single precision, and applied to states of any floating-point dtype: bfloat16 states are
multiplied in float32, or sums over the width would lose what the codec is there to keep.

Shapes: Q calibration states, D hidden, K transmitted width, * any number of leading dimensions.
"""

import math

import torch
from torch import Tensor


def moments(states: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of calibration states, a row for each token.

    .. math::
        \mu = \frac1Q \sum_q h_q, \qquad C = \frac1Q \sum_q (h_q - \mu)(h_q - \mu)^T

    Args:
        states: hidden states of public texts at the cut, padding left out. [Q, D]

    Returns:
        Mean [D] and covariance [D, D], both in double precision.

    Raises:
        ValueError: states that are no finite matrix, or fewer than two.

    Example:
        >>> mean, covariance = moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> mean.tolist(), covariance.tolist()
        ([2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """
    require_calibration_states(states)
    mean = states.double().mean(0)
    centred = states.double() - mean
    return mean, centred.T @ centred / len(states)


def linear(states: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``states @ matrix + bias`` in the wider of the two dtypes; return it in the states' own dtype.

    Differentiable in all three, exactly.

    Args:
        states: any floating-point dtype. [*, D]
        matrix: [D, K]
        bias: [K] None for none.

    Returns:
        [*, K]

    Raises:
        ValueError: states of another width, or of no floating-point dtype.

    Example:
        >>> linear(torch.ones(2, 3, dtype=torch.bfloat16), torch.eye(3), torch.ones(3)).dtype
        torch.bfloat16
    """
    require_width(states, matrix.shape[0])
    dtype = torch.promote_types(states.dtype, matrix.dtype)
    product = states.to(dtype) @ matrix.to(states.device, dtype)
    if bias is not None:
        product = product + bias.to(states.device, dtype)
    return product.to(states.dtype)


def expected_error(encoder: Tensor, decoder: Tensor, bias: Tensor, mean: Tensor, covariance: Tensor) -> float:
    r"""Relative error to expect of ``states @ encoder @ decoder + bias`` on states with these moments.

    With :math:`M = A W - I` for encoder A and decoder W:

    .. math::
        \sqrt{\frac{E \lVert \hat x - x \rVert^2}{E \lVert x \rVert^2}} = \sqrt{
        \frac{\operatorname{tr}(M^T C M) + \lVert M^T \mu + b \rVert^2}{\operatorname{tr} C + \lVert \mu \rVert^2}}

    Args:
        encoder: A. [D, K]
        decoder: W. [K, D]
        bias: b. [D]
        mean: of the states. [D]
        covariance: of the states. [D, D]

    Returns:
        0 for a codec that loses nothing, 1 for one as good as sending nothing.

    Raises:
        ValueError: shapes that do not fit, or states that are all 0.

    Example:
        >>> first, zeros = torch.tensor([[1.0], [0.0]]), torch.zeros(2)  # of two numbers the first is sent
        >>> round(expected_error(first, first.T, zeros, zeros, torch.diag(torch.tensor([3.0, 1.0]))), 3)
        0.5
    """
    require_moments(mean, covariance)
    num_hidden = len(mean)
    if encoder.ndim != 2 or encoder.shape[0] != num_hidden or decoder.shape != encoder.T.shape:
        raise ValueError(
            f"expected encoder [{num_hidden}, K] and decoder [K, {num_hidden}]; got {list(encoder.shape)} and "
            f"{list(decoder.shape)}"
        )
    mean, covariance = mean.double(), covariance.double()
    lost = encoder.double() @ decoder.double() - torch.eye(num_hidden, dtype=torch.float64, device=mean.device)
    error = ((covariance @ lost) * lost).sum() + (mean @ lost + bias.double()).square().sum()
    energy = covariance.trace() + mean.square().sum()
    if energy <= 0:
        raise ValueError("expected calibration states that are not all 0: give other probes")
    return math.sqrt(max(0.0, float(error / energy)))


def require_width(states: Tensor, width: int, what: str = "states") -> None:
    """Raise ValueError unless the last dimension is `width` and the dtype floating-point."""
    if not states.is_floating_point():
        raise ValueError(f"expected floating-point {what}; got {states.dtype}: convert them first")
    if states.ndim < 1 or states.shape[-1] != width:
        raise ValueError(
            f"expected {what} of width {width} in the last dimension; got shape {list(states.shape)}: both ends of a "
            "link need the same codec, made for the model's width"
        )


def require_calibration_states(states: Tensor) -> None:
    """Raise ValueError unless the states are a finite floating-point matrix of at least two rows."""
    if states.ndim != 2 or not states.is_floating_point():
        raise ValueError(
            f"expected floating-point calibration states [Q, D], a row for each token; got {states.dtype} "
            f"{list(states.shape)}: flatten batch and tokens, leaving out the padding"
        )
    if len(states) < 2:
        raise ValueError(f"expected two or more calibration states; got {len(states)}: give more probes")
    if not states.isfinite().all():
        bad = int((~states.isfinite()).any(1).sum())
        raise ValueError(
            f"expected finite calibration states; got nan or inf in {bad} of {len(states)}: check the model's weights "
            "and its precision"
        )


def require_moments(mean: Tensor, covariance: Tensor) -> None:
    """Raise ValueError unless the mean is a finite vector and the covariance a finite matrix of its width."""
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"expected mean [D] and covariance [D, D]; got {list(mean.shape)} and {list(covariance.shape)}: take both "
            "from moments() of the calibration states"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("expected finite mean and covariance; got nan or inf: calibrate on finite states")
