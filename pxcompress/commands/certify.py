"""`pxcompress certify`: test models that are already there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Confidence, Coverage, Part, Risk, guarantee_of
from pxcompress.errors import ResultError


def certify(
    files: Annotated[list[Path], typer.Argument(help="A run folder, or ONNX files from dense to smallest.")],
    max_drop: Annotated[float, typer.Option(help="Certify that the risk is at most this.")],
    data: Annotated[str, typer.Option(help="As for `run`.  [default: the run folder's]")] = "",
    confidence: Confidence = None,
    risk: Risk = None,
    part: Part = None,
    coverage: Coverage = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, as it was in `run`.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Test a given path of models on the samples that the data keep for certificates; exit code 3 if none passes."""
    from pxcompress.report.table import format_certificate
    from pxcompress.run_folder.certificate import certify_files

    guarantee = guarantee_of(max_drop, confidence=confidence, risk=risk, part=part, coverage=coverage)
    record = certify_files(files, data, guarantee, seed)
    print(json.dumps(dataclasses.asdict(record), indent=1) if as_json else format_certificate(record))
    if not record.chosen:
        raise ResultError("not certified: no model smaller than the first one passes")
