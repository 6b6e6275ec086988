"""A text classification set written for this project: short helpdesk messages in ten topics.

A first run, a tutorial and a test need text that is there without a download. A set made from templates
usually measures nothing, because its test set repeats the sentences of its training set. Here each split has
wordings of its own for everything that carries meaning: the problem, the distracting mention of another
topic, the context, the opening and the closing. Only names, days and numbers are shared. The distractions are
deliberate: one message in seven mentions another topic, so counting key words is not enough.
"""

from typing import Final, Literal

import numpy as np

from elsa_pl.datamodules.helpdesk_wordings import (
    CLOSINGS,
    CONTEXTS,
    FRAMES,
    MENTIONS,
    OPENINGS,
    PROBLEMS,
    SLOTS,
)
from elsa_pl.functional.seeding import derive_seed

Split = Literal["train", "validation", "test"]

SPLITS: Final[tuple[Split, ...]] = ("train", "validation", "test")
SIZES: Final[dict[Split, int]] = {"train": 3600, "validation": 400, "test": 800}

LABELS: Final[tuple[str, ...]] = tuple(PROBLEMS)


def _group(block: str, split: Split) -> tuple[str, ...]:
    """Return the wordings of ``split`` in a block of three groups."""
    group = block.split("---")[SPLITS.index(split)]
    return tuple(" ".join(wording.split()) for wording in group.split("|"))


def wordings(split: Split) -> dict[str, tuple[str, ...]]:
    """Return every wording that ``split`` may use, by its role in a message.

    Args:
        split: "train", "validation" or "test". No two splits share a wording.

    Example:
        >>> "Cheers, {person}" in wordings("test")["closing"]
        True
    """
    bank = {f"problem/{label}": _group(block, split) for label, block in PROBLEMS.items()}
    bank |= {f"mention/{label}": _group(block, split) for label, block in MENTIONS.items()}
    shared = {"frame": FRAMES, "opening": OPENINGS, "context": CONTEXTS, "closing": CLOSINGS}
    return bank | {role: _group(block, split) for role, block in shared.items()}


def generate(split: Split, num_examples: int | None = None, seed: int = 0) -> tuple[list[str], list[str]]:
    """Write the messages of a split: equally many of each label, no text twice, the same for the same seed.

    Args:
        split: decides the wordings, see ``wordings``.
        num_examples: how many messages; default ``SIZES[split]``.
        seed: the bundled set is seed 0.

    Returns:
        Texts and labels, in the same random order.
    """
    generator = np.random.default_rng(derive_seed(seed, "helpdesk", split))
    bank = wordings(split)
    count = SIZES[split] if num_examples is None else num_examples
    labels = [LABELS[i % len(LABELS)] for i in generator.permutation(count)]
    seen: set[str] = set()
    texts = []
    for label in labels:
        text = _message(label, bank, generator)
        while text in seen:
            text = _message(label, bank, generator)
        seen.add(text)
        texts.append(text)
    return texts, labels


def _message(label: str, bank: dict[str, tuple[str, ...]], generator: np.random.Generator) -> str:
    def pick(role: str) -> str:
        return bank[role][generator.integers(len(bank[role]))]

    before: list[str] = []
    after: list[str] = []
    if generator.random() < 0.2:
        (before if generator.random() < 0.5 else after).append(pick("context"))
    if generator.random() < 0.15:
        other = LABELS[(LABELS.index(label) + int(generator.integers(1, len(LABELS)))) % len(LABELS)]
        remark = pick("frame").replace("{mention}", pick(f"mention/{other}"))
        (before if generator.random() < 0.4 else after).append(remark)
    problem = pick(f"problem/{label}") + ("." if generator.random() < 0.8 else "")
    greeting = [pick("opening")] if generator.random() < 0.3 else []
    parting = [pick("closing")] if generator.random() < 0.2 else []
    if before or not greeting:
        problem = problem if problem.startswith("{") else problem[0].upper() + problem[1:]
    text = " ".join([*greeting, *before, problem, *after, *parting])
    for slot, values in SLOTS.items():
        while f"{{{slot}}}" in text:
            text = text.replace(f"{{{slot}}}", values[generator.integers(len(values))], 1)
    return text if generator.random() < 0.85 else text.lower()
