"""The order of a client's batches is computed, complete and free of repetitions."""

import numpy as np
import pytest
import torch

from elsa_pl.datamodules.batches import BatchOrder, Indices, TokenizedExamples


def lengths(num_examples: int) -> Indices:
    """Token counts of so many texts, few of them alike."""
    return np.random.default_rng(0).integers(3, 60, num_examples)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(12, 4), (10, 4), (7, 5), (5, 4), (3, 8), (1, 1), (31, 16)])
def test_every_pass_holds_every_example_once_and_no_batch_holds_one_twice(num_examples: int, batch_size: int) -> None:
    order = BatchOrder(lengths(num_examples), batch_size, 0, "client-0")
    size = min(batch_size, num_examples)
    batches = [order.rows(index) for index in range(6 * num_examples)]
    assert all(len(set(batch.tolist())) == size for batch in batches)
    stream = np.concatenate(batches)
    for first in range(0, len(stream) - num_examples + 1, num_examples):
        assert sorted(stream[first : first + num_examples].tolist()) == list(range(num_examples))


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    walked = BatchOrder(lengths(13), 5, 1, "a")
    batches = [walked.rows(index).tolist() for index in range(60)]
    for index in (59, 3, 41, 0, 40):
        assert BatchOrder(lengths(13), 5, 1, "a").rows(index).tolist() == batches[index]
        assert walked.rows(index).tolist() == batches[index]


def test_order_depends_on_seed_client_and_pass() -> None:
    first = BatchOrder(lengths(50), 50, 0, "a").rows(0).tolist()
    others = [
        BatchOrder(lengths(50), 50, 1, "a").rows(0),
        BatchOrder(lengths(50), 50, 0, "b").rows(0),
        BatchOrder(lengths(50), 50, 0, "a").rows(1),
    ]
    assert all(other.tolist() != first for other in others)


@pytest.mark.parametrize("num_examples", [256, 250, 1000])
def test_batches_hold_texts_of_like_length(num_examples: int) -> None:
    """Padding is a small part of what is computed, in the second pass too, and batches are not those of the first."""
    order, tokens = BatchOrder(lengths(num_examples), 16, 0, "a"), lengths(num_examples)
    per_pass = num_examples // 16
    batches = [tokens[order.rows(index)] for index in range(2 * per_pass)]
    padded = sum(len(batch) * batch.max() for batch in batches)
    assert sum(batch.sum() for batch in batches) > 0.85 * padded
    longest = [batch.max() for batch in batches]
    assert longest != sorted(longest)
    first = {tuple(sorted(order.rows(index))) for index in range(per_pass)}
    assert not first & {tuple(sorted(order.rows(per_pass + index))) for index in range(per_pass)}


def test_padding_is_on_the_right_and_left_out_of_the_loss() -> None:
    examples = TokenizedExamples([[5, 6, 7], [8, 2], [2, 2, 2, 2]], None, None, pad_id=2)
    batch = examples.batch([1, 0])
    assert batch["input_ids"].tolist() == [[8, 2, 2], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    # The real end-of-text token counts although padding has the same number.
    assert batch["labels"].tolist() == [[8, 2, -100], [5, 6, 7]]
    assert all(value.dtype == torch.int64 for value in batch.values())
