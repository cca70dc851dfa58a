"""The page on which labels are given."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from label_tables import read


def test_the_page_is_whole_and_does_not_tell_whose_an_answer_is(questions: Path) -> None:
    text = (questions / "to_label.html").read_text()
    rows = read(questions / "to_label.csv")
    assert text.isascii()
    assert text.count("<fieldset") == len(rows)
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'unsafe-inline'" in text
    for row, block in zip(rows, text.split("<fieldset")[1:], strict=True):
        choices = re.findall(r'<input type="radio" name="case\d+" value="([^"]+)"', block)
        assert choices == [*sorted({row["dense"], *row["pruned"].split(" | ")}), "-"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_fills_the_table(questions: Path, tmp_path: Path) -> None:
    """Every second image gets its first choice by a key or a click; the page's table is the one that was written."""
    text = (questions / "to_label.html").read_text()
    script = """<script>
    cases[0].querySelector("input").focus();
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "1" }));
    for (const one of cases.slice(1).filter((_, place) => place % 2)) one.querySelector("input").click();
    document.body.replaceChildren(Object.assign(document.createElement("pre"), { textContent: table() }));
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", script))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = ["chromium", *options.split(), "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert "CONSOLE" not in done.stderr
    table = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert table is not None
    rows = read(questions / "to_label.csv")
    for place, row in enumerate(rows):
        chosen = place == 0 or place % 2 == 0
        row["label"] = min(row["dense"], *row["pruned"].split(" | ")) if chosen else ""
    assert list(csv.DictReader(table[1].splitlines())) == rows
