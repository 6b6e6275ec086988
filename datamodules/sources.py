"""Read the train, validation and test rows of a data set, wherever they are, into one shape.

After this file nobody needs to know where the rows came from: every split is a ``datasets.Dataset`` in memory
with the columns ``text`` and, where asked for, ``text_pair``, ``label`` and ``client``, all strings without
gaps. Local files are parsed into memory and never pass through the Hugging Face cache: several processes of
one machine read the same file at the same moment, perhaps with a home folder that cannot be written to.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, get_args

import numpy as np
import numpy.typing as npt

from elsa_pl.datamodules import helpdesk

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

BUNDLED: Final[dict[str, Callable[[helpdesk.Split], tuple[list[str], list[str]]]]] = {
    "bundled:helpdesk": helpdesk.generate
}
EXTENSIONS: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_HUB_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a source are read; None leaves one out."""

    text: str = "text"
    text_pair: str | None = None
    label: str | None = "label"
    """The label; left out of the result if the column is absent and ``label_required`` is False."""
    client: str | None = None
    """The owner of a row, in the training split only."""
    label_required: bool = True


@dataclass(frozen=True)
class Source:
    """The rows of a data set in the shape that the module docstring describes."""

    train: "Dataset"
    validation: "Dataset | None"
    test: "Dataset | None"
    label_names: list[str] | None
    """The names of an integer ``ClassLabel`` column, in their order; None for any other column."""


@dataclass(frozen=True)
class Rows:
    """One split as plain lists, with its labels as class numbers."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str] | None
    codes: npt.NDArray[np.int64] | None
    """Class numbers; None for causal language modelling."""
    clients: list[str] | None

    @classmethod
    def of(cls, table: "Dataset", split: str, vocabulary: list[str] | None, *, given: bool) -> Self:
        """Take the columns of a table and look its labels up.

        Args:
            table: a split of a ``Source``.
            split: its name, for errors.
            vocabulary: all labels, in order of their class numbers; None if there are no classes.
            given: whether the vocabulary was configured (or found in the training rows), for errors.

        Raises:
            ValueError: a label is not in the vocabulary.
        """
        columns = {name: list(table[name]) for name in table.column_names}
        labels = columns.get("label")
        codes = None
        if vocabulary is not None and labels is not None:
            number_of = {label: number for number, label in enumerate(vocabulary)}
            for row, label in enumerate(labels, start=1):
                if label not in number_of:
                    origin = "data.labels has" if given else "the training rows have"
                    advice = "add it to data.labels" if given else "set data.labels"
                    raise ValueError(
                        f"expected the labels of {split} to be labels that {origin} "
                        f"({_shorten(vocabulary)}), got {label!r} in row {row}: remove the row, or {advice}"
                    )
            codes = np.array([number_of[label] for label in labels], dtype=np.int64)
        return cls(columns["text"], columns.get("text_pair"), labels, codes, columns.get("client"))

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """Return the given rows, in the given order."""

        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[row] for row in rows]

        return type(self)(
            texts=[self.texts[row] for row in rows],
            pairs=pick(self.pairs),
            labels=pick(self.labels),
            codes=None if self.codes is None else self.codes[rows],
            clients=pick(self.clients),
        )


def find_labels(labels: Iterable[str]) -> list[str]:
    """Return the different labels in order: whole numbers by value, anything else by the alphabet.

    Raises:
        ValueError: there are fewer than two.

    Example:
        >>> find_labels(["10", "9", "10"])
        ['9', '10']
    """
    found = set(labels)
    if len(found) < 2:
        raise ValueError(
            f"expected at least two different labels in the training rows, got {sorted(found)}: check label_column"
        )
    return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)


def load_source(
    *,
    columns: Columns,
    dataset: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
) -> Source:
    """Read a data set from files, from the project itself or from the hub.

    Args:
        columns: which columns to read.
        dataset: ``bundled:helpdesk``, or a hub id, optionally with a configuration: ``nyu-mll/glue:rte``.
        train_file: a local .csv, .tsv, .json, .jsonl or .parquet file, instead of ``dataset``. Quotes in a
            .tsv follow the rules of csv.
        validation_file: beside ``train_file``.
        test_file: beside ``train_file``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a name, an extension, a column or a cell is not what it must be.
    """
    if train_file is not None:
        files = {"train": train_file, "validation": validation_file, "test": test_file}
        for split, file in files.items():  # all of them, before any is read
            if file is not None:
                _check_file(split, file)
        tables = {split: _read_file(file) for split, file in files.items() if file is not None}
        origins = {split: f"{split}_file {file}" for split, file in files.items()}
    elif dataset is not None and dataset.startswith("bundled:"):
        tables = _read_bundled(dataset)
        origins = {split: f"{dataset} ({split})" for split in tables}
    elif dataset is not None:
        tables = _read_hub(dataset)
        origins = {split: f"{dataset} ({split})" for split in tables}
        if "test" in tables and _labels_are_secret(tables["test"], columns.label):
            logger.warning("%s keeps its test labels secret: its test split is left out", dataset)
            del tables["test"]
    else:
        raise ValueError("expected dataset or train_file, got neither: give one of them")
    rows = {split: _normalise(table, origins[split], columns, split) for split, table in tables.items()}
    return Source(rows["train"], rows.get("validation"), rows.get("test"), _class_names(tables["train"], columns.label))


def load_rows(split: str, file: str, columns: Columns, *, private: bool = True) -> "Dataset":
    """Read one file that is not part of a `Source`.

    Args:
        split: what it is for; ``<split>_file`` is its name in errors.
        file: as in `load_source`.
        columns: which columns to read.
        private: whether the file may have other columns too, which are not read.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: an extension, a column or a cell is not what it must be, or there are columns that must not be.
    """
    _check_file(split, file)
    table = _read_file(file)
    rows = _normalise(table, f"{split}_file {file}", columns, split)
    allowed = [name for name in (columns.text, columns.text_pair, columns.label, columns.client) if name is not None]
    others = [name for name in table.column_names if name not in allowed]
    if others and not private:
        raise ValueError(
            f"{split} file with private columns: expected only {', '.join(allowed)} in {split}_file {file}, which "
            f"everybody sees, got also {', '.join(others)}: remove them from the file"
        )
    return rows


def _check_file(split: str, file: str) -> None:
    path = Path(file)
    if path.suffix.lower() not in EXTENSIONS:
        raise ValueError(
            f"expected {split}_file to end in one of {', '.join(EXTENSIONS)}, got {file}: convert or rename it"
        )
    if not path.is_file():
        folder = path.parent
        there = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS) if folder.is_dir() else []
        advice = f"there are {', '.join(there[:8])}" if there else "check the path"
        if not folder.is_dir():
            advice = f"the folder {folder.resolve()} does not exist either, check the path"
        raise FileNotFoundError(f"expected {split}_file to exist, got {file} ({path.resolve()}): {advice}")


def _read_file(file: str) -> "Dataset":
    from datasets import Dataset

    suffix = Path(file).suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        return Dataset(pyarrow.parquet.read_table(file))
    if suffix in (".json", ".jsonl"):
        return Dataset.from_list(_read_json(file))
    import pandas

    try:
        # Strings throughout and only the empty cell is empty: the label "NA" and the text "null" are words.
        table = pandas.read_csv(
            file,
            sep="\t" if suffix == ".tsv" else ",",
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
        )
    except pandas.errors.EmptyDataError:
        raise ValueError(f"expected a header and rows, got the empty file {file}: give a file with data") from None
    except (pandas.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(
            f"expected {suffix[1:]} in UTF-8 with equally many cells in every row, got {file} ({error}): repair it"
        ) from error
    return Dataset.from_dict({str(name): table[name].tolist() for name in table.columns})


def _read_json(file: str) -> list[dict[str, Any]]:
    """Read a list of objects, or one object per line, whatever the extension says."""
    content = Path(file).read_text(encoding="utf-8-sig").strip()
    if not content:
        raise ValueError(f"expected JSON rows, got the empty file {file}: give a file with data")
    if content.startswith("["):
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected a JSON list of objects, got {file} ({error}): repair it") from error
    else:
        rows = []
        for number, line in enumerate(content.split("\n"), start=1):
            try:
                if line.strip():
                    rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"expected one JSON object per line, got {file} line {number} ({error}): repair the line"
                ) from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"expected a JSON object with the columns as keys, got {type(row).__name__} in {file} "
                f"row {number}: "
                'write {"text": ..., "label": ...}'
            )
    # Every row gets every key (a gap is reported later with its row), and one type per column: strings.
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: _as_text(row.get(name)) for name in names} for row in rows]


def _as_text(value: object) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _read_bundled(name: str) -> "dict[str, Dataset]":
    from datasets import Dataset

    if name not in BUNDLED:
        raise ValueError(f"expected dataset to be one of {', '.join(BUNDLED)} or a hub id, got {name}: correct it")
    tables = {}
    for split in get_args(helpdesk.Split):
        texts, labels = BUNDLED[name](split)
        tables[split] = Dataset.from_dict({"text": texts, "label": labels})
    return tables


def _read_hub(name: str) -> "dict[str, Dataset]":
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        found = load_dataset(path, config or None)
    except Exception as error:  # the hub's errors have many types; all of them need the same advice
        raise ValueError(
            f"expected a data set on the Hugging Face hub, got {name} ({type(error).__name__}: {error}): "
            "check the name and the network (and that HF_HOME can be written to), or use train_file, or "
            "dataset=bundled:helpdesk"
        ) from error
    tables = {}
    for split, candidates in _HUB_NAMES.items():
        match = next((candidate for candidate in candidates if candidate in found), None)
        if match is not None:
            tables[split] = found[match]
    if "train" not in tables:
        raise ValueError(f"expected a split 'train' in {name}, got {', '.join(map(str, found))}: use train_file")
    return tables


def _class_names(table: "Dataset", label: str | None) -> list[str] | None:
    from datasets import ClassLabel

    feature = table.features.get(label) if label is not None else None
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _labels_are_secret(table: "Dataset", label: str | None) -> bool:
    return _class_names(table, label) is not None and set(table[label]) == {-1}


def _normalise(table: "Dataset", origin: str, columns: Columns, split: str) -> "Dataset":
    """Pick, rename and check the wanted columns."""
    from datasets import Dataset

    if not len(table):
        raise ValueError(f"expected rows, got none in {origin}: give a file with data")
    wanted = {"text": columns.text, "text_pair": columns.text_pair, "label": columns.label}
    if split == "train":
        wanted["client"] = columns.client
    if columns.label not in table.column_names and not columns.label_required:
        wanted["label"] = None
    if columns.text_pair is None and "text_pair" in table.column_names and split == "train":
        logger.warning("%s has a column text_pair that is not used: set text_pair_column=text_pair", origin)
    result = {}
    for role, name in wanted.items():
        if name is None:
            continue
        if name not in table.column_names:
            raise ValueError(
                f"expected a column {name!r} in {origin}, got {', '.join(table.column_names)}: set "
                f"{role}_column to the one that is meant"
            )
        result[role] = _cells(table, name, origin)
    return Dataset.from_dict(result)


def _cells(table: "Dataset", name: str, origin: str) -> list[str]:
    names = _class_names(table, name)
    cells = []
    for number, value in enumerate(table[name], start=1):
        if names is not None and value is not None:
            value = names[value] if value >= 0 else None  # -1 stands for a label that is kept secret
        text = "" if value is None or value != value else str(value)  # NaN differs from itself
        if not text.strip():
            raise ValueError(
                f"expected a value in column {name!r} of every row, got an empty cell in {origin}, row "
                f"{number} (counted from 1 without the header): fill it or remove the row"
            )
        cells.append(text)
    return cells


def _shorten(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
