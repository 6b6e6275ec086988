"""Fixtures of the data module's tests."""

from pathlib import Path

import pytest

from elsa_pl import models
from tests.datamodules.words import WordTokenizer, write_csv


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(models, "load_tokenizer", lambda name: WordTokenizer())
    return "words"


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    """Row i has the word i, some padding words and one of three labels."""
    rows = [(f"w{i} " + "w1 " * (i % 5), "abc"[i % 3]) for i in range(100)]
    return write_csv(tmp_path / "train.csv", ["text", "label"], rows)
