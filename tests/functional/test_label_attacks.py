"""Planted labels are found where they show, and nowhere else."""

from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_pl.functional.label_attacks import label_clusters, matched_share, pool, shuffled_share
from elsa_pl.functional.recovery import majority_floor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 120, num_classes: int = 4) -> Tensor:
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(9))


def gradients(truth: Tensor, confidence: Tensor) -> Tensor:
    """Of the loss by the states before a linear head; logits lean to the truth by `confidence`."""
    states, head = draw(len(truth), 16).requires_grad_(), draw(16, 4, seed=1)
    leaning = confidence[:, None] * F.one_hot(truth, 4)
    F.cross_entropy(0.1 * states @ head + leaning, truth).backward()
    assert states.grad is not None
    return states.grad


def test_pooling_against_the_slow_loop() -> None:
    states, mask = draw(3, 4, 2), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    states[mask == 0] = float("nan")
    for b, count in enumerate((4, 1, 2)):
        expected = sum(states[b, t] for t in range(count)) / count
        torch.testing.assert_close(pool(states, mask)[b], expected)
    assert torch.equal(pool(states, mask.bool()), pool(states, mask))
    assert pool(states.bfloat16(), mask).dtype == torch.float32


def test_planted_groups_are_found() -> None:
    truth = labels()
    observed = 3 * draw(4, 8, seed=1)[truth] + draw(120, 8)
    assert matched_share(label_clusters(observed, 4), truth) > 0.95
    assert torch.equal(label_clusters(observed, 4), label_clusters(observed, 4))


def test_noise_has_no_labels() -> None:
    truth = labels()
    assert matched_share(label_clusters(draw(120, 8), 4), truth) < majority_floor(truth) + 0.15


def test_gradients_give_labels_away_from_the_first_step() -> None:
    truth = labels()
    found = label_clusters(gradients(truth, torch.zeros(120)), 4, by="direction")
    assert matched_share(found, truth) > 0.95


def test_directions_do_not_fade_as_the_model_gets_surer() -> None:
    """Half of the examples are learnt by heart: by distance their tiny gradients are one group."""
    truth = labels()
    observed = gradients(truth, torch.where(torch.arange(120) % 2 == 0, 12.0, 0.0))
    by_direction = matched_share(label_clusters(observed, 4, by="direction"), truth)
    assert by_direction > 0.95
    assert matched_share(label_clusters(observed, 4), truth) < 0.8
    tiny = label_clusters(observed.double() * 1e-30, 4, by="direction")
    assert matched_share(tiny, truth) == by_direction


def test_examples_without_gradient_are_allowed() -> None:
    observed = gradients(labels(), torch.zeros(120))
    observed[5:9] = 0
    assert label_clusters(observed, 4, by="direction").shape == (120,)


def test_matching_against_all_permutations() -> None:
    groups, truth = labels(30), (labels(30) * 7 + (draw(30) > 0.5)) % 4
    best = max(
        sum(order[int(group)] == int(label) for group, label in zip(groups, truth, strict=True)) / 30
        for order in permutations(range(4))
    )
    assert matched_share(groups, truth) == pytest.approx(best)
    assert matched_share((groups + 1) % 4 * 100, truth * 5) == pytest.approx(best), "numbers mean nothing"


def test_more_groups_than_labels_and_fewer() -> None:
    assert matched_share(torch.tensor([0, 1, 2, 3]), torch.tensor([7, 7, 8, 8])) == 0.5
    assert matched_share(torch.tensor([0, 0, 0, 0]), torch.tensor([7, 7, 7, 8])) == 0.75


def test_bad_input() -> None:
    observed = draw(6, 3)
    with pytest.raises(ValueError, match=r"observations \[B, K\], .*got torch.float32 \[6\]: pool\(\) the tokens"):
        label_clusters(observed[:, 0], 2)
    with pytest.raises(ValueError, match=r"at least one; got torch.float32 \[0, 3\]"):
        label_clusters(observed[:0], 2)
    with pytest.raises(ValueError, match="finite observations; got nan or inf in 6 of 6: leave these out"):
        label_clusters(observed / 0, 2)
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"1 <= num_classes <= 6, .*got {count} and 10: observe more"):
            label_clusters(observed, count)
    unknown: Any = "cosine"
    with pytest.raises(ValueError, match="by to be one of distance, direction; got 'cosine'"):
        label_clusters(observed, 2, by=unknown)
    with pytest.raises(ValueError, match=r"states \[B, T, K\] and their mask \[B, T\]; .* \[2, 3, 4\] and \[2, 4\]"):
        pool(draw(2, 3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="tokens in every example; got 1 of 2 without: leave them out"):
        pool(draw(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="a group for each of 3 labels; got 2"):
        matched_share(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"labels as whole numbers, .*got torch.float32"):
        matched_share(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"groups as whole numbers, .*at least one; got torch.int64"):
        matched_share(torch.tensor([], dtype=torch.long), torch.tensor([0]))


def test_shuffled_labels_are_matched_by_chance() -> None:
    """The mean over orders, with groups as good as they can be; a label that most have is matched by most anyway."""
    labels = torch.tensor([0, 1, 2, 3]).repeat(25)
    assert matched_share(labels, labels) == 1
    assert 0.25 < shuffled_share(labels, labels) < 0.4
    assert shuffled_share(labels, torch.zeros(100, dtype=torch.long)) == 0.25
    with pytest.raises(ValueError, match="num_shuffles >= 1"):
        shuffled_share(labels, labels, num_shuffles=0)
