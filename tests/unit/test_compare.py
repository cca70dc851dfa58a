"""Several runs on one page, the model card, and the figures as files."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command import Px, one_line
from PIL import Image
from reports import NASTY, REPORT, Page, certified, make_report, make_target, measurement

from pxcompress.deploy.comparison import ratios
from pxcompress.errors import InputError
from pxcompress.proof import DataSummary, Metric, Speedup, Warning
from pxcompress.report import to_json
from pxcompress.report.build import read_report
from pxcompress.report.card import to_card
from pxcompress.report.compare import list_differences, list_rows, to_comparison, to_comparison_table
from pxcompress.report.figures import draw_stages, draw_widths, render_figure, write_figures
from pxcompress.report.record import Report
from pxcompress.report.table import to_table


def smaller(top1: float, p50: float, cost: int, **changes: Any) -> Report:
    """REPORT with another slim model."""
    pruned = measurement(top1, p50, cost)
    return make_report(pruned=pruned, ratios=ratios(REPORT.dense, pruned), **changes)


RUNS = {"half": REPORT, "tenth": smaller(0.7, 1.5, 4)}


def with_targets() -> Report:
    """REPORT with an int8 file beside dense and slim."""
    rows = [
        make_target(file, precision, of, Speedup(4, 3, 5), round(0.9 * of.quality.value * 400))
        for file, precision, of in (
            ("dense.onnx", "fp32", REPORT.dense),
            ("model.onnx", "fp32", REPORT.pruned),
            ("model.int8.onnx", "int8", measurement(0.84, 1.0, 3)),
        )
    ]
    return make_report(targets=tuple(rows), sha256={"model.onnx": "ab" * 32})


def test_a_dense_model_that_runs_share_has_one_row() -> None:
    """Its file differs from run to run, as it says which run wrote it."""
    hashed = {name: dataclasses.replace(of, sha256={"dense.onnx": name}) for name, of in RUNS.items()}
    names = [(row.run, row.precision) for row in list_rows(hashed)]
    assert names == [("half", "dense"), ("half", "fp32"), ("tenth", "fp32")]
    other = make_report(dense=measurement(0.91, 12.0, 40))
    assert len(list_rows({**RUNS, "other": other})) == 5


def test_rows_say_what_the_reports_do() -> None:
    """Changes are signed as `run` signs them."""
    dense, half, tenth = list_rows(RUNS)
    assert (dense.difference, dense.interval, dense.faster) == ("", "", "reference")
    assert (half.difference, half.interval, half.faster) == ("-5.0", "-9.6 to -0.4", "4.00x")
    assert "-5.0 points" in to_table(REPORT)
    assert tenth.difference == "-20.0"
    slow, same = make_report(0.7, 0.9, 15.0), make_report(0.9, 1.5, 10.0)
    cells = [row.faster for row in list_rows({"slow": slow, "same": same})]
    assert cells == ["reference", "0.80x, slower", "1.20x, not shown"]


def test_values_of_several_metrics_have_the_name_of_their_own() -> None:
    error = Metric("error", "number", higher_is_better=False)
    lines = to_comparison_table({"one": REPORT, "two": make_report(metric=error)}).splitlines()
    assert lines[1].split()[:2] == ["quality", "change"]
    assert lines[4].split()[:5] == ["fp32", "85.0%", "top-1", "-5.0", "(-9.6"]
    assert "change, faster: against the dense model, timed in turns with it in the same run" in lines


def test_the_terminal_names_what_differs_and_every_file_and_note() -> None:
    report = with_targets()
    busy = dataclasses.replace(report, notes=(*report.notes, Warning("busy", "THE MACHINE IS BUSY: x")))
    by_macs = report.recipe.but(budget="macs", ratio=0.3, scorer="taylor")
    other = make_report(recipe=by_macs, plan=dataclasses.replace(REPORT.plan, unit="MACs"))
    lines = to_comparison_table({"one": busy, "two": other}).splitlines()
    assert lines == [
        "all: resnet18, repair fold + least-squares + batchnorm + finetune",
        "         top-1         points (95 %)    size    p50  faster",
        "one: 50.0% of the MACs to remove, score magnitude; 20 M MACs, 10 k parameters",
        "  dense  90.0%                        200 kB  12 ms  reference",
        "  fp32   85.0%   -5.0 (-9.6 to -0.4)   50 kB   3 ms  4.00x",
        "  int8   84.0%  -6.0 (-10.7 to -1.3)   15 kB   1 ms  4.00x",
        "two: 30.0% of the MACs to remove, score taylor; 20 M MACs, 10 k parameters",
        "  fp32   85.0%   -5.0 (-9.6 to -0.4)   50 kB   3 ms  4.00x",
        "",
        "points, faster: against the dense model, timed in turns with it in the same run",
        "note: one: THE MACHINE IS BUSY: x",
        "note: embedded data: a demonstration",
    ]
    page = Page(to_comparison({"one": busy, "two": other})).text
    for words in (
        "All runs: resnet18, repair fold + least-squares + batchnorm + finetune",
        "30.0% of the MACs to remove, score taylor",
        "one: THE MACHINE IS",
    ):
        assert words in page
    single = to_comparison_table({"one": report}).splitlines()
    assert single[1].startswith("one: resnet18, 50.0% of the MACs to remove, score magnitude, repair fold + ")


def test_what_cannot_be_compared_is_said() -> None:
    assert list_differences(RUNS) == ()
    assert list_differences({"a": REPORT}) == ()
    elsewhere = make_report(environment=dataclasses.replace(REPORT.environment, threads=1))
    (note,) = list_differences({"a": REPORT, "b": elsewhere})
    assert note.startswith("LATENCIES CANNOT BE COMPARED: Some CPU, CPUExecutionProvider, 1 CPU threads, batch 1; ")
    other = make_report(data=DataSummary("glyphs", ("a", "b", "c"), 1, 1, 1, 1, 400))
    (note,) = list_differences({"a": REPORT, "b": other})
    assert note == ("ACCURACIES CANNOT BE COMPARED: digits, 400 samples of 2 classes; glyphs, 400 samples of 3 classes")
    assert f"note: {note}" in to_comparison_table({"a": REPORT, "b": other}).splitlines()
    assert note in Page(to_comparison({"a": REPORT, "b": other})).text


def test_the_page_stands_alone_and_shows_every_run() -> None:
    text = to_comparison({**RUNS, "precise": with_targets()})
    page = Page(text)
    assert text.isascii()
    assert not [part for part in ("http://", "https://", "url(", "@import") if part in text]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    for image, cost in zip(images, ("latency p50, ms", "file size, MB"), strict=True):
        assert image["alt"]
        svg = base64.b64decode((image["src"] or "").removeprefix("data:image/svg+xml;base64,"))
        drawn = " ".join(ElementTree.fromstring(svg).itertext())
        for words in (cost, "top-1, %", "half", "tenth", "precise, int8"):
            assert words in drawn
    for words in ("half", "tenth", "-20.0", "pxcompress run --model resnet18 --ratio 0.5", "Some CPU"):
        assert words in page.text


def test_names_do_not_become_markup_or_mathematics() -> None:
    recipe = REPORT.recipe.but(model=NASTY)
    text = to_comparison({f"$x_1$ {NASTY}": make_report(recipe=recipe)})
    assert not [part for part in ("<b>x", "<img src=http", "</script") if part in text]
    assert Page(text).text.count("<b>x</b>") >= 3


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_renders_in_a_browser_without_a_complaint(tmp_path: Path) -> None:
    """At 400 pixels, too, nothing but the table's own box scrolls sideways."""
    file = tmp_path / "page.html"
    check = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    text = to_comparison({**RUNS, "a-very-long-name-" * 9: with_targets()})
    file.write_text(re.sub("<meta[^>]*Content-Security[^>]*>", "", text).replace("</body>", check))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = f"--enable-logging=stderr --window-size=500,900 --user-data-dir={tmp_path / 'profile'}"
    run = ["chromium", *options.split(), *more.split(), "--dump-dom", file.as_uri()]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    wide, window = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout).groups()
    assert int(wide) <= int(window)


def test_the_card_says_what_a_user_of_the_model_needs() -> None:
    card = to_card(with_targets())
    for words in (
        "# resnet18, compressed",
        "| top-1 (95 % interval) | 90.0% (86.7% to 92.6%) | 85.0% (81.2% to 88.2%) | -5.0 points (-9.6 to -0.4) |",
        "| latency p50 | 12 ms | 3 ms | 4x lower |",
        "| model.int8.onnx | 84.0% |",
        "python predict.py image.jpg",
        "float32, (batch, 3, 32, 32); output: `logits`, (batch, 2)",
        "Classes: `cat`, `dog`.",
        "- embedded data: a demonstration",
        "400 test samples of 'digits'",
        "pxcompress run --model resnet18 --ratio 0.5 --score magnitude",
        f"| `model.onnx` | `{'ab' * 32}` |",
    ):
        assert words in card, words
    assert "## Guarantee" not in card
    assert "**Certified:** With 95 % confidence" in to_card(certified(0, 3, 90))
    assert "## Precisions" not in to_card(REPORT)
    assert "report.html" not in to_card(REPORT)


def test_what_the_user_named_is_no_markup_in_the_card() -> None:
    data = dataclasses.replace(REPORT.data, classes=("a|b", "`x`", "<b>"), name=NASTY)
    card = to_card(make_report(data=data, notes=(Warning("remark", "a *b* | <i>c</i>\n# d"),)))
    assert "`a/b`, `'x'`, `<b>`" in card
    assert "- a \\*b\\* \\| &lt;i&gt;c&lt;/i&gt; \\# d" in card


def test_figures_are_files_that_open(tmp_path: Path) -> None:
    written = write_figures({"half": REPORT, "to/p": with_targets()}, tmp_path / "figures")
    names = ["tradeoff-latency", "tradeoff-size", "half-widths", "half-stages", "to_p-widths", "to_p-stages"]
    assert [path.name for path in written] == [f"{name}.{form}" for name in names for form in ("svg", "png")]
    for path in written:
        if path.suffix == ".png":
            assert min(Image.open(path).size) > 200
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
    widths, stages = draw_widths(REPORT), draw_stages(REPORT)
    assert render_figure(widths, "svg") == (tmp_path / "figures" / "half-widths.svg").read_bytes()
    assert render_figure(stages, "svg") == (tmp_path / "figures" / "half-stages.svg").read_bytes()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Run folders with nothing but their reports."""
    for name, report in RUNS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(to_json(report))
    return [tmp_path / name for name in RUNS]


def test_the_command_shows_one_run_several_a_card_and_figures(px: Px, folders: list[Path], tmp_path: Path) -> None:
    assert px("report", folders[0]).out.rstrip("\n") == to_table(REPORT)
    done = px("report", *folders, "--out", tmp_path / "page.html")
    assert (done.code, done.err) == (0, f"page: {tmp_path / 'page.html'}\n")
    assert done.out.rstrip("\n") == to_comparison_table(RUNS)
    page = to_comparison(RUNS)
    assert (tmp_path / "page.html").read_text() == page
    figures = px("report", folders[0], "--figures", tmp_path / "figures")
    assert (figures.code, figures.err) == (0, f"figures: 8 files in {tmp_path / 'figures'}\n")
    assert len(list((tmp_path / "figures").iterdir())) == 8
    assert px("report", folders[0], "--card").out == to_card(REPORT)
    again = ("report", folders[0], "--out", tmp_path / "page.html")
    assert "exists; choose another --out or give --force" in one_line(px(*again))
    assert (tmp_path / "page.html").read_text() == page
    assert px(*again, "--force").code == 0
    assert f"<h1>{folders[0].name}</h1>" in (tmp_path / "page.html").read_text()


def test_wrong_folders_are_one_line(px: Px, folders: list[Path], tmp_path: Path) -> None:
    assert "give a run folder" in one_line(px("report", tmp_path / "nothing"))
    assert "given 2 times" in one_line(px("report", folders[0], folders[0]))
    assert "--card is of one run, and printed" in one_line(px("report", *folders, "--card"))
    (folders[0] / "report.json").write_text("{")
    assert "report.json' is not as pxcompress writes it" in one_line(px("report", *folders))
    for altered in ({"certificate": {"rows": 1}}, {"recipe": {"repair": 1, "floors": 1}}):
        (folders[0] / "report.json").write_text(json.dumps({**json.loads(to_json(REPORT)), **altered}))
        assert "is not as pxcompress writes it" in one_line(px("report", folders[0], "--card"))
    with pytest.raises(InputError, match="give a run folder"):
        read_report(tmp_path / "nothing")
