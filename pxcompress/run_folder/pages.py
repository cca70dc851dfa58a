"""Writes the files for readers into a run folder, last of all: report.json, report.html, predict.py, SHA256SUMS."""

from __future__ import annotations

import shutil
from pathlib import Path

from pxcompress.report.build import to_json
from pxcompress.report.html import to_html
from pxcompress.report.record import Report
from pxcompress.report.summary import takes_images
from pxcompress.run_folder.names import TOKENIZER
from pxcompress.run_folder.sums import write_sums

RECORD, PAGE = "report.json", "report.html"

PREDICT = Path(__file__).parents[1] / "deploy" / "predict.py"
"""Path of the script that is copied to run folders and runs the model with onnxruntime, numpy and pillow only."""

PREDICT_TEXT = PREDICT.with_name("predict_text.py")
"""Path of the script that is copied to run folders of models for texts; it needs tokenizers instead of pillow."""


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, report.html, the hashes of all files, and predict.py for models of images or texts."""
    if takes_images(report) or (folder / TOKENIZER).is_file():
        shutil.copyfile(PREDICT if takes_images(report) else PREDICT_TEXT, folder / PREDICT.name)
    (folder / RECORD).write_text(to_json(report), encoding="utf-8")
    (folder / PAGE).write_text(to_html(report), encoding="utf-8")
    write_sums(folder)
