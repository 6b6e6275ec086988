"""The bundled set is repeatable, balanced, and its test wordings are new."""

import re
from itertools import combinations

import pytest

from elsa_pl.datamodules.helpdesk import LABELS, SIZES, SPLITS, Split, generate, wordings


def words(wording: str) -> tuple[str, ...]:
    """The wording without slots and punctuation."""
    return tuple(re.findall(r"[a-z0-9']+", re.sub(r"\{\w+\}", "", wording).lower()))


def runs(wording: str, length: int) -> set[tuple[str, ...]]:
    tokens = words(wording)
    return {tokens[i : i + length] for i in range(len(tokens) - length + 1)}


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_no_wording_is_in_two_splits(one: Split, other: Split) -> None:
    first, second = ({words(w) for group in wordings(split).values() for w in group} for split in (one, other))
    assert not first & second


def test_no_test_problem_repeats_a_long_stretch_of_a_training_problem() -> None:
    problems = {
        split: [w for role, group in wordings(split).items() if role.startswith("problem/") for w in group]
        for split in ("train", "test")
    }
    shared = set().union(*(runs(w, 6) for w in problems["train"])) & set().union(
        *(runs(w, 6) for w in problems["test"])
    )
    assert not shared


def test_no_test_text_contains_a_training_problem() -> None:
    texts = [words(text) for text in generate("test")[0]]
    joined = [" ".join(text) for text in texts]
    for role, group in wordings("train").items():
        for wording in group:
            # The stretches between slots, unless they are too short to carry meaning.
            for stretch in re.split(r"\{\w+\}", wording):
                key = " ".join(words(stretch))
                if role.startswith("problem/") and len(key.split()) >= 6:
                    assert not any(key in text for text in joined), key


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_distinct_balanced_short_and_filled(split: Split) -> None:
    texts, labels = generate(split)
    assert len(texts) == len(labels) == len(set(texts)) == SIZES[split]
    assert {labels.count(label) for label in LABELS} == {SIZES[split] // len(LABELS)}
    assert not any(re.search(r"[{}|]|  |---", text) for text in texts)
    assert max(len(text.split()) for text in texts) < 64


def test_a_seed_repeats_and_seeds_differ() -> None:
    assert generate("test", 50) == generate("test", 50)
    assert generate("test", 50) != generate("test", 50, seed=1)
    assert generate("test", 50)[0] != generate("train", 50)[0]


def test_one_message_in_seven_mentions_another_topic() -> None:
    bank = wordings("test")
    texts, labels = generate("test")
    mentions = {label: [words(w.split("{")[0]) for w in bank[f"mention/{label}"]] for label in LABELS}
    distracted = sum(
        any(" ".join(m) in " ".join(words(text)) for other in LABELS if other != label for m in mentions[other])
        for text, label in zip(texts, labels, strict=True)
    )
    assert 0.1 < distracted / len(texts) < 0.2
