"""`pxcompress certify`: test models that are already there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pxcompress.choices import LOSS_RISKS
from pxcompress.commands.options import AsJson, Confidence, Coverage, Part, Quiet, Risk, guarantee_of
from pxcompress.commands.terminal import notes
from pxcompress.errors import InputError, ResultError

if TYPE_CHECKING:
    from pxcompress.certify.record import CertificateRecord
    from pxcompress.recipe import Guarantee
    from pxcompress.run_folder.labelling import LabelRequest


def certify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="A run folder, or ONNX files from dense to smallest.", show_default=False),
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="Certify that the risk is at most this.")] = None,
    data: Annotated[str, typer.Option(help="As for `run`.  [default: the run folder's]")] = "",
    unlabelled: Annotated[
        str, typer.Option(help="Instead of --data: images, a folder or table; asks for labels where models disagree.")
    ] = "",
    answers: Annotated[
        Path | None, typer.Option(help="The filled to_label.csv: go on with what --out asked for.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the certificate, and what is to be labelled.  [default: certificate]"),
    ] = None,
    losses: Annotated[
        Path | None,
        typer.Option(
            help="Instead of models: CSV of their losses in [0, 1], a column a model, from dense to smallest."
        ),
    ] = None,
    group: Annotated[
        str, typer.Option(help="Column of words in the table of data, images or losses; the risk is held for each.")
    ] = "",
    anytime: Annotated[
        bool,
        typer.Option(
            "--anytime",
            help="Stop when it is decided; samples not looked at stay fresh; one error budget for all tests.",
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="certificate.json of a test with --anytime, which goes on with the samples it has not seen."),
    ] = None,
    confidence: Confidence = None,
    risk: Risk = None,
    part: Part = None,
    coverage: Coverage = None,
    seed: Annotated[int, typer.Option(help="Seed of the split, as it was in `run`.")] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Test a given path of models on samples that are kept for certificates; exit code 3 if none passes.

    Without labels: --unlabelled DIR writes to_label.csv and to_label.html, to be filled; --answers FILE goes on.
    """
    from pxcompress.certify.path import Goal
    from pxcompress.run_folder.labelling import QUESTIONS, certify_answers, request_labels
    from pxcompress.run_folder.ledger import Procedure, read_earlier
    from pxcompress.run_folder.loss_table import certify_losses
    from pxcompress.run_folder.model_files import certify_files

    note, place = notes(quiet), out or Path("certificate")
    models: dict[str, object] = {"a model": files, "--data": data, "--unlabelled": unlabelled, "--part": part}
    wanted: dict[str, object] = {"--max-drop": max_drop, "--confidence": confidence, "--risk": risk}
    if answers is not None:
        _refuse(models | wanted | {"--losses": losses, "--anytime": anytime, "--group": group}, "--answers")
        _refuse({"--resume": resume}, "--answers")
        return _show(certify_answers(answers, place, note), as_json)
    procedure = Procedure(anytime, group)
    goal: Goal | Guarantee
    if resume is not None:
        _refuse(wanted | {"--part": part, "--group": group}, "--resume")
        earlier = read_earlier(resume)
        procedure = Procedure(True, earlier.group, earlier)
        goal = earlier.certificate.goal
    elif max_drop is None:
        raise InputError("nothing says what to certify; give --max-drop, such as 0.03")
    elif losses is not None:
        delta = round(1 - (0.95 if confidence is None else confidence), 12)
        goal = Goal(risk or LOSS_RISKS[0], max_drop, delta, anytime=anytime)
    else:
        goal = guarantee_of(max_drop, confidence=confidence, risk=risk, part=part, coverage=coverage)
    if losses is not None:
        _refuse(models, "--losses")
        assert isinstance(goal, Goal)
        return _show(certify_losses(losses, goal, procedure.group, procedure.earlier), as_json, out)
    if not unlabelled:
        if not files:
            raise InputError("no model is given; expected a run folder, or ONNX files from dense to smallest")
        return _show(certify_files(files, data, goal, seed, procedure), as_json, out)
    if data:
        raise InputError("--data and --unlabelled are given; give one of them")
    request = request_labels(files or [], unlabelled, goal, place, procedure, note)
    if not request.to_label:
        return _show(certify_answers(place / QUESTIONS, place, note), as_json)
    print(json.dumps(dataclasses.asdict(request), indent=1) if as_json else _to_do(request, place))


def _refuse(given: Mapping[str, object], beside: str) -> None:
    """Raise `InputError` where something is given beside an option that says everything already."""
    if extra := [name for name, value in given.items() if value]:
        raise InputError(f"{extra[0]} is given with {beside}, which says what is tested; leave it out")


def _to_do(request: LabelRequest, folder: Path) -> str:
    """What a person has to do next."""
    from pxcompress.run_folder.labelling import PAGE, QUESTIONS, next_command

    count = f"{request.to_label} of {request.images} images need a label"
    if request.budget is not None:
        count = f"{count}, from the first line on until --answers says that the path is decided"
    return (
        f"{count}: on the others the models agree, so that their loss is 0\n"
        f"next: fill in {folder / PAGE} in a browser and save, or {folder / QUESTIONS} in a spreadsheet; then\n"
        f"      {next_command(folder)}"
    )


def _show(record: CertificateRecord, as_json: bool, out: Path | None = None) -> None:
    """Print a certificate, and write it into the folder `out`; `ResultError` where it certifies no smaller model."""
    from pxcompress.report.table import format_certificate
    from pxcompress.run_folder.certificate import FILE

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / FILE).write_text(json.dumps(dataclasses.asdict(record), indent=1))
    print(json.dumps(dataclasses.asdict(record), indent=1) if as_json else format_certificate(record))
    if not record.chosen:
        raise ResultError("not certified: no model smaller than the first one passes")
