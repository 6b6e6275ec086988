"""Updates as short vectors with the same inner products, up to noise.

Comparing the directions of all clients' updates takes all of them in one place, and an update is as large as the
adapters. Signed feature hashing keeps inner products in expectation at a small fixed size.

Shapes: K width of the hashed vector.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from elsa_pl.functional.seeding import derive_seed

WIDTH: Final = 4096
"""The cosine of two hashed updates differs from that of the whole ones by about 1/64."""


def hashed_update(before: Mapping[str, Tensor], after: Mapping[str, Tensor], width: int = WIDTH) -> Tensor:
    r"""What changed, as one hashed vector.

    .. math:: h_k = \sum_{j:\, \kappa(j) = k} \sigma(j)\, (a_j - b_j)

    with bucket :math:`\kappa(j)` and sign :math:`\sigma(j)` drawn from the name of the tensor that j is in, so that
    all who hash agree without talking. :math:`E\langle h, h' \rangle = \langle a - b, a' - b' \rangle` with a standard
    deviation of about the product of the norms over :math:`\sqrt K`.

    Args:
        before: tensors by name.
        after: the same names and shapes.
        width: K >= 1.

    Returns:
        In single precision, on the CPU. [K]

    Raises:
        ValueError: different names, or no width.

    Source:
        Weinberger et al. 2009, "Feature hashing for large scale multitask learning", arXiv 0902.2206; a count sketch
        of one row (Charikar et al. 2002).

    Example:
        >>> update = hashed_update({"a": torch.zeros(3)}, {"a": torch.tensor([0.0, 2.0, 0.0])}, width=8)
        >>> update.abs().sum()
        tensor(2.)
    """
    if before.keys() != after.keys():
        raise ValueError(f"expected the same tensors before and after; got {sorted(before.keys() ^ after.keys())[:4]}")
    if width < 1:
        raise ValueError(f"expected width >= 1; got {width}")
    hashed = torch.zeros(width)
    for name in sorted(before):
        change = (after[name].detach().float() - before[name].detach().float()).flatten().cpu()
        draws = torch.Generator().manual_seed(derive_seed("hashed update", name))
        drawn = torch.randint(2 * width, (len(change),), generator=draws)
        hashed.index_add_(0, drawn // 2, change * (2 * (drawn % 2) - 1))
    return hashed
