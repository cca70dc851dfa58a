"""What a run folder holds for readers, written last: report.json, report.html, predict.py, and SHA256SUMS."""

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
"""Script that runs the model without pxcompress, copied as it is; it needs onnxruntime, numpy and pillow only."""

PREDICT_TEXT = PREDICT.with_name("predict_text.py")
"""The script for texts; it needs tokenizers in the place of pillow."""


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, report.html, for images and texts predict.py, which runs the model without pxcompress, and
    the digests of all files.
    """
    if takes_images(report) or (folder / TOKENIZER).is_file():
        shutil.copyfile(PREDICT if takes_images(report) else PREDICT_TEXT, folder / PREDICT.name)
    (folder / RECORD).write_text(to_json(report))
    (folder / PAGE).write_text(to_html(report))
    write_sums(folder)
