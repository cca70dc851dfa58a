"""Folders that ask for labels, altered afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Px, one_line
from label_tables import COUNT, edit_json, filled, limit, models, read, truth_of
from linear_files import LEVELS, classifier_file
from PIL import Image


def _other_answer(folder: Path) -> None:
    """An error is made none."""
    rows = read(folder / "answers.csv")
    flip = next(row for row in rows if row["label"] == row["dense"])
    text = (folder / "answers.csv").read_text()
    line = f"{flip['image']},{flip['dense']},{flip['pruned']},"
    (folder / "answers.csv").write_text(text.replace(line + flip["label"], line + "-"))


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (_other_answer, "errors on 250 samples"),
        (lambda folder: (folder / "answers.csv").open("a").write("\n"), "the answers is not the certified one"),
        (edit_json("request.json", lambda it: it.update(delta=0.2)), "the request is not the certified one"),
        (edit_json("request.json", lambda it: it.update(alpha=0.2)), "p = "),
        (edit_json("certificate.json", lambda it: it.update(sentence="All is well.")), "its 'sentence'"),
        (edit_json("certificate.json", lambda it: it.update(spent="")), ""),
        (edit_json("certificate.json", lambda it: it["rows"][1].update(errors=0)), "errors on 250 samples"),
        (edit_json("certificate.json", lambda it: it.update(chosen=2)), "does not follow from its own p-values"),
        (edit_json("certificate.json", lambda it: it["labels"].update(answered=1)), "its 'labels'"),
        (
            edit_json("certificate.json", lambda it: it["hashes"].update(split="0")),
            "the split is not the certified one",
        ),
        (
            lambda folder: (folder / "to_label.csv").open("a").write("\n"),
            "'to_label.csv' is not the file that was written",
        ),
        (lambda folder: (folder / "to_label.html").open("a").write(" "), "'to_label.html' is not the file"),
    ],
)
def test_tampering_with_a_file_is_found(certified: Path, px: Px, tamper: Callable[[Path], None], words: str) -> None:
    tamper(certified)
    outcome = px("verify", certified, "--quiet")
    assert outcome.code == (3 if words else 0)
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) <= 1


def test_the_table_may_be_filled_in_where_it_lies(questions: Path, place: Path, px: Px) -> None:
    truth, table = truth_of(place), questions / "to_label.csv"
    table.write_bytes(filled(questions, lambda row: truth[row["image"]]).read_bytes())
    assert px("certify", "--answers", table, "--out", questions, "--quiet").code == 0
    outcome = px("verify", questions, "--quiet")
    assert outcome.code == 0, outcome.err


def test_without_answers_models_images_and_questions_are_held_against_what_was_asked(
    questions: Path, certified: Path, px: Px
) -> None:
    assert certified == questions
    (questions / "answers.csv").unlink()
    outcome = px("verify", questions, "--quiet")
    assert outcome.code == 3
    assert "answers.csv is missing, without which errors cannot be counted again" in outcome.err
    (questions / "certificate.json").unlink()
    count = len(read(questions / "to_label.csv"))
    waiting = one_line(px("verify", questions, "--quiet"), 3)
    assert (
        f"nothing is certified yet: {count} of {COUNT} images need a label; models, images and questions are" in waiting
    )
    assert "certify --answers" in waiting
    (questions / "to_label.csv").open("a").write(" ")
    assert "nothing is certified yet: 'to_label.csv' is not" in one_line(px("verify", questions, "--quiet"), 3)


@pytest.fixture
def copied(place: Path, px: Px, tmp_path: Path) -> Iterator[Path]:
    """A copy of the models and images with a certificate of theirs in `asked`."""
    shutil.copytree(place, tmp_path / "moved")
    return tmp_path / "moved"


def test_other_models_or_images_are_found(copied: Path, px: Px, tmp_path: Path) -> None:
    out = tmp_path / "out"
    px("certify", *models(copied), "--unlabelled", copied / "photos", *limit(), "--out", out)
    truth = truth_of(copied)
    answers = filled(out, lambda row: truth[row["image"]])
    assert px("certify", "--answers", answers, "--out", out, "--quiet").code == 0
    classifier_file(copied / "half.onnx", [level + 6 for level in LEVELS], 4001)
    assert "half.onnx' is not what labels were asked for" in px("verify", out, "--quiet").err
    refused = one_line(px("certify", "--answers", answers, "--out", out, "--quiet"))
    assert "is not what labels were asked for; ask for labels anew" in refused
    Image.new("RGB", (8, 8), (5, 5, 5)).save(copied / "photos" / "000.png")
    assert "the images are not what labels were asked for" in px("verify", out, "--quiet").err
    (copied / "half.onnx").unlink()
    assert "is not there any more" in one_line(px("verify", out, "--quiet"))
