"""`certify --losses`: a certificate for any task, at once or anytime, and what is left of the table for others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Px, one_line

from pxcompress.certify.path import RiskLimit
from pxcompress.run_folder.loss_table import read_losses

ROWS = 1500


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Losses such as 1 - IoU of three models."""
    rng = np.random.default_rng(0)
    columns = [rng.beta(2, 18, ROWS), rng.beta(2, 17, ROWS), rng.beta(4, 10, ROWS)]
    path = tmp_path / "losses.csv"
    np.savetxt(path, np.stack(columns, axis=1), delimiter=",", header="dense,half,small", comments="", fmt="%.4f")
    return path


def test_a_table_with_semicolons_is_the_same_table(table: Path) -> None:
    names, losses, _ = read_losses(table)
    table.write_text(table.read_text().replace(",", ";"))
    again = read_losses(table)
    assert again[0] == names == ("dense", "half", "small")
    assert np.array_equal(again[1], losses)


def told(px: Px, *arguments: object) -> dict[str, object]:
    return json.loads(px("certify", *arguments, "--json").out)


def test_a_table_of_losses_is_certified(px: Px, table: Path) -> None:
    record = told(px, "--losses", table, "--max-drop", 0.15)
    values = np.loadtxt(table, delimiter=",", skiprows=1)
    assert (record["risk"], record["bound"], record["chosen_name"]) == ("mean-loss", "betting", "half")
    limit = RiskLimit("mean-loss", 0.15)
    assert [row["p_value"] for row in record["rows"]] == pytest.approx([limit.p_value(values[:, i]) for i in range(3)])
    assert "the mean loss over all predictions is at most 15 %" in record["sentence"]
    outcome = px("certify", "--losses", table, "--max-drop", 0.02, "--risk", "loss-increase")
    assert outcome.code == 0
    assert "above the dense model's" in outcome.out
    assert "certified once before" in outcome.out


def test_anytime_leaves_samples_and_budget_to_others(px: Px, table: Path) -> None:
    first = told(px, "--losses", table, "--max-drop", 0.15, "--anytime")
    budget = first["budget"]
    assert (first["chosen"], first["bound"], first["delta"]) == (1, "e-process", 0.025)
    assert first["n"] == budget["ends"] < 900
    assert (budget["begins"], budget["samples"], budget["lost"]) == (0, ROWS, True)
    second = told(px, "--losses", table, "--max-drop", 0.2, "--anytime")
    assert second["budget"]["begins"] == budget["ends"]
    assert (second["budget"]["left"], second["delta"], second["spent"]) == (0.025, 0.0125, "")
    outcome = px("certify", "--losses", table, "--max-drop", 0.15)
    assert "guarantee is spent" in outcome.out, "a test of all samples looks at those that are used up, too"
    assert "nothing is left of these samples" in one_line(
        px("certify", "--losses", table, "--max-drop", 0.2, "--anytime")
    )


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("a,b\n0,x\n", [], "line 2: could not convert"),
        ("a,b\n0\n", [], "line 2 has 1 values for 2 columns"),
        ("a,b\n0,1.5\n", [], "divide them by the largest possible one"),
        ("a\n0\n", [], "expected a column for each"),
        ("", [], "has 0 models"),
        ("a,b\n0,0\n", [], "1 samples to certify on"),
        ("a,b\n0,0.5\n", ["--risk", "flips"], "unknown risk"),
        ("a,b,c\n0,0,x\n", ["--group", "C"], "unknown column 'C'"),
        ("a,b,c\n0,0,x\n", ["--group", "c"], "1 samples of 'x', the smallest group"),
        ("a,b,c\n0,0,x\n", ["--group", "c", "--anytime"], "1 samples of 'x', the smallest group, left to certify on"),
        ("a,b\n0,0.5\n", ["--data", "digits"], "--data is given with --losses"),
    ],
)
def test_tables_that_cannot_be_certified(px: Px, tmp_path: Path, text: str, more: list[object], words: str) -> None:
    lines = text.splitlines(keepends=True)
    many = lines[1:] * 200 if "1.5" in text else lines[1:]
    (tmp_path / "t.csv").write_text("".join([*lines[:1], *many]))
    assert words in one_line(px("certify", "--losses", tmp_path / "t.csv", "--max-drop", 0.1, *more))


def test_the_risk_is_held_in_every_group(px: Px, table: Path) -> None:
    """Losses of the night are larger; the mean over all would pass."""
    lines = table.read_text().splitlines()
    day = ["when", *("night" if place % 5 == 0 else "day" for place in range(ROWS))]
    values = [line.split(",") for line in lines]
    for line, when in zip(values[1:], day[1:], strict=True):
        line[1] = f"{float(line[1]) / 2 + 0.15 * (when == 'night'):.4f}"
    table.write_text("\n".join(",".join([when, *line]) for when, line in zip(day, values, strict=True)))
    command = ["--losses", table, "--max-drop", 0.15, "--group", "when"]
    record = told(px, *command)
    assert [(each["name"], each["n"]) for each in record["rows"][0]["classes"]] == [("day", 1200), ("night", 300)]
    assert record["chosen"] == 0
    values_of = np.array([float(line[1]) for line in values[1:]])
    night = np.array(day[1:]) == "night"
    assert record["rows"][1]["p_value"] == pytest.approx(RiskLimit("mean-loss", 0.15).p_value(values_of[night]))
    assert "the weakest of 2 groups (by when)" in px("certify", *command).out
    table.write_text("\n".join(line.partition(",")[2] for line in table.read_text().splitlines()))
    assert told(px, "--losses", table, "--max-drop", 0.15)["chosen"] == 1


def test_a_test_goes_on_where_it_ended_with_lines_that_came_later(px: Px, table: Path, tmp_path: Path) -> None:
    """A table that has grown and one of new lines alone give the same; lines that were looked at do not count again."""
    header, *lines = table.read_text().splitlines()
    short = tmp_path / "short.csv"
    short.write_text("\n".join([header, *lines[:300]]))
    first = told(px, "--losses", short, "--max-drop", 0.13, "--anytime", "--out", tmp_path / "one")
    assert (first["chosen"], first["n"], len(first["looked_at"])) == (0, 300, 300)
    again = px("certify", "--losses", short, "--anytime", "--resume", tmp_path / "one")
    assert "the earlier test looked at all 300 samples" in one_line(again)
    grown = told(px, "--losses", table, "--resume", tmp_path / "one" / "certificate.json", "--out", tmp_path / "two")
    assert grown["chosen"] == 1
    assert 300 < grown["n"] == grown["budget"]["ends"] == len(set(grown["looked_at"])) <= ROWS
    assert set(first["looked_at"]) < set(grown["looked_at"])
    assert (grown["delta"], grown["alpha"]) == (first["delta"], first["alpha"])
    assert grown["rows"][1]["p_value"] < first["rows"][1]["p_value"]
    others = tmp_path / "others.csv"
    others.write_text("\n".join([header, *lines[300:]]))
    alone = told(px, "--losses", others, "--resume", tmp_path / "one")
    assert alone["chosen"] == 1
    assert alone["n"] > 300
    assert "going on from an earlier certificate" in px("certify", "--losses", others, "--resume", tmp_path / "one").out


def test_what_cannot_go_on(px: Px, table: Path, tmp_path: Path) -> None:
    px("certify", "--losses", table, "--max-drop", 0.13, "--anytime", "--out", tmp_path / "one")
    px("certify", "--losses", table, "--max-drop", 0.13, "--out", tmp_path / "fixed")
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(table.read_text().replace("small", "other", 1))
    for more, words in (
        (["--resume", tmp_path / "none.json"], "cannot be read"),
        (["--resume", tmp_path / "one", "--max-drop", 0.2], "--max-drop is given with --resume"),
        (["--resume", tmp_path / "fixed"], "only one with --anytime can go on"),
        (["--resume", tmp_path / "one"], "'small', of the earlier certificate, is not among the models"),
    ):
        assert words in one_line(px("certify", "--losses", renamed, *more))


def test_anytime_holds_the_risk_in_every_group(px: Px, table: Path) -> None:
    header, *lines = table.read_text().splitlines()
    table.write_text(
        "\n".join(
            [f"{header},when", *(f"{line},{'night' if place % 4 else 'day'}" for place, line in enumerate(lines))]
        )
    )
    record = told(px, "--losses", table, "--max-drop", 0.16, "--anytime", "--group", "when")
    assert (record["chosen"], record["group"], record["part"]) == (1, "when", "classes")
    assert [each["name"] for each in record["rows"][1]["classes"]] == ["day", "night"]
    assert (
        record["rows"][1]["p_value"] == max(each["p_value"] for each in record["rows"][1]["classes"]) <= record["delta"]
    )


# --- verify, and tables that have grown


@pytest.fixture
def made(px: Px, table: Path, tmp_path: Path) -> Path:
    """The folder of a certificate of the table."""
    px("certify", "--losses", table, "--max-drop", 0.15, "--out", tmp_path / "made")
    return tmp_path / "made"


@pytest.mark.parametrize("more", [[], ["--anytime"], ["--group", "when"], ["--group", "when", "--anytime"]])
def test_verify_recomputes_the_certificate_of_a_table(px: Px, table: Path, tmp_path: Path, more: list[object]) -> None:
    header, *lines = table.read_text().splitlines()
    if "when" in more:
        lines = [f"{line},{'night' if place % 4 else 'day'}" for place, line in enumerate(lines)]
        table.write_text("\n".join([f"{header},when", *lines]))
    for turn in range(2 if "--anytime" in more else 1):  # the second test begins where the first has ended
        out = tmp_path / f"out{turn}"
        assert px("certify", "--losses", table, "--max-drop", 0.16, *more, "--out", out).code == 0
        outcome = px("verify", out, "--quiet")
        assert outcome.code == 0, outcome.err
        assert outcome.out.endswith("samples: the certificate holds\n")
    shutil.move(table, tmp_path / "moved.csv")
    assert px("verify", out, "--data", tmp_path / "moved.csv").code == 0
    assert "cannot be read" in one_line(px("verify", out, "--quiet"))


def _put(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        _put("alpha", 0.2),
        _put("sentence", "All is well."),
        _put("reserved", 9),
        _put("group", "when"),
        _put("anytime", True),
        _put("budget", {"total": 0.1, "left": 0.1, "stake": 0.05, "begins": 0, "ends": 9, "samples": 9}),
        lambda record: record["rows"][1].update(p_value=1e-9),
        lambda record: record["rows"][1].update(errors=1.0),
        lambda record: record["rows"][1].update(name="other"),
        lambda record: record["rows"].pop(),
        lambda record: record["hashes"].update(split="0" * 64),
        lambda record: record["origin"].update(seed=1),
    ],
)
def test_verify_finds_what_was_altered_in_the_certificate_of_a_table(
    px: Px, made: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    record = json.loads((made / "certificate.json").read_text())
    change(record)
    (made / "certificate.json").write_text(json.dumps(record))
    outcome = px("verify", made, "--quiet")
    assert outcome.code in (2, 3)
    assert "holds\n" not in outcome.out
    assert len(outcome.err.strip().splitlines()) == 1


def test_verify_finds_another_table(px: Px, table: Path, made: Path) -> None:
    before = table.read_text()
    for text in (before + "0.1,0.1,0.1\n", before.replace("small", "other", 1), before.replace("\n", "\n0,0,0\n", 1)):
        table.write_text(text)
        outcome = px("verify", made, "--quiet")
        assert outcome.code == 3
        assert len(outcome.err.strip().splitlines()) == 1
    record = json.loads((made / "certificate.json").read_text())
    (made / "certificate.json").write_text(json.dumps({**record, "origin": None}))
    assert "does not say which files it was made of" in one_line(px("verify", made, "--quiet"))


def test_lines_that_were_looked_at_are_known_again_in_a_table_that_has_grown(
    px: Px, table: Path, tmp_path: Path
) -> None:
    header, *lines = table.read_text().splitlines()
    short, grown, rest = (tmp_path / f"{name}.csv" for name in ("short", "grown", "rest"))
    short.write_text("\n".join([header, *lines[:300]]))
    grown.write_text("\n".join([header, *lines]))
    rest.write_text("\n".join([header, *lines[300:]]))
    options = ["--max-drop", 0.13, "--anytime"]
    told(px, "--losses", short, *options, "--out", tmp_path / "one")
    refusal = one_line(px("certify", "--losses", grown, *options))
    assert "300 of these 1500 samples served certificates before the data changed" in refusal
    assert "--resume FOLDER" in refusal
    assert told(px, "--losses", grown, "--resume", tmp_path / "one", "--out", tmp_path / "two")["chosen"] == 1
    outcome = px("verify", tmp_path / "two", "--quiet")
    assert outcome.code == 0, outcome.err
    assert "on top of 300 as the earlier certificate says (verify that one, too)" in outcome.out
    record = json.loads((tmp_path / "two" / "certificate.json").read_text())
    record["origin"]["earlier"]["rows"][1]["capital"][0] += 1  # more wealth than there was
    (tmp_path / "two" / "certificate.json").write_text(json.dumps(record))
    assert px("verify", tmp_path / "two", "--quiet").code == 3
    assert told(px, "--losses", rest, *options)["chosen"] == 1, "new samples alone are fresh"
    assert "guarantee is spent" in px("certify", "--losses", grown, "--max-drop", 0.15).out
