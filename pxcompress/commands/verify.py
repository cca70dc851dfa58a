"""`pxcompress verify`: does a certificate hold?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pxcompress.commands.options import AsJson, Quiet
from pxcompress.commands.terminal import notes
from pxcompress.errors import ResultError

if TYPE_CHECKING:
    from pxcompress.certify.record import CertificateRecord


def verify(
    folder: Annotated[Path, typer.Argument(help="A run folder made with --max-drop, or what `certify --out` wrote.")],
    data: Annotated[str, typer.Option(help="Where the data are now.  [default: as in the run]")] = "",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compute a certificate again, and find whatever was altered.

    It is computed from the ONNX files, the data and the answers, or from the table of losses. The exit code is 3 if it
    does not hold.
    """
    from pxcompress.report.table import format_certificate
    from pxcompress.run_folder.verification import verify as verify_folder

    result = verify_folder(folder, data, notes(quiet))
    if as_json:
        content = dataclasses.asdict(result.record)
        print(json.dumps({"holds": not result.problems, "problems": result.problems, **content}, indent=1))
    else:
        print(format_certificate(result.record))
    if result.problems:
        raise ResultError(f"the certificate does not hold: {'; '.join(result.problems)}")
    if not as_json:
        print(_conclude(result.record))


def _conclude(record: CertificateRecord) -> str:
    """A sentence that the certificate holds, and which part of it was taken from an earlier certificate."""
    budget = record.budget
    if budget is not None and budget.resumed:
        samples = f"{budget.ends - budget.begins} samples, on top of {budget.begins} as the earlier certificate says"
        return f"recomputed on {samples} (verify that one, too): the certificate holds"
    return f"recomputed on {record.n} samples: the certificate holds"
