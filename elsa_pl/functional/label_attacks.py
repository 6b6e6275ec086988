"""What an edge can tell of its clients' labels, which never cross a link: groups of examples that look alike.

Two things give labels away. As a model learns, states of one class come together in the middle's outputs. And the
gradient that comes back along the downlink is, but for the path through the tail, that of the loss by the logits,

    softmax(z) - onehot(label)

which at the first step is nearly the same for all examples of a label, and later still leans to it. An edge that groups
examples by either knows which of them share a label; which label that is, a few examples or the classes' frequencies
tell. On the six labels of TREC, MiniLM with a tail of one block: all of 200 examples by the first step's gradients and
77% by those after 30 steps; 64% by the middle's outputs before any training and 92% after 150 steps; 26% is the floor.

Shapes: B examples, T tokens, K width, C classes.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Likeness = Literal["distance", "direction"]
"""What makes two examples alike: little Euclidean distance, or a large cosine."""


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over each example's tokens, of states or of their gradients.

    Args:
        states: [B, T, K]
        mask: 1 or True for tokens, 0 or False for padding. [B, T]

    Returns:
        In at least float32. [B, K]

    Raises:
        ValueError: shapes that do not fit, states of no floating-point dtype, or an example without tokens.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    if states.ndim != 3 or not states.is_floating_point() or mask.shape != states.shape[:2]:
        raise ValueError(
            f"expected floating-point states [B, T, K] and their mask [B, T]; got {states.dtype} {list(states.shape)} "
            f"and {list(mask.shape)}: give both of one batch"
        )
    kept = mask.to(states.device) != 0
    counts = kept.sum(1, keepdim=True)
    if not counts.all():
        raise ValueError(
            f"expected tokens in every example; got {int((counts == 0).sum())} of {len(states)} without: leave them out"
        )
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    # Filled, not multiplied: padding may hold nan, and nan times 0 is nan.
    return wide.masked_fill(~kept.unsqueeze(-1), 0).sum(1) / counts


def label_clusters(
    observed: Tensor, num_classes: int, *, by: Likeness = "distance", num_starts: int = 10, seed: int = 0
) -> Tensor:
    r"""Divide examples into as many groups as there are classes, by k-means.

    .. math:: \min_{c, m} \sum_b \lVert x_b - m_{c_b} \rVert^2, \qquad
        x_b = o_b \text{ or } o_b / \lVert o_b \rVert

    Take "direction" for gradients: examples that the model already gets right have tiny ones, which by distance would
    all be one group, whatever their labels.

    Args:
        observed: what the edge has of each example, such as `pool` of uplink states, of the middle's outputs, or of
            the downlink's gradients. [B, K]
        num_classes: C, 1 <= C <= B.
        by: what makes examples alike.
        num_starts: k-means runs from other starts, of which the tightest counts; at least 1.
        seed: of the starts.

    Returns:
        Groups, numbered from 0 in no order that means anything. [B]

    Raises:
        ValueError: no finite floating-point matrix, no rows, or settings outside their range.

    Source:
        Li et al. 2021, arXiv 2102.08504, and Sun et al. 2022, arXiv 2203.01451, on labels in split learning.

    Example:
        >>> groups = label_clusters(torch.tensor([[1.0, 0.0], [-0.1, 0.0], [9.0, 0.1]]), 2, by="direction")
        >>> groups[0] == groups[2], groups[0] == groups[1]
        (tensor(True), tensor(False))
    """
    if by not in get_args(Likeness):
        raise ValueError(f"expected by to be one of {', '.join(get_args(Likeness))}; got {by!r}")
    if observed.ndim != 2 or not observed.is_floating_point() or not observed.numel():
        raise ValueError(
            f"expected floating-point observations [B, K], a row for each example and at least one; got "
            f"{observed.dtype} {list(observed.shape)}: pool() the tokens of each"
        )
    if not observed.isfinite().all():
        bad = int((~observed.isfinite()).any(1).sum())
        raise ValueError(f"expected finite observations; got nan or inf in {bad} of {len(observed)}: leave these out")
    if not 1 <= num_classes <= len(observed) or num_starts < 1:
        raise ValueError(
            f"expected 1 <= num_classes <= {len(observed)}, the examples, and num_starts >= 1; got {num_classes} and "
            f"{num_starts}: observe more examples"
        )
    from sklearn.cluster import KMeans

    rows = observed.detach().double()
    if by == "direction":
        # Gradients of mean losses may be far below the 1e-12 under which `normalize` gives up.
        rows = F.normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny)
    means = KMeans(num_classes, n_init=num_starts, random_state=seed)
    return torch.from_numpy(means.fit_predict(rows.cpu().numpy())).long().to(observed.device)


def matched_share(groups: Tensor, labels: Tensor) -> float:
    r"""Share of examples whose group stands for their label, with groups and labels paired as well as they can be.

    .. math:: \max_\pi \frac1B \sum_b [\pi(g_b) = y_b] \quad \text{over one-to-one } \pi

    To be read next to `elsa_pl.functional.recovery.majority_floor` of the labels. For few examples and many classes
    groups at random score well above 1 / C: see `shuffled_share`.

    Args:
        groups: from `label_clusters`. [B]
        labels: the true ones, as whole numbers. [B]

    Returns:
        From 0 to 1. A group that is left without a label counts as wrong.

    Raises:
        ValueError: tensors that are no whole numbers or of unlike lengths, or no examples.

    Source:
        Kuhn 1955, "The Hungarian method for the assignment problem".

    Example:
        >>> matched_share(torch.tensor([1, 1, 0, 0]), torch.tensor([5, 5, 7, 5]))
        0.75
    """
    for name, given in (("groups", groups), ("labels", labels)):
        if given.ndim != 1 or not len(given) or given.is_floating_point():
            raise ValueError(
                f"expected {name} as whole numbers, one for each example and at least one; got {given.dtype} "
                f"{list(given.shape)}"
            )
    if len(groups) != len(labels):
        raise ValueError(
            f"expected a group for each of {len(labels)} labels; got {len(groups)}: give both of the same examples"
        )
    from scipy.optimize import linear_sum_assignment

    groups, labels = (given.cpu().unique(return_inverse=True)[1] for given in (groups, labels))
    num_labels = int(labels.max()) + 1
    table = (groups * num_labels + labels).bincount(minlength=(int(groups.max()) + 1) * num_labels)
    table = table.view(-1, num_labels)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return int(table[rows, columns].sum()) / len(labels)


def shuffled_share(groups: Tensor, labels: Tensor, *, num_shuffles: int = 20, seed: int = 0) -> float:
    """What the groups would get of labels in random order: the chance level of `matched_share`, a mean.

    Args:
        groups: from `label_clusters`. [B]
        labels: the true ones, as whole numbers. [B]
        num_shuffles: orders drawn, at least 1.
        seed: of the orders.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: as `matched_share`, or no shuffles.

    Example:
        >>> shuffled_share(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 5, 5]))
        0.5
    """
    if num_shuffles < 1:
        raise ValueError(f"expected num_shuffles >= 1; got {num_shuffles}")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(num_shuffles)]
    return sum(matched_share(groups, labels[order]) for order in orders) / num_shuffles
