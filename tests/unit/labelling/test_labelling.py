"""Certificates on images without labels, from the command line: what is asked, and what is done with answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command import Px, one_line
from label_tables import COUNT, edit_json, filled, limit, models, predicted, read, truth_of
from linear_files import NAMES

from pxcompress.certify.path import Candidate, RiskLimit, certify, losses
from pxcompress.recipe import Recipe

# --- asking and answering


def test_only_disagreements_are_asked_for_the_first_model_first(questions: Path, place: Path) -> None:
    classes, _ = predicted(place)
    names = np.array(sorted(truth_of(place)))
    rows = read(questions / "to_label.csv")
    first, second = (set(names[classes[place] != classes[0]]) for place in (1, 2))
    assert {row["image"] for row in rows} == first | second
    assert {row["image"] for row in rows[: len(first)]} == first
    assert 0 < len(first) < len(rows) < COUNT / 2
    by_name = dict(zip(names, classes.T, strict=True))
    for row in rows:
        dense, *others = (NAMES[answer] for answer in by_name[row["image"]])
        assert row["dense"] == dense
        assert row["pruned"].split(" | ") == list(dict.fromkeys(name for name in others if name != dense))
        assert row["label"] == ""


def test_the_certificate_is_that_of_full_labels(certified: Path, place: Path, px: Px) -> None:
    classes, labels = predicted(place)
    path = [
        Candidate(str(file), file.stat().st_size, losses("negative-flips", classes[0], classes[step], labels))
        for step, file in enumerate(models(place))
    ]
    expected = certify(path, RiskLimit(alpha=0.1))
    record = json.loads((certified / "certificate.json").read_text())
    assert [(row["errors"], row["n"]) for row in record["rows"]] == [(row.errors, COUNT) for row in expected.rows]
    assert [row["p_value"] for row in record["rows"]] == pytest.approx([row.p_value for row in expected.rows])
    assert record["chosen"] == expected.chosen == 1
    assert record["labels"] == {"asked": len(read(certified / "to_label.csv")), "answered": record["labels"]["asked"]}
    outcome = px("verify", certified, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"recomputed on {COUNT} samples: the certificate holds"


def test_labels_may_stop_where_the_path_does(questions: Path, place: Path, px: Px) -> None:
    """Those of the last model are left out: they count as errors, and the model before it is certified all the same."""
    classes, _ = predicted(place)
    needed = {row["image"] for row in read(questions / "to_label.csv")[: (classes[1] != classes[0]).sum()]}
    truth = truth_of(place)
    some = filled(questions, lambda row: truth[row["image"]] if row["image"] in needed else "")
    outcome = px("certify", "--answers", some, "--out", questions, "--quiet")
    assert outcome.code == 0, outcome.err
    assert "have none: they count as errors" in outcome.out
    record = json.loads((questions / "certificate.json").read_text())
    assert (record["chosen"], record["labels"]["answered"]) == (1, len(needed))
    assert px("verify", questions, "--quiet").code == 0
    everything = px(
        "certify", "--answers", filled(questions, lambda row: truth[row["image"]]), "--out", questions, "--quiet"
    )
    assert "spent" not in everything.out, "more answers to the same question are no new use"


def test_none_of_the_answers_is_no_flip(questions: Path, px: Px) -> None:
    px("certify", "--answers", filled(questions, lambda row: "-"), "--out", questions, "--quiet")
    assert [row["errors"] for row in json.loads((questions / "certificate.json").read_text())["rows"]] == [0, 0, 0]


def test_disagreement_needs_no_label_at_all(place: Path, px: Px, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = px(
        "certify", *models(place), "--unlabelled", place / "photos", *limit("--risk", "disagreement"), "--out", out
    )
    assert "labels for" not in outcome.out
    classes, _ = predicted(place)
    rows = json.loads((out / "certificate.json").read_text())["rows"]
    assert [row["errors"] for row in rows] == (classes != classes[0]).sum(axis=1).tolist()
    assert not (out / "to_label.html").exists()


def test_copies_count_once(place: Path, px: Px, tmp_path: Path) -> None:
    shutil.copytree(place / "photos", tmp_path / "photos" / "inner")
    shutil.copy(place / "photos" / "000.png", tmp_path / "photos" / "again.png")
    command = [
        "certify",
        *models(place),
        "--unlabelled",
        tmp_path / "photos",
        *limit(),
        "--out",
        tmp_path / "out",
        "--json",
    ]
    assert json.loads(px(*command).out)["images"] == COUNT


# --- refusals


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--risk", "top1-error"], "the label of every sample"),
        (["--part", "confident"], "part 'confident' needs labelled data"),
        (["--data", "digits"], "--data and --unlabelled"),
        (["--max-drop", 0.005], f"{COUNT} samples to certify on"),
        (["--unlabelled", "nothing"], "'nothing' is no folder"),
        (["--answers", "to_label.csv"], "given with --answers"),
    ],
)
def test_what_cannot_be_asked(place: Path, px: Px, tmp_path: Path, more: list[object], words: str) -> None:
    command = ["certify", *models(place), "--unlabelled", place / "photos", *limit(), "--out", tmp_path / "out", *more]
    assert words in one_line(px(*command))
    assert not (tmp_path / "out").exists()


def test_answers_are_not_written_over(questions: Path, place: Path, px: Px) -> None:
    again = px("certify", *models(place), "--unlabelled", place / "photos", *limit(), "--out", questions)
    assert "exists, perhaps with answers" in one_line(again)
    assert "--max-drop" in one_line(px("certify", *models(place)))
    assert "no model is given" in one_line(px("certify", *limit()))
    assert "request.json' cannot be read" in one_line(px("certify", "--answers", "x.csv", "--out", "nothing"))


def test_images_of_the_run_are_refused(place: Path, px: Px, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(place / "photos", tmp_path / "data" / name)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(Recipe("resnet18", 0.5, data=str(tmp_path / "data")).to_json())
    command = ["certify", run, *limit(), "--out", tmp_path / "out", "--unlabelled"]
    assert f"{2 * COUNT} images of" in one_line(px(*command, tmp_path / "data"))


def _twice(text: str) -> str:
    lines = text.splitlines()
    return "\n".join([*lines, lines[1]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace(",\n", ",lihgt\n", 1), "line 2: unknown class 'lihgt'; did you mean light"),
        (lambda text: "\n".join(text.splitlines()[:-1]), "lacks 1 of"),
        (_twice, "is there twice"),
        (lambda text: re.sub(r"\n\d+.png", "\nother.png", text, count=1), "'other.png' was not asked for so"),
        (lambda text: text.replace("dense,pruned", "pruned,dense"), "expected the columns image,dense,pruned,label"),
        (lambda text: "", "expected the columns"),
    ],
)
def test_tables_that_do_not_answer(questions: Path, px: Px, change: Callable[[str], str], words: str) -> None:
    table = questions / "to_label.csv"
    table.write_text(change(table.read_text()))
    assert words in one_line(px("certify", "--answers", table, "--out", questions, "--quiet"))
    assert not (questions / "certificate.json").exists()


def test_spreadsheets_may_write_semicolons_and_a_mark(questions: Path, px: Px) -> None:
    text = (questions / "to_label.csv").read_text().replace(",", ";")
    (questions.parent / "sheet.csv").write_text(text, encoding="utf-8-sig")
    px("certify", "--answers", questions.parent / "sheet.csv", "--out", questions, "--quiet")
    assert json.loads((questions / "certificate.json").read_text())["labels"]["answered"] == 0


# --- anytime


def test_labelling_may_stop_at_any_line_and_what_is_not_looked_at_stays_fresh(
    place: Path, px: Px, tmp_path: Path
) -> None:
    truth, command = truth_of(place), ["certify", *models(place)[:2], "--unlabelled", place / "photos"]
    out = tmp_path / "first"
    request_labels = [*command, *limit("--max-drop", 0.2), "--anytime", "--out"]
    px(*request_labels, out)
    everything = filled(out, lambda row: truth[row["image"]])
    half = everything.read_text().splitlines()
    cut = half[: len(half) // 2] + [line[: line.rindex(",") + 1] for line in half[len(half) // 2 :]]
    everything.write_text("\n".join(cut))
    outcome = px("certify", "--answers", everything, "--out", out, "--quiet")
    assert outcome.code == 0, outcome.err
    assert "LEFT for other tests" in outcome.out
    record = json.loads((out / "certificate.json").read_text())
    assert (record["bound"], record["delta"], record["spent"]) == ("e-process", 0.025, "")
    seen = record["budget"]["ends"]
    assert [row["n"] for row in record["rows"]] == [seen, seen]
    assert 0 < seen < COUNT / 2
    assert px("verify", out, "--quiet").code == 0
    px(*request_labels, tmp_path / "second")
    request = json.loads((tmp_path / "second" / "request.json").read_text())
    assert request["budget"] == {**record["budget"], "begins": seen, "ends": seen, "lost": False}
    edit_json("request.json", lambda it: it["budget"].update(stake=0.05))(out)
    assert px("verify", out, "--quiet").code == 3


def test_a_test_that_fails_loses_its_stake(place: Path, px: Px, tmp_path: Path) -> None:
    truth = truth_of(place)
    command = ["certify", *models(place), "--unlabelled", place / "photos", *limit("--anytime")]
    px(*command, "--out", tmp_path / "first")
    px("certify", "--answers", filled(tmp_path / "first", lambda row: truth[row["image"]]), "--out", tmp_path / "first")
    record = json.loads((tmp_path / "first" / "certificate.json").read_text())
    assert (record["budget"]["lost"], record["chosen"]) == (True, 1)
    if record["budget"]["ends"] < COUNT:
        px(*command, "--max-drop", 0.3, "--out", tmp_path / "second")
        assert json.loads((tmp_path / "second" / "request.json").read_text())["delta"] == 0.0125


def certify_anew(px: Px, place: Path, images: Path, out: Path, *more: object) -> dict[str, object]:
    """The certificate of the path on `images`, with the true labels of what is asked for."""
    outcome = px("certify", *models(place), "--unlabelled", images, "--quiet", "--out", out, *more)
    assert outcome.code == 0, outcome.err
    truth = truth_of(place)
    answers = filled(out, lambda row: truth[Path(row["image"]).name])
    px("certify", "--answers", answers, "--out", out, "--quiet")
    return json.loads((out / "certificate.json").read_text())


# --- groups, and more images later


@pytest.mark.parametrize("more", [["--part", "classes"], ["--group", "camera"], ["--group", "camera", "--anytime"]])
def test_the_risk_is_held_in_every_group_of_unlabelled_images(
    place: Path, px: Px, tmp_path: Path, more: list[object]
) -> None:
    names = sorted(truth_of(place))
    table = place / "photos" / "table.csv"
    table.write_text(
        "\n".join(["path,camera", *(f"{name},{'front' if n % 3 else 'back'}" for n, name in enumerate(names))])
    )
    record = certify_anew(px, place, table, tmp_path / "asked", "--max-drop", 0.3, *more)
    rows, (classes, labels) = record["rows"], predicted(place)
    counts = {each["name"]: (each["n"], each["errors"]) for each in rows[1]["classes"]}
    if "--part" in more:
        flips = losses("negative-flips", classes[0], classes[1], labels)
        mine = [classes[0] == place for place in range(len(NAMES))]
        assert counts == {name: (mask.sum(), flips[mask].sum()) for name, mask in zip(NAMES, mine, strict=True)}
        assert record["group"] == "the dense model's answer"
    else:
        assert list(counts) == ["back", "front"]
        assert sum(n for n, _ in counts.values()) == record["n"]
    assert rows[1]["p_value"] == max(each["p_value"] for each in rows[1]["classes"])
    outcome = px("verify", tmp_path / "asked", "--quiet")
    assert ("holds" in outcome.out, outcome.code) == ((True, 0) if record["chosen"] else (False, 3))
    assert "its '" not in outcome.err


def test_a_test_goes_on_with_images_that_came_later(place: Path, px: Px, tmp_path: Path) -> None:
    names = sorted(truth_of(place))
    for part, some in (("first", names[:60]), ("all", names)):
        (tmp_path / part).mkdir()
        for name in some:
            shutil.copy(place / "photos" / name, tmp_path / part)
    first = certify_anew(px, place, tmp_path / "first", tmp_path / "one", "--max-drop", 0.1, "--anytime")
    assert first["chosen"] in (None, 0)
    assert first["n"] == 60
    again = ["certify", *models(place), "--unlabelled", tmp_path / "all", *limit("--anytime"), "--out", tmp_path / "x"]
    assert "60 of these 250 samples served certificates before the data changed" in one_line(px(*again))
    second = certify_anew(px, place, tmp_path / "all", tmp_path / "two", "--resume", tmp_path / "one")
    assert second["chosen"] == 1
    assert 60 < second["n"] <= COUNT
    assert second["looked_at"][:60] == first["looked_at"]
    outcome = px("verify", tmp_path / "two", "--quiet")
    assert outcome.code == 0, outcome.err
    request = json.loads((tmp_path / "two" / "request.json").read_text())
    request["earlier"]["rows"][1]["capital"][0] += 1  # more wealth than there was
    (tmp_path / "two" / "request.json").write_text(json.dumps(request, indent=1))
    assert "errors on" in px("verify", tmp_path / "two", "--quiet").err
