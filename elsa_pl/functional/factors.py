"""The two factors of each LoRA layer as what they stand for: their product.

Many pairs of factors have one product, so a mean, a rank or a remainder says something about a layer only where it is
one of products. Everything here works on the factors and never makes the dense matrix, which would be as large as the
weight that LoRA leaves alone.

Shapes: O and I width of a layer's output and input, R rank, K sum of the senders' ranks.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from elsa_pl.functional.seeding import derive_seed

_PARTS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))

SUFFIX = ".base_layer.weight"
"""How the name of an adapted layer's frozen weight ends, as peft forms it."""

NEGLIGIBLE = 1e-6
"""A singular value below this share of the largest is rounding of factors in single precision."""


def factor_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The names of adapters that belong together: A [R, I] and B [O, R] of each layer.

    Args:
        names: global names of adapters, as peft forms them.

    Raises:
        ValueError: a factor without the other one.

    Example:
        >>> factor_pairs(["head.weight", "query.lora_A.default.weight", "query.lora_B.default.weight"])
        [('query.lora_A.default.weight', 'query.lora_B.default.weight')]
    """
    known = list(names)
    pairs = []
    alone = {name for name in known if _swapped(name) is not None}
    for name in known:
        other = _swapped(name)
        if other is not None and name in alone and other in alone:
            pairs.append((name, other) if _is_first(name) else (other, name))
            alone -= {name, other}
    if alone:
        raise ValueError(f"expected both factors of each layer; got only {sorted(alone)[0]}: send all of its adapters")
    return pairs


def _is_first(name: str) -> bool:
    return any(part in name.split(".") for part, _ in _PARTS)


def _swapped(name: str) -> str | None:
    """The name of the other factor; None for what is none."""
    path = name.split(".")
    for pair in _PARTS:
        for here, there in (pair, pair[::-1]):
            if here in path:
                path[path.index(here)] = there
                return ".".join(path)
    return None


def to_rank(adapters: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Adapters whose factors have the first ``rank`` directions, or zeros where there are fewer; the rest as it is.

    Of factors as `refactored` orders them, no other ``rank`` directions come closer to the product. Zeros add nothing
    to it.

    Args:
        adapters: by global name.
        rank: of the result, at least 1.

    Returns:
        A [rank, I] and B [O, rank]; what is of that rank already, and all other tensors, are not copied.

    Raises:
        ValueError: a rank below 1, or a factor without the other one.

    Example:
        >>> factors = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}
        >>> [tuple(value.shape) for value in to_rank(factors, 1).values()]
        [(1, 3), (4, 1)]
        >>> [tuple(value.shape) for value in to_rank(factors, 5).values()]
        [(5, 3), (4, 5)]
    """
    if rank < 1:
        raise ValueError(f"expected rank >= 1; got {rank}")
    resized = dict(adapters)
    for name_a, name_b in factor_pairs(adapters):
        if len(adapters[name_a]) == adapters[name_b].shape[1] == rank:
            continue
        resized[name_a] = _first_rows(adapters[name_a], rank)
        resized[name_b] = _first_rows(adapters[name_b].mT, rank).mT.contiguous()
    return resized


def _first_rows(value: Tensor, count: int) -> Tensor:
    rows = value.new_zeros(count, value.shape[1])
    kept = min(count, len(value))
    rows[:kept] = value[:kept]
    return rows


def refactored(factor_a: Tensor, factor_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""The best approximation of a product by factors of another rank, its directions in order of their weight.

    .. math::
        B A = U S V^\top, \qquad A' = \sqrt{S_r}\, V_r^\top, \quad B' = U_r \sqrt{S_r}

    with the ``rank`` largest singular values, in double precision. With :math:`B = Q_B R_B` and
    :math:`A^\top = Q_A R_A` only :math:`R_B R_A^\top` is decomposed, so the dense product is never made. The error is
    that of the singular values left out, :math:`\lVert BA - B'A' \rVert_F^2 = \sum_{k > r} s_k^2`, and no factors of
    this rank have a smaller one (Eckart and Young 1936): 0 where the product's own rank is not above ``rank``.

    Args:
        factor_a: [K, I].
        factor_b: [O, K].
        rank: of the result, at least 1.

    Returns:
        A' [R', I] and B' [O, R'] in double precision, R' the smallest of ``rank``, K, O and I. Singular vectors are
        known up to their sign: here the largest element of each row of A' is positive.

    Raises:
        ValueError: factors that do not fit each other, or a rank below 1.

    Source:
        FlexLoRA, Bai et al. 2024, arXiv 2402.11505, decomposes the mean's dense matrix; the same result, less work.
        The singular values are shared evenly between both factors, so that neither's gradients outweigh the other's.

    Example:
        >>> a, b = refactored(torch.tensor([[0.0, 3.0], [4.0, 0.0]]), torch.eye(2), rank=1)
        >>> b @ a
        tensor([[0., 0.],
                [4., 0.]], dtype=torch.float64)
    """
    if factor_a.ndim != 2 or factor_b.ndim != 2 or len(factor_a) != factor_b.shape[1]:
        shapes = f"{tuple(factor_a.shape)} and {tuple(factor_b.shape)}"
        raise ValueError(f"expected factors A [K, I] and B [O, K]; got {shapes}: only linear and embedding layers fit")
    if rank < 1:
        raise ValueError(f"expected rank >= 1; got {rank}")
    left, upper_b = torch.linalg.qr(factor_b.double())
    right, upper_a = torch.linalg.qr(factor_a.double().mT)
    u, values, vt = torch.linalg.svd(upper_b @ upper_a.mT, full_matrices=False)
    roots = values[:rank].sqrt()
    rows = vt[:rank] @ right.mT
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    rows = rows * torch.where(largest < 0, -1.0, 1.0)
    columns = left @ u[:, :rank] * torch.where(largest < 0, -1.0, 1.0).mT
    return roots.unsqueeze(1) * rows, columns * roots


def frozen_weight(name: str) -> str:
    """The global name of the frozen weight that a factor's product is added to.

    Example:
        >>> frozen_weight("layer.0.query.lora_A.default.weight")
        'layer.0.query.base_layer.weight'
    """
    return f"{name.partition('.lora_')[0]}{SUFFIX}"


def fresh_rows(rank: int, width: int, seed: int) -> Tensor:
    """A factor A [rank, width] as LoRA begins: uniform within 1 / sqrt(width), in double precision.

    Example:
        >>> fresh_rows(2, 4, seed=0).abs().max() <= 0.5
        tensor(True)
    """
    drawn = torch.rand(rank, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * drawn - 1) / math.sqrt(width)


def with_fresh_directions(factor_a: Tensor, factor_b: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """Factors of a given rank whose directions can all be trained, with the product that they have.

    A direction that is 0 in A and in B has no gradient in either and would be lost for good. Where the product has no
    more directions, B stays 0 and the row of A is drawn as LoRA begins (uniform, within 1 / sqrt(I)); from the name
    alone, so that all who merge agree.

    Args:
        factor_a: [R', I], as `refactored` returns it.
        factor_b: [O, R'].
        rank: R >= R'.
        name: of the first factor.

    Returns:
        A [R, I] and B [O, R].

    Example:
        >>> a, b = with_fresh_directions(torch.tensor([[2.0, 0.0]]), torch.ones(3, 1), rank=2, name="a.lora_A.weight")
        >>> torch.equal(b @ a, torch.tensor([[2.0, 0.0]] * 3)), bool(a[1].abs().max() > 0)
        (True, True)
    """
    weights = factor_a.norm(dim=1) * factor_b.norm(dim=0)
    kept = int((weights > NEGLIGIBLE * weights[:1]).sum())
    rows = fresh_rows(rank, factor_a.shape[1], derive_seed("fresh directions", name)).to(factor_a)
    rows[:kept] = factor_a[:kept]
    columns = factor_b.new_zeros(len(factor_b), rank)
    columns[:, :kept] = factor_b[:, :kept]
    return rows, columns
