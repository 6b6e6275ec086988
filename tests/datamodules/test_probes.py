"""Probe texts: public, the same everywhere, without labels, and refused where they might be private."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elsa_pl.datamodules import FederatedTextDataModule
from elsa_pl.datamodules.batches import Batch
from elsa_pl.datamodules.probes import set_probes_aside
from tests.datamodules.words import first_words, make, write_csv


def in_order(batches: Sequence[Batch]) -> list[int]:
    """The first word of each probe, in the order of the probes."""
    words = {
        int(row): word
        for batch in batches
        for row, word in zip(batch["rows"].tolist(), first_words(batch), strict=True)
    }
    assert sorted(words) == list(range(len(words)))
    return [words[row] for row in range(len(words))]


@pytest.fixture
def probe_file(tmp_path: Path) -> str:
    return write_csv(tmp_path / "probes.csv", ["text"], [(f"w{500 + i} " + "w1 " * (i * 7 % 4),) for i in range(20)])


def everything(data: FederatedTextDataModule) -> list[int]:
    """The first words of all training, validation and probe texts."""
    words = [word for batch in data.eval_batches("validation") for word in first_words(batch)]
    for client, size in data.client_sizes.items():
        words += [word for index in range(size) for word in first_words(data.train_batch(client, index))]
    return words + in_order(data.probe_batches())


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("partition", ["iid", "dirichlet", "sources"])
def test_probes_are_taken_out_of_the_training_texts(train_file: str, partition: str) -> None:
    data = make(train_file, num_probes=12, batch_size=1, partition=partition, num_groups=2)
    assert data.split_sizes == {"train": 78, "validation": 10}
    assert sum(data.client_sizes.values()) == 78
    probes = in_order(data.probe_batches())
    assert len(probes) == 12
    assert np.bincount([word % 3 for word in probes]).tolist() == [4, 4, 4]
    assert sorted(everything(data)) == list(range(100))


@pytest.mark.usefixtures("words")
def test_probes_leave_the_validation_rows_as_they_were_and_none_are_taken_unasked(train_file: str) -> None:
    plain, probed = make(train_file), make(train_file, num_probes=10)
    assert [first_words(batch) for batch in plain.eval_batches("validation")] == [
        first_words(batch) for batch in probed.eval_batches("validation")
    ]
    with pytest.raises(ValueError, match=r"probe texts, got none: set data\.num_probes \(such as 128\) or data\.probe"):
        plain.probe_batches()


@pytest.mark.usefixtures("words")
def test_probe_batches_have_no_labels_and_know_their_order(train_file: str, probe_file: str) -> None:
    data = make(train_file, probe_file=probe_file)
    assert in_order(data.probe_batches()) == list(range(500, 520))
    batches = data.probe_batches(6)
    assert [len(batch["rows"]) for batch in batches] == [6, 6, 6, 2]
    assert all(set(batch) == {"input_ids", "attention_mask", "token_type_ids", "rows"} for batch in batches)
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert in_order(batches) == list(range(500, 520))
    assert all(batch["rows"].dtype == torch.int64 for batch in batches)
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        data.probe_batches(0)


@pytest.mark.usefixtures("words")
def test_every_process_has_the_same_probes(train_file: str, probe_file: str) -> None:
    for settings in ({"num_probes": 9}, {"probe_file": probe_file}):
        once, again = (make(train_file, **settings).probe_batches(4) for _ in range(2))
        for one, other in zip(once, again, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    others = in_order(make(train_file, num_probes=9, seed=1).probe_batches())
    assert others != in_order(make(train_file, num_probes=9).probe_batches())


@pytest.mark.usefixtures("words")
def test_an_edge_without_data_reads_the_probe_file_only(tmp_path: Path, probe_file: str) -> None:
    nowhere = str(tmp_path / "not-here.csv")
    edge = FederatedTextDataModule(train_file=nowhere, tokenizer="words", probe_file=probe_file, num_probes=5)
    assert in_order(edge.probe_batches()) == [500, 501, 502, 503, 504]
    edge = FederatedTextDataModule(train_file=nowhere, tokenizer="words", num_probes=5)
    with pytest.raises(
        RuntimeError, match=r"call load\(\) first, or set data\.probe_file, which a process without data"
    ):
        edge.probe_batches()


@pytest.mark.usefixtures("words")
def test_a_site_keeps_its_training_texts_and_needs_a_probe_file(train_file: str, probe_file: str) -> None:
    labels = ["a", "b", "c"]
    data = FederatedTextDataModule(train_file=train_file, tokenizer="words", labels=labels, num_probes=8)
    with pytest.raises(
        ValueError, match=r"num_probes=8 alone at oslo: its training texts are private; set data\.probe"
    ):
        data.load("oslo")
    data = FederatedTextDataModule(train_file=train_file, tokenizer="words", labels=labels)
    data.load("oslo")
    with pytest.raises(ValueError, match=r"probe texts, got none: set data\.probe_file$"):
        data.probe_batches()
    settings: dict[str, Any] = {"labels": labels, "probe_file": probe_file, "num_probes": 8}
    data = FederatedTextDataModule(train_file=train_file, tokenizer="words", **settings)
    data.load("oslo")
    assert data.client_sizes == {"oslo": 90}
    assert in_order(data.probe_batches()) == list(range(500, 508))


@pytest.mark.usefixtures("words")
def test_pairs_and_language_models_have_probes_too(tmp_path: Path) -> None:
    rows = [(f"w{i}", f"w{i} w9", i % 2) for i in range(20)]
    file = write_csv(tmp_path / "t.csv", ["text", "text_pair", "label"], rows)
    probes = write_csv(tmp_path / "p.csv", ["text_pair", "text"], [("w8 w9", "w7")] * 3)
    (batch,) = make(file, text_pair_column="text_pair", probe_file=probes, num_clients=1).probe_batches()
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 1]
    file = write_csv(tmp_path / "l.csv", ["text"], [(f"w{i} " * (1 + i % 7),) for i in range(40)])
    batches = make(file, task="causal_lm", partition="iid", num_probes=6).probe_batches()
    assert len(in_order(batches)) == 6
    for batch in batches:
        padding = batch["attention_mask"] == 0
        assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])


@pytest.mark.usefixtures("words")
def test_owners_keep_a_row_each(tmp_path: Path) -> None:
    rows = [(f"w{i}", "ab"[i % 2], "small" if i < 2 else "large") for i in range(40)]
    file = write_csv(tmp_path / "t.csv", ["text", "label", "site"], rows)
    data = make(file, partition="column", client_column="site", validation_fraction=0.0, num_probes=38)
    assert data.client_sizes == {"large": 1, "small": 1}
    with pytest.raises(ValueError, match=r"num_probes <= 38, .* got 39 with 40 rows"):
        make(file, partition="column", client_column="site", validation_fraction=0.0, num_probes=39)


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        (["text", "label"], {}, r"probe file with private columns: .*only text in .*got also label: remove"),
        (["text", "site", "label"], {}, r"got also site, label: remove them from the file"),
        (["text", "text_pair"], {}, r"got also text_pair"),
        (["text", "label"], {"label_column": "text_label"}, r"got also label"),
        (["sentence"], {}, r"expected a column 'text' in probe_file .*got sentence"),
        (["text"], {"num_probes": 4}, r"at least num_probes=4 rows in probe_file .*got 3: lower data\.num_probes"),
    ],
)
def test_a_bad_probe_file_is_refused_when_the_data_is_loaded(
    tmp_path: Path, header: list[str], settings: dict[str, Any], message: str
) -> None:
    names = ["text", settings.get("label_column", "label")]
    train = write_csv(tmp_path / "train.csv", names, [(f"w{i}", i % 2) for i in range(30)])
    probes = write_csv(tmp_path / "probes.csv", header, [["w1"] * len(header)] * 3)
    with pytest.raises(ValueError, match=message):
        make(train, probe_file=probes, **settings)


@pytest.mark.usefixtures("words")
def test_too_many_probes_and_missing_files_are_refused(train_file: str) -> None:
    with pytest.raises(ValueError, match=r"num_probes <= 87, .* got 88 with 90 rows: lower data\.num_probes, set data"):
        make(train_file, num_probes=88)
    with pytest.raises(ValueError, match="examples for each of 4 clients, got 3 in all"):
        make(train_file, num_probes=87, partition="iid")
    with pytest.raises(ValueError, match="num_probes >= 0, got -1"):
        FederatedTextDataModule(train_file=train_file, num_probes=-1)
    with pytest.raises(FileNotFoundError, match="expected probe_file to exist, got nowhere"):
        make(train_file, probe_file="nowhere.csv")


@pytest.mark.parametrize("num_probes", [1, 7, 50, 90])
def test_probes_are_proportional_to_strata_and_exactly_as_many(num_probes: int) -> None:
    strata = np.repeat(["a", "b", "c", "d"], [50, 30, 15, 1])
    kept, probes = set_probes_aside(strata, num_probes, np.random.default_rng(0))
    assert len(probes) == num_probes
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, probes])), np.arange(96))
    for name, total in (("a", 50), ("b", 30), ("c", 15), ("d", 1)):
        taken = int((strata[probes] == name).sum())
        assert taken < total
        assert abs(taken - num_probes * total / 96) <= 1.5
    again = set_probes_aside(strata, num_probes, np.random.default_rng(0))[1]
    assert np.array_equal(probes, again)


def test_of_equal_strata_none_is_preferred() -> None:
    strata = np.arange(40) // 2
    counts = sum(
        np.bincount(strata[set_probes_aside(strata, 5, np.random.default_rng(seed))[1]], minlength=20)
        for seed in range(200)
    )
    assert np.asarray(counts).min() > 20
