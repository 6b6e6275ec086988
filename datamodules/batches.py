"""Tokenized examples, and which of them make the batch of a given number.

Kept apart from the data module because both are pure: the batch with number 17 of a client is computed, not
reached by having drawn the sixteen before it. That is what lets a run resume at any round on any process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elsa_pl.functional.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask``, perhaps ``token_type_ids`` [B, T], ``labels`` [B] or [B, T]; int64."""

Indices = npt.NDArray[np.int64]

IGNORE_INDEX: Final = -100
"""The label of padding in causal language modelling, which the loss leaves out."""


@dataclass(frozen=True)
class TokenizedExamples:
    """Token ids of some examples, ready to be padded into batches."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    labels: Indices | None
    """The class of each example; None for causal language modelling: the tokens are their own labels."""
    pad_id: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def lengths(self) -> Indices:
        """Return the number of tokens of each example."""
        return np.array([len(ids) for ids in self.input_ids], dtype=np.int64)

    def batch(self, rows: Sequence[int] | Indices) -> Batch:
        """Return the examples ``rows``, padded on the right to the longest of them."""
        ids = [self.input_ids[row] for row in rows]
        batch = {
            "input_ids": _pad(ids, self.pad_id),
            "attention_mask": _pad([[1] * len(tokens) for tokens in ids], 0),
        }
        if self.token_type_ids is not None:
            batch["token_type_ids"] = _pad([self.token_type_ids[row] for row in rows], 0)
        # By mask and not by token: many decoders pad with their end-of-text token, which is also a real one.
        batch["labels"] = (
            torch.from_numpy(self.labels[np.asarray(rows)])
            if self.labels is not None
            else batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
        )
        return batch


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    pairs: list[str] | None,
    labels: Indices | None,
    max_length: int,
    origin: str,
) -> TokenizedExamples:
    """Turn texts into token ids, cut to ``max_length``.

    Args:
        tokenizer: any Hugging Face tokenizer with a token to pad with.
        texts: one per example.
        pairs: the second texts of sentence pairs.
        labels: the class of each example; None for causal language modelling.
        max_length: tokens kept, special tokens included.
        origin: names the texts in errors, such as ``client-3``.

    Raises:
        ValueError: a text has no tokens, or only one in causal language modelling, so that nothing is
            predicted.
    """
    if not texts:
        return TokenizedExamples([], None, labels, 0)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False)
    input_ids: list[list[int]] = encoded["input_ids"]
    least = 2 if labels is None else 1
    for text, ids in zip(texts, input_ids, strict=True):
        if len(ids) < least:
            raise ValueError(
                f"expected at least {least} tokens in every text, got {len(ids)} for {text!r} of {origin}: "
                "lengthen or remove that row"
            )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TokenizedExamples(input_ids, encoded.get("token_type_ids"), labels, pad_id)


class BatchOrder:
    """The endless sequence of a client's batches: one permutation of its examples after another.

    A batch may take the end of one pass and the beginning of the next. The examples that it already has from
    the end are then put behind the beginning, so that none is in a batch twice. A client with fewer examples
    than ``batch_size`` has batches of all its examples.

    Args:
        num_examples: of the client, >= 1.
        batch_size: >= 1.
        seed: of the run.
        client: its name; the order depends on it.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, client: str) -> None:
        self._num_examples = num_examples
        self._batch_size = min(batch_size, num_examples)
        self._seed = seed
        self._client = client
        self._last: tuple[int, Indices] | None = None

    def rows(self, index: int) -> Indices:
        """Return the examples of the batch with number ``index``, counted from 0 over the whole run."""
        number, offset = divmod(index * self._batch_size, self._num_examples)
        rows = self._pass(number)[offset : offset + self._batch_size]
        missing = self._batch_size - len(rows)
        return np.concatenate([rows, self._pass(number + 1)[:missing]]) if missing else rows

    def _pass(self, number: int) -> Indices:
        """Return the order of the examples in pass ``number``; it may depend on the pass before."""
        if self._last is None or self._last[0] > number:
            # A pass that begins with a new batch depends on nothing; there is one in every ``cycle``.
            cycle = self._batch_size // math.gcd(self._num_examples, self._batch_size)
            first = number - number % cycle
            self._last = (first, self._permutation(first))
        while self._last[0] < number:
            current, previous = self._last[0] + 1, self._last[1]
            order = self._permutation(current)
            if begun := current * self._num_examples % self._batch_size:
                fresh = ~np.isin(order, previous[-begun:])
                head = order[fresh][: self._batch_size - begun]
                order = np.concatenate([head, order[~np.isin(order, head)]])
            self._last = (current, order)
        return self._last[1]

    def _permutation(self, number: int) -> Indices:
        seed = derive_seed(self._seed, "batches", self._client, number)
        return np.random.default_rng(seed).permutation(self._num_examples)


def _pad(rows: list[list[int]], value: int) -> Tensor:
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)
