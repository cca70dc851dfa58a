"""Texts: a column of a table, two columns of texts that belong together, or the lines of a .txt file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from pxcompress.data.samples import Samples, UserData
from pxcompress.errors import DataError
from pxcompress.models.tokens import Text

SUFFIX = ".txt"

PAIRS = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Pairs of column names that mark two texts which form one sample."""

TEXT_COLUMNS = ("text", "sentence", "content", "review")
"""Column names that mark a single text."""

LABELS = ("label", "class")
"""Names, in any case, of the column with the class of a row; the first one that exists is taken."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts instead of images, in `values` by position; a call, which would open an image, raises `DataError`."""

    values: tuple[Text, ...]
    noun: ClassVar[str] = "texts"

    def __call__(self, position: int) -> Image.Image:
        raise DataError("the data are texts, the model takes images; give a model of texts, such as hf:FOLDER")


def text_columns(names: Sequence[str]) -> tuple[str, ...]:
    """The columns, among `names`, that contain texts; empty for a table of images."""
    for pair in PAIRS:
        if all(name in names for name in pair):
            return pair
    return next(((name,) for name in TEXT_COLUMNS if name in names), ())


def read_texts(spec: str, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> Texts:
    """The texts of a table's `rows`. Raises `DataError` for a cell that is empty or no text."""
    texts = []
    for number, row in enumerate(rows, 1):
        values = tuple(row[column] for column in columns)
        for column, value in zip(columns, values, strict=True):
            if not isinstance(value, str) or not value.strip():
                problem = "is empty" if value in ("", None) or isinstance(value, str) else f"holds {value!r}"
                raise DataError(
                    f"data {spec!r}, row {number}: column {column!r} {problem}; expected a text in every row"
                )
        texts.append(tuple(map(str, values)))
    return Texts(tuple(texts))


def label_column(names: Sequence[str]) -> str | None:
    """The column, among `names`, with the class of a row; None if there is none."""
    name_by_word = {name.casefold(): name for name in reversed(names)}
    return next((name_by_word[word] for word in LABELS if word in name_by_word), None)


def read_classes(spec: str, rows: Sequence[Mapping[str, object]], column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names in a `column`, in order, and each row's class number, (n,) int64. Raises `DataError`."""
    values = [str(row[column]).strip() for row in rows]
    for number, value in enumerate(values, 1):
        if not value or rows[number - 1][column] is None:
            raise DataError(f"data {spec!r}, row {number}: column {column!r} is empty; expected a class in every row")
    whole = all(value.isdecimal() for value in values)
    classes = tuple(sorted(set(values), key=int if whole else str))
    number_of = {name: number for number, name in enumerate(classes)}
    return classes, np.array([number_of[value] for value in values], dtype=np.int64)


def open_lines(spec: str) -> UserData:
    """The texts of a file with one on each line, without labels; blank lines are skipped. Raises `DataError`."""
    try:
        lines = Path(spec).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"data {spec!r} cannot be read ({error}); expected a text in UTF-8, one sample a line") from (
            error
        )
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"data {spec!r} is empty; expected one text a line")
    texts = Texts(tuple((line,) for _, line in numbered))
    ids = [f"line {number}" for number, _ in numbered]
    samples = Samples.of(ids, np.zeros(len(ids), dtype=np.int64), texts)
    return UserData((), samples, None, layout="unlabelled")
