"""`pxcompress verify`: does a certificate hold?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Quiet
from pxcompress.commands.terminal import notes
from pxcompress.errors import ResultError


def verify(
    folder: Annotated[Path, typer.Argument(help="A run folder made with --max-drop, or what `certify --out` wrote.")],
    data: Annotated[str, typer.Option(help="Where the data are now.  [default: as in the run]")] = "",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Recompute the certificate of a run folder.

    It is computed from the folder's ONNX files and the data. The exit code is 3 if it does not hold.
    """
    from pxcompress.report.table import format_certificate
    from pxcompress.run_folder.certificate import verify as verify_run
    from pxcompress.run_folder.labelling import REQUEST, verify_answers

    recompute = verify_answers if (folder / REQUEST).exists() else verify_run
    result = recompute(folder, data, notes(quiet))
    if as_json:
        content = dataclasses.asdict(result.record)
        print(json.dumps({"holds": not result.problems, "problems": result.problems, **content}, indent=1))
    else:
        print(format_certificate(result.record))
    if result.problems:
        raise ResultError(f"the certificate does not hold: {'; '.join(result.problems)}")
    if not as_json:
        print(f"recomputed on {result.record.n} samples: the certificate holds")
