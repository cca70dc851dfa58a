"""Reads and writes the table of images to label, which has both models' answers and a person's."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import zip_longest
from pathlib import Path

from pxcompress.certify.few_labels import NEITHER
from pxcompress.checks import read_text, split_csv
from pxcompress.errors import InputError, short, unknown

NO_ANSWER_RIGHT = "-"
"""The word in the column `label` that means that no model's answer is right."""


@dataclass(frozen=True)
class Question:
    """One image to label: its path below the folder, the class that the dense model predicts, and those that other
    models predict instead; the user fills in `label`.
    """

    image: str
    dense: str
    pruned: str
    label: str = ""

    @classmethod
    def of(cls, image: str, answers: Sequence[str]) -> Question:
        """A question about `image`, from the predicted classes (`answers`) of all models, the dense one's first.

        `pruned` lists the classes that differ from the dense model's, once each, with " | " between them.
        """
        others = dict.fromkeys(answer for answer in answers[1:] if answer != answers[0])
        return cls(image, answers[0], " | ".join(others))


HEADER = tuple(field.name for field in fields(Question))


def questions_csv(questions: Iterable[Question]) -> str:
    """The table as CSV, one line an image; a person fills the column `label`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *map(astuple, questions)])
    return text.getvalue()


def read_answers(path: Path, questions: Sequence[Question], classes: Sequence[str]) -> dict[str, int]:
    """The labels in a filled table: image -> class index, or `NEITHER`; empty ones are left out.

    Raises `InputError`, with the line, for a label that is no class, and for a table of other questions.
    """
    question_by_image = {question.image: question for question in questions}
    labels: dict[str, int] = {}
    images: set[str] = set()
    for line, row in enumerate(_rows(path), start=2):
        location = f"{str(path)!r}, line {line}"
        question = question_by_image.get(row["image"])
        if question is None or (row["dense"], row["pruned"]) != (question.dense, question.pruned):
            raise InputError(
                f"{location}: {short(row['image'])!r} was not asked for so; fill in the table that was written"
            )
        if question.image in images:
            raise InputError(f"{location}: {question.image!r} is there twice; leave one line")
        images.add(question.image)
        if label := row["label"].strip():
            labels[question.image] = _class(label, classes, location)
    if missing := [image for image in question_by_image if image not in images]:
        raise InputError(
            f"{str(path)!r} lacks {len(missing)} of {len(question_by_image)} images, such as {missing[0]!r}; fill in "
            "the table that was written, and leave its lines"
        )
    return labels


def _class(label: str, classes: Sequence[str], line: str) -> int:
    if label in classes:
        return classes.index(label)
    if label == NO_ANSWER_RIGHT:
        return NEITHER
    problem = unknown("class", label, classes)
    raise InputError(f"{line}: {short(problem)}; {NO_ANSWER_RIGHT} stands for none of the answers")


def _rows(path: Path) -> list[Mapping[str, str]]:
    """The lines of the table, also as spreadsheets save it: with a byte-order mark, and semicolons between columns."""
    text = read_text(path, "give the filled to_label.csv, as UTF-8")
    header = text.partition("\n")[0]
    lines = split_csv(text)
    if tuple(next(lines, ())) != HEADER:
        raise InputError(f"{str(path)!r} begins with {short(header)!r}; expected the columns {','.join(HEADER)}")
    return [dict(zip_longest(HEADER, cells[: len(HEADER)], fillvalue="")) for cells in lines if cells]
