"""Linear projections of hidden states onto fewer numbers.

Among all linear codecs of one width, sending the coordinates along the principal directions loses least of the states
they were computed from. What a task needs may lie elsewhere, so the ends of `elsa_pl.links.stages.ProjectionStage`
start at the principal directions and train with the adapters.

Backward is exact everywhere: the gradient of the K numbers crosses the link backwards. Numbers that are not finite are
not looked for: they spread over the whole state.

Shapes: Q calibration states, D hidden, K transmitted width, * any number of leading dimensions.
"""

from torch import Tensor

from elsa_pl.functional.fingerprints import principal_directions
from elsa_pl.functional.states import linear, require_calibration_states


def principal_projection(states: Tensor, width: int) -> tuple[Tensor, Tensor]:
    r"""Mean and principal directions of calibration states.

    With :math:`\lambda_1 \ge \lambda_2 \ge \dots` the eigenvalues of their covariance, `decode` of `encode` loses

    .. math::
        E \lVert \hat x - x \rVert^2 = \sum_{i > K} \lambda_i

    on these states, the least that any K linear numbers can lose (Eckart and Young 1936).

    Args:
        states: hidden states of public texts at the cut, padding left out. [Q, D]
        width: K, 1 <= K <= D and K < Q. The compression ratio is D / K.

    Returns:
        Mean [D] and orthonormal components [D, K], in the states' own dtype. The sign of each component is fixed, but
        components of equal strength may come out differently on other hardware: compute them in one place.

    Raises:
        ValueError: states that are no finite matrix, a width outside its range, or states that vary in fewer than
            `width` directions.

    Source:
        Pearson 1901, "On lines and planes of closest fit". The directions are those of `principal_directions`.

    Example:
        >>> import torch
        >>> states = torch.tensor([[1.0, 3.0], [1.0, -3.0], [2.0, 0.0], [0.0, 0.0]])
        >>> mean, components = principal_projection(states, 1)
        >>> decode(encode(states, mean, components), mean, components)
        tensor([[ 1.,  3.],
                [ 1., -3.],
                [ 1.,  0.],
                [ 1.,  0.]])
    """
    require_calibration_states(states)
    components = principal_directions(states, width)
    return states.double().mean(0).to(states.dtype), components


def encode(states: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    r"""Coordinates along the components: :math:`t = (x - \mu)\, V`.

    Args:
        states: [*, D]
        mean: [D]
        components: V, orthonormal columns. [D, K]

    Returns:
        In the states' dtype. [*, K]

    Raises:
        ValueError: states of another width, or of no floating-point dtype.

    Example:
        >>> import torch
        >>> encode(torch.tensor([5.0, 3.0]), torch.tensor([1.0, 0.0]), torch.eye(2)[:, :1])
        tensor([4.])
    """
    return linear(states, components, -mean @ components)


def decode(codes: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    r"""The states with these coordinates that lie nearest to the mean: :math:`\hat x = \mu + t\, V^T`.

    Args:
        codes: from `encode`. [*, K]
        mean: [D]
        components: V. [D, K]

    Returns:
        In the dtype of `codes`. [*, D]

    Raises:
        ValueError: codes of another width, or of no floating-point dtype.

    Example:
        >>> import torch
        >>> decode(torch.tensor([4.0]), torch.tensor([1.0, 0.0]), torch.eye(2)[:, :1])
        tensor([5., 0.])
    """
    return linear(codes, components.T, mean)
