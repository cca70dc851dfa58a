"""What a run folder holds for readers, written last: report.json, report.html, and predict.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from pxcompress import __version__
from pxcompress.report.build import sha256_of, to_json
from pxcompress.report.html import to_html
from pxcompress.report.record import Report
from pxcompress.report.summary import takes_images
from pxcompress.run_folder.names import TOKENIZER

RECORD, PAGE, EXPLAINED = "report.json", "report.html", "explain.json"

PREDICT = Path(__file__).parents[1] / "deploy" / "predict.py"
"""Needs onnxruntime, numpy and pillow only; it is copied as it is."""

PREDICT_TEXT = PREDICT.with_name("predict_text.py")
"""The same for texts, with tokenizers in the place of pillow."""


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, report.html, and for images and texts predict.py, which runs the model without pxcompress."""
    if takes_images(report) or (folder / TOKENIZER).is_file():
        shutil.copyfile(_script_for(report), folder / PREDICT.name)
    (folder / RECORD).write_text(to_json(report))
    (folder / PAGE).write_text(to_html(report))


def _script_for(report: Report) -> Path:
    """The script that runs the model on what it takes."""
    return PREDICT if takes_images(report) else PREDICT_TEXT


def find_altered_pages(folder: Path, report: Report) -> list[str]:
    """Names of these files that are not as the run wrote them; `report` is what report.json holds. Some may be missing.

    The page holds the hash of report.json. Without cases of `explain`, whose pictures are only there, it is drawn anew;
    this and predict.py can be told only by the version that wrote them.
    """
    altered = []
    page = folder / PAGE
    text = page.read_text() if page.is_file() else ""
    if text and sha256_of(folder / RECORD) not in text:
        altered.append(RECORD)
    if report.environment.pxcompress != __version__:
        return altered
    if text and not altered and not (folder / EXPLAINED).is_file() and text != to_html(report):
        altered.append(PAGE)
    predict = folder / PREDICT.name
    if predict.is_file() and predict.read_bytes() != _script_for(report).read_bytes():
        altered.append(PREDICT.name)
    return altered
