"""A CSV or JSONL table: an image's path or a text on every row, and a label, labels or numbers that belong to it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pxcompress.checks import split_csv
from pxcompress.data.folder import HELD_OUT_FOLDERS, TRAIN_FOLDERS, Files
from pxcompress.data.samples import Layout, Samples, UserData
from pxcompress.data.targets import Targets, Values
from pxcompress.data.texts import label_column, read_classes, read_texts, text_columns
from pxcompress.errors import DataError, suggest_path, unknown

SUFFIXES = (".csv", ".jsonl")
_PATH_COLUMNS = ("path", "image", "file")
_LABELS, _SPLIT, _GROUP = "labels", "split", "group"
"""Columns with a meaning of their own, which are no numbers to learn.

"group" only says which images belong together.
"""

Row = Mapping[str, object]


@dataclass(frozen=True, eq=False)
class _Table:
    """The rows of the table `spec`, each a mapping from the columns `names` to cells."""

    spec: str
    rows: Sequence[Row]
    names: tuple[str, ...]

    def error(self, row: int, text: str) -> DataError:
        """A `DataError` about the row at index `row`; its message counts rows from 1."""
        return DataError(f"data {self.spec!r}, row {row + 1}: {text}")


def open_table(spec: str) -> UserData:
    """The texts or images that the table `spec` lists; paths are relative to it. Raises `DataError`."""
    table, root = _read_table(spec), Path(spec).expanduser().parent
    if columns := _text_columns(table):
        return _open_texts(table, columns)
    images = _image_paths(table, root)
    labels = np.zeros(len(images), dtype=np.int64)
    targets: Targets | None = None
    if _LABELS in table.names:
        layout: Layout = "labels"
        classes, values = _read_labels(table)
        targets = Values(values)
    elif column := _class_column(table):
        layout = "classes"
        classes, labels = read_classes(table.spec, table.rows, column)
    else:
        layout = "numbers"
        classes, values = _read_numbers(table, (_path_column(table),))
        targets = Values(values)
    train, held_out = _separate_splits(table, Samples.of(images, labels, Files(root, images), targets))
    notes = tuple(_note_whole_numbers(table, classes)) if layout == "numbers" else ()
    return UserData(classes, train, held_out, notes, layout=layout, outputs=len(classes))


def _read_table(spec: str) -> _Table:
    """Read the rows of a CSV or JSONL file. Raises `DataError` for a file without rows or of another kind."""
    path = Path(spec).expanduser()
    try:
        rows = (_read_csv if path.suffix.lower() == ".csv" else _read_jsonl)(spec, path)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(
            f"data {spec!r} cannot be read ({error}); expected a CSV or JSONL file in UTF-8{suggest_path(path)}"
        ) from error
    if not rows:
        raise DataError(f"data {spec!r} is empty; expected rows with an image's path or a text, and its targets")
    return _Table(spec, rows, tuple(rows[0]))


def read_words(spec: str, column: str) -> dict[str, str]:
    """Sample id -> the cell in a `column` of the table `spec`.

    Ids are paths of images as written in the table, or rows of texts. Raises `DataError`.
    """
    if not spec.lower().endswith(SUFFIXES):
        raise DataError(f"data {spec!r} is no table, so that there is no column {column!r}; give a .csv or .jsonl")
    table = _read_table(spec)
    if column not in table.names:
        raise unknown("column", column, table.names)
    path = "" if _text_columns(table) else _path_column(table)
    ids = [str(row[path]) for row in table.rows] if path else _row_ids(table)
    return dict(zip(ids, (str(row[column]) for row in table.rows), strict=True))


def open_listed(spec: str) -> Samples:
    """The images that the table `spec` lists; other columns are ignored, and all labels are -1: unknown.

    Raises `DataError`.
    """
    table, root = _read_table(spec), Path(spec).expanduser().parent
    if _text_columns(table):
        raise DataError(
            f"data {spec!r} hold texts; images are expected here: give a folder, or a table with a column 'path'; "
            "texts need labels, which --data takes"
        )
    images = _image_paths(table, root)
    return Samples.of(images, np.full(len(images), -1, dtype=np.int64), Files(root, images))


def _open_texts(table: _Table, columns: tuple[str, ...]) -> UserData:
    """The texts in `columns`.

    Targets are classes in the column `label`, several in `labels`, or numbers, if there are any.
    """
    texts = read_texts(table.spec, table.rows, columns)
    labels = np.zeros(len(table.rows), dtype=np.int64)
    classes: tuple[str, ...] = ()
    targets: Targets | None = None
    layout: Layout = "unlabelled"
    if column := _class_column(table):
        layout = "classes"
        classes, labels = read_classes(table.spec, table.rows, column)
    elif _LABELS in table.names:
        layout = "labels"
        classes, values = _read_labels(table)
        targets = Values(values)
    elif set(table.names) - {*columns, _SPLIT}:
        layout = "numbers"
        classes, values = _read_numbers(table, columns)
        targets = Values(values)
    samples = Samples.of(_row_ids(table), labels, texts, targets)
    train, held_out = _separate_splits(table, samples)
    return UserData(classes, train, held_out, layout=layout, outputs=len(classes) or None)


def _read_csv(spec: str, path: Path) -> list[Row]:
    lines = split_csv(path.read_text(encoding="utf-8-sig"))
    header = [name.strip() for name in next(lines, [])]
    if len(set(header)) < len(header):
        raise DataError(f"data {spec!r} has two columns of one name: {', '.join(header)}; rename one")
    rows: list[Row] = []
    for cells in filter(None, lines):
        if len(cells) != len(header):
            raise DataError(
                f"data {spec!r}, row {len(rows) + 1}: {len(cells)} columns; expected {len(header)}: {', '.join(header)}"
            )
        rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    return rows


def _read_jsonl(spec: str, path: Path) -> list[Row]:
    rows: list[Row] = []
    for line in filter(str.strip, path.read_text(encoding="utf-8-sig").splitlines()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"data {spec!r}, row {len(rows) + 1}: no JSON ({error}); expected one object a line") from (
                error
            )
        if not isinstance(row, dict) or (rows and set(row) != set(rows[0])):
            expected = f"an object with {', '.join(rows[0])}" if rows else "an object with path and targets"
            raise DataError(f"data {spec!r}, row {len(rows) + 1}: other columns; expected {expected}")
        rows.append(row)
    return rows


def _text_columns(table: _Table) -> tuple[str, ...]:
    """The columns that contain texts; empty where the table lists images."""
    return () if any(name in table.names for name in _PATH_COLUMNS) else text_columns(table.names)


def _row_ids(table: _Table) -> list[str]:
    """Ids for the texts of a table: "row 1", "row 2" and so on."""
    return [f"row {number}" for number in range(1, len(table.rows) + 1)]


def _path_column(table: _Table) -> str:
    for name in _PATH_COLUMNS:
        if name in table.names:
            return name
    raise DataError(
        f"data {table.spec!r} has the columns {', '.join(table.names)}; expected one of {', '.join(_PATH_COLUMNS)} for "
        "images, or text for texts"
    )


def _image_paths(table: _Table, folder: Path) -> tuple[str, ...]:
    """Paths of the images. Raises `DataError` where a file is missing, or listed twice."""
    column = _path_column(table)
    paths = tuple(str(row[column]) for row in table.rows)
    missing = [(number, path) for number, path in enumerate(paths) if not (folder / path).is_file()]
    if missing:
        raise table.error(
            missing[0][0],
            f"no image {missing[0][1]!r} ({len(missing)} of {len(paths)} are missing); expected paths relative to "
            f"'{folder}'",
        )
    first_row: dict[str, int] = {}
    for number, path in enumerate(paths):
        if first_row.setdefault(path, number) != number:
            raise table.error(
                number, f"image {path!r} is in row {first_row[path] + 1} already; expected one row an image"
            )
    return paths


def _class_column(table: _Table) -> str | None:
    """The column with the class of each row; None if there is none, or if it holds numbers that are not whole."""
    column = label_column(table.names)
    if column is None:
        return None
    cells = [row[column] for row in table.rows if row[column] not in (None, "")]
    has_classes = any(map(_is_word, cells)) or all(str(cell).isdecimal() for cell in cells)
    return column if has_classes else None


def _read_labels(table: _Table) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """All label names, sorted, and which of them each image has, (n, k) of 0 and 1. Raises `DataError`."""
    labels_by_row = [_split_labels(table, number) for number in range(len(table.rows))]
    classes = tuple(sorted({label for labels in labels_by_row for label in labels}))
    if not classes:
        raise DataError(f"data {table.spec!r}: column {_LABELS!r} is empty; expected names, separated by ';'")
    targets = np.array([[name in labels for name in classes] for labels in labels_by_row], dtype=np.float32)
    return classes, targets


def _split_labels(table: _Table, number: int) -> set[str]:
    value = table.rows[number][_LABELS]
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise table.error(number, f"labels {value!r} are no JSON list ({error}); mend them") from error
    if isinstance(value, str):
        value = value.split(";")
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise table.error(number, f"labels {value!r}; expected names separated by ';', or a JSON list of names")
    return {label.strip() for label in value} - {""}


def _read_numbers(table: _Table, inputs: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Names of the columns that are targets, and their values, (n, k).

    Those are all that are no `inputs`; where some hold numbers, columns of words are left out.
    """
    others = tuple(name for name in table.names if name not in (*inputs, _SPLIT, _GROUP))
    columns = tuple(name for name in others if not all(_is_word(row[name]) for row in table.rows)) or others
    if not columns:
        raise DataError(
            f"data {table.spec!r} has no targets; expected a column 'label', 'labels', or columns of numbers"
        )
    values = [[_number(table, number, name) for name in columns] for number in range(len(table.rows))]
    return columns, np.array(values, dtype=np.float32)


def _note_whole_numbers(table: _Table, columns: Sequence[str]) -> Iterator[str]:
    """A note where the only target column might have been meant as classes."""
    cells = [str(row[columns[0]]) for row in table.rows]
    if len(columns) == 1 and all(map(str.isdecimal, cells)) and 4 * len(set(cells)) <= len(cells):
        yield f"column {columns[0]!r} holds few whole numbers, and is learned as numbers; for classes call it 'label'"


def _is_word(value: object) -> bool:
    """Whether a cell contains text that cannot be meant as a number."""
    return isinstance(value, str) and re.match(r"$|[-+.,\s]*\d|[-+\s]*(nan|inf)", value, re.IGNORECASE) is None


def _number(table: _Table, number: int, column: str) -> float:
    value = table.rows[number][column]
    try:
        result = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result) or abs(result) > np.finfo(np.float32).max:
        raise table.error(
            number,
            f"column {column!r} holds {value!r}, which is no finite number; mend it, or name a column of classes "
            f"'label', or one of several names a row {_LABELS!r}",
        )
    return result


def _separate_splits(table: _Table, samples: Samples) -> tuple[Samples, Samples | None]:
    """Training and held-out samples by the column `split`; without it, all samples and None."""
    if _SPLIT not in table.names:
        return samples, None
    names = [str(row[_SPLIT]).lower() for row in table.rows]
    for number, name in enumerate(names):
        if name not in (*TRAIN_FOLDERS, *HELD_OUT_FOLDERS):
            raise table.error(number, f"split {name!r}; expected 'train' or 'val'")
    train = np.array([name in TRAIN_FOLDERS for name in names])
    if train.all() or not train.any():
        return samples, None
    return samples.take(np.flatnonzero(train)), samples.take(np.flatnonzero(~train))
