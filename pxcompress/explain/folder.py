"""Writes the results of `pxcompress explain` into a folder."""

from __future__ import annotations

from pathlib import Path

from pxcompress.cache import whole_file
from pxcompress.report.build import read_report
from pxcompress.report.explanation import Explanation, format_explanation_json
from pxcompress.report.explanation_page import render_explanation
from pxcompress.report.heatmap_figures import draw_case
from pxcompress.report.html import to_html
from pxcompress.run_folder.place import name_unwritable
from pxcompress.run_folder.sums import update_sums

PAGE, RECORD, FIGURES = "explain.html", "explain.json", "explain"
"""Names of the page, the record and the folder of figures in a folder of their own."""

REPORT = "report.html"
"""The page of a run folder."""


def write(explanation: Explanation, run: Path, out: Path | None = None) -> Path:
    """Write record and figures of all cases, replacing those of an earlier call; returns the path of the page.

    That is the report.html of the folder `run`, or, with another folder `out`, an explain.html there.
    """
    folder = out or run
    if out is None:
        page, text = REPORT, to_html(read_report(run), explanation)
    else:
        page, text = PAGE, render_explanation(explanation)
    files = {
        f"{FIGURES}/case-{place:02d}.{kind}": file
        for place, case in enumerate(explanation.cases, 1)
        for kind, file in draw_case(case).items()
    }
    files |= {RECORD: format_explanation_json(explanation).encode(), page: text.encode()}
    with name_unwritable(folder):
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        for stale in (folder / FIGURES).glob("case-*.*"):
            stale.unlink()
        for name, content in files.items():
            with whole_file(folder / name) as beside:
                beside.write_bytes(content)
        if out is None:
            update_sums(run, [run / name for name in files])
    return folder / page
