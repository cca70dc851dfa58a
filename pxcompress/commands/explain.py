"""`pxcompress explain`: what both models look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Quiet
from pxcompress.commands.terminal import notes
from pxcompress.errors import InputError


def explain(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file to explain (repeat the option).  [default: the test split]")
    ] = None,
    data: Annotated[str, typer.Option(help="Other data to explain, or where the run's are now.")] = "",
    method: Annotated[str, typer.Option(help="lrp, or pruned LRP: plrp-lambda or plrp-m.")] = "lrp",
    share: Annotated[
        float | None,
        typer.Option(help="Share of relevance that pruned LRP drops in each layer.  [default: the best of several]"),
    ] = None,
    composite: Annotated[
        str, typer.Option(help="LRP rules; see `pxcompress methods`.  [default: those of the run's scorer]")
    ] = "",
    samples: Annotated[int | None, typer.Option(help="Inputs of the test split to compare.  [default: 128]")] = None,
    out: Annotated[Path | None, typer.Option(help="Another folder for page, record and figures.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what the dense and the pruned model look at, side by side.

    The comparison is added to FOLDER/report.html, with explain.json and figures in explain/ beside it; that of an
    earlier call is replaced. Nothing else in FOLDER changes, and with --out nothing at all.
    """
    from pxcompress.explain.compare import SAMPLES, ExplanationRequest
    from pxcompress.explain.compare import explain as explained
    from pxcompress.explain.folder import write
    from pxcompress.report.explanation import format_explanation, format_explanation_json
    from pxcompress.run_folder.place import check_folder

    if image and samples is not None:
        raise InputError(f"--samples {samples} has no effect beside --image; leave one out")
    if out is not None:
        check_folder(out)
    request = ExplanationRequest(method, composite, share, SAMPLES if samples is None else samples)
    explanation = explained(folder, image or None, data, request, notes(quiet))
    page = write(explanation, folder, out)
    print(format_explanation_json(explanation) if as_json else f"{format_explanation(explanation)}\n\n{page}")
