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

from elsa_pl.functional.microbatches import IGNORE_INDEX
from elsa_pl.functional.seeding import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask``, perhaps ``token_type_ids`` [B, T], ``labels`` [B] or [B, T]; int64."""

Indices = npt.NDArray[np.int64]

_BATCHES_SORTED_TOGETHER: Final = 8


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

    Texts of like length come together, so that little is spent on padding: of each stretch of the permutation that
    is some batches long, the examples are sorted by length, and the batches that this gives are shuffled.

    A batch may take the end of one pass and the beginning of the next. The examples that it already has from
    the end are then put behind the beginning, so that none is in a batch twice. A client with fewer examples
    than ``batch_size`` has batches of all its examples.

    Args:
        lengths: tokens of each of the client's examples.
        batch_size: >= 1.
        seed: of the run.
        client: its name; the order depends on it.
    """

    def __init__(self, lengths: Indices, batch_size: int, seed: int, client: str) -> None:
        self._lengths = lengths
        self._num_examples = len(lengths)
        self._batch_size = min(batch_size, len(lengths))
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
            self._last = (first, self._group(*self._permutation(first)))
        while self._last[0] < number:
            current, previous = self._last[0] + 1, self._last[1]
            order, draws = self._permutation(current)
            head = order[:0]
            if begun := current * self._num_examples % self._batch_size:
                fresh = ~np.isin(order, previous[-begun:])
                head = order[fresh][: self._batch_size - begun]
                order = order[~np.isin(order, head)]
            self._last = (current, np.concatenate([head, self._group(order, draws)]))
        return self._last[1]

    def _permutation(self, number: int) -> tuple[Indices, np.random.Generator]:
        draws = np.random.default_rng(derive_seed(self._seed, "batches", self._client, number))
        return draws.permutation(self._num_examples), draws

    def _group(self, order: Indices, draws: np.random.Generator) -> Indices:
        """Bring examples of like length together, in whole batches; the rest of the pass stays at its end."""
        whole = len(order) - len(order) % self._batch_size
        # at least two stretches, since one that is the whole pass would give the same batches every time
        stretch = self._batch_size * max(1, min(_BATCHES_SORTED_TOGETHER, len(order) // self._batch_size // 2))
        batches: list[Indices] = []
        for start in range(0, whole, stretch):
            part = order[start : min(start + stretch, whole)]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += np.split(part, len(part) // self._batch_size)
        return np.concatenate([*(batches[index] for index in draws.permutation(len(batches))), order[whole:]])


def by_length(tokens: TokenizedExamples, batch_size: int) -> list[Indices]:
    """Return all examples as the rows of batches, shortest examples first: little is spent on padding."""
    order = np.argsort(tokens.lengths(), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _pad(rows: list[list[int]], value: int) -> Tensor:
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)
