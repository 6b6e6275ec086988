"""The same rows in every format, and an error with advice for everything that can be wrong with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from elsa_pl.datamodules.sources import Columns, find_labels, load_source

ROWS = {
    "text": ["NA", 'say "no", please', "a\tb", "two\nlines", "null", "ünïcode"],
    "label": ["None", "1", "None", "1", "None", "1"],
}


def write(folder: Path, name: str) -> str:
    path = folder / name
    table = pandas.DataFrame(ROWS)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_dict("records")))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table.to_dict("records")))
    else:
        table.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return str(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "A.CSV"])
def test_every_format_gives_the_same_rows_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    file = write(tmp_path, name)
    source = load_source(columns=Columns(), train_file=file, test_file=file)
    assert source.test is not None
    assert source.train.to_dict() == source.test.to_dict() == ROWS
    assert source.validation is None
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not source.train.cache_files


def test_columns_are_renamed_and_the_owner_is_read_from_training_rows_only(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("q,p,y,site\na,b,1,north\nc,d,2,south\n")
    test.write_text("q,p,y\ne,f,1\n")
    columns = Columns(text="q", text_pair="p", label="y", client="site")
    source = load_source(columns=columns, train_file=str(train), test_file=str(test))
    assert source.train.to_dict() == {
        "text": ["a", "c"],
        "text_pair": ["b", "d"],
        "label": ["1", "2"],
        "client": ["north", "south"],
    }
    assert source.test is not None
    assert source.test.column_names == ["text", "text_pair", "label"]


def test_class_labels_become_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features).to_parquet(str(tmp_path / "t.parquet"))
    source = load_source(columns=Columns(), train_file=str(tmp_path / "t.parquet"))
    assert source.train["label"][:] == ["ant", "zebra"]
    assert source.label_names == ["zebra", "ant"]


def test_a_pair_column_that_is_not_used_earns_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("text,text_pair,label\na,b,x\n")
    load_source(columns=Columns(), train_file=str(tmp_path / "t.csv"))
    assert "set text_pair_column=text_pair" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("t.txt", "a", ValueError, r"expected train_file to end in one of \.csv.*t\.txt"),
        ("t.csv", None, FileNotFoundError, r"got .*t\.csv.*: there are other\.csv"),
        ("no/t.csv", None, FileNotFoundError, "folder .*no does not exist"),
        ("t.csv", "", ValueError, "got the empty file"),
        ("t.csv", "text,label\n", ValueError, "expected rows, got none in train_file"),
        ("t.csv", "body,label\na,b\n", ValueError, r"a column 'text' in .*got body, label: set text_column"),
        ("t.csv", "text,topic\na,b\n", ValueError, "a column 'label' in .*set label_column"),
        ("t.csv", "text,label\na,b\n ,b\n", ValueError, "empty cell in .*row 2"),
        ("t.csv", "text,label\na,b\nc,\n", ValueError, "'label'.*row 2"),
        ("t.csv", "text,label\na,b\nc,d,e,f\n", ValueError, "equally many cells.*line 3"),
        ("t.jsonl", "", ValueError, "got the empty file"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": \n', ValueError, "line 2"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', ValueError, "'label'.*row 2"),
        ("t.json", '[{"text": "a", "label": null}]', ValueError, "'label'.*row 1"),
        ("t.json", '["a"]', ValueError, "got str in .*row 1"),
    ],
)
def test_bad_files_are_refused_with_advice(
    name: str, content: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("text,label\na,b\n")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        load_source(columns=Columns(), train_file=str(tmp_path / name))


def test_a_missing_test_file_is_found_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe broken")
    with pytest.raises(FileNotFoundError, match="test_file"):
        load_source(columns=Columns(), train_file=str(tmp_path / "t.csv"), test_file=str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="UTF-8"):
        load_source(columns=Columns(), train_file=str(tmp_path / "t.csv"))


def test_an_unknown_bundled_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="bundled:helpdesk or a hub id, got bundled:helpdsek"):
        load_source(columns=Columns(), dataset="bundled:helpdsek")


def test_without_the_hub_the_error_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"got owner/name \(ConnectionError: no route\).*dataset=bundled:helpdesk"):
        load_source(columns=Columns(), dataset="owner/name")


def test_hub_splits_are_matched_and_secret_test_labels_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})

    def make(labels: list[int]) -> Dataset:
        return Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)

    asked = []

    def fake(*args: object) -> dict[str, Dataset]:
        asked.append(args)
        return {"train": make([0, 1]), "dev": make([1, 0]), "test": make([-1, -1])}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    source = load_source(columns=Columns(), dataset="owner/name:part")
    assert asked == [("owner/name", "part")]
    assert source.validation is not None
    assert source.validation["label"][:] == ["yes", "no"]
    assert source.test is None
    assert "secret" in caplog.text


def test_numbers_are_sorted_as_numbers() -> None:
    assert find_labels(["10", "9", "0"]) == ["0", "9", "10"]
    assert find_labels(["10", "9", "x"]) == ["10", "9", "x"]
    with pytest.raises(ValueError, match="at least two different labels"):
        find_labels(["a", "a"])


def test_processes_read_one_file_at_once_with_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = write(tmp_path, "t.csv")
    code = (
        "import sys; from elsa_pl.datamodules.sources import *;"
        "print(len(load_source(columns=Columns(), train_file=sys.argv[1]).train))"
    )
    environment = os.environ | {"HF_HOME": "/dev/null/cache", "HF_DATASETS_CACHE": "/dev/null/cache"}
    running = [
        subprocess.Popen([sys.executable, "-c", code, file], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in running] == ["6", "6"]
