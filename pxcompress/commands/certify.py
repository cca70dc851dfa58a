"""`pxcompress certify`: test models that are already there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pxcompress.choices import LOSS_RISKS
from pxcompress.commands.options import AsJson, Confidence, Coverage, Part, Quiet, Risk, takes_record
from pxcompress.commands.terminal import notes
from pxcompress.errors import InputError, ResultError
from pxcompress.recipe import Guarantee
from pxcompress.recipe.model_and_data import MOST_SEED

if TYPE_CHECKING:
    from pxcompress.certify.record import CertificateRecord
    from pxcompress.run_folder.labelling import LabelRequest
    from pxcompress.run_folder.ledger import Procedure


@dataclass(frozen=True)
class Request:
    """The command-line options of `certify`; each field is one."""

    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A run folder, or ONNX files in order, from the dense model to the smallest.", show_default=False
        ),
    ] = None
    max_drop: Annotated[
        float | None, typer.Option(help="Largest risk to certify, see --risk: a share, such as 0.03.")
    ] = None
    data: Annotated[
        str,
        typer.Option(
            help="Labelled data, as for `run --data`: of data that a run has used, the samples that it reserved for "
            "certificates; of new data, nearly all.  "
            "[default: the run folder's]"
        ),
    ] = ""
    unlabelled: Annotated[
        str,
        typer.Option(help="Instead of --data: images without labels; you label only those on which models disagree."),
    ] = ""
    answers: Annotated[
        Path | None, typer.Option(help="Second step of --unlabelled: the to_label.csv that you filled in.")
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the certificate, and for what is to be labelled.  "
            "[default: none, or certificate where images are to be labelled]"
        ),
    ] = None
    losses: Annotated[
        Path | None,
        typer.Option(
            help="Instead of models: CSV file of their losses in [0, 1], a row per sample and a column per model, "
            "from dense to smallest."
        ),
    ] = None
    group: Annotated[
        str,
        typer.Option(
            help="A text column of the table of samples or losses; the bound on the risk must hold for each of its "
            "values."
        ),
    ] = ""
    anytime: Annotated[
        bool,
        typer.Option(
            "--anytime",
            help="Stop as soon as the result is clear; later tests may use the other samples, within one error budget.",
        ),
    ] = False
    resume: Annotated[
        Path | None,
        typer.Option(help="certificate.json of a test with --anytime, which goes on with the samples it has not seen."),
    ] = None
    confidence: Confidence = None
    risk: Risk = None
    part: Part = None
    coverage: Coverage = None
    seed: Annotated[
        int,
        typer.Option(
            help="The --seed that `run` had: it decides which samples are kept for certificates.",
            min=0,
            max=MOST_SEED,
        ),
    ] = 0
    provider: Annotated[
        str,
        typer.Option(help="Runtime on which the models are tested, both on the CPU: cpu (ONNX Runtime) or openvino."),
    ] = "cpu"
    quiet: Quiet = False
    as_json: AsJson = False

    def refuse(self, names: Sequence[str], beside: str) -> None:
        """Raise `InputError` if one of the options `names` is given, since `beside` is given and decides the same."""
        if extra := [name for name in names if getattr(self, name)]:
            flag = "a model" if extra[0] == "files" else f"--{extra[0].replace('_', '-')}"
            raise InputError(f"{flag} is given with {beside}, which says what is tested; leave it out")

    def guarantee(self, risk: str | None = None) -> Guarantee:
        """The guarantee that the options ask for; `risk` is its risk unless an option names one.

        Raises `InputError`.
        """
        if self.max_drop is None:
            raise InputError("nothing says what to certify; give --max-drop, such as 0.03")
        names = ("confidence", "part", "coverage", "group")
        options = {name: getattr(self, name) for name in names} | {"risk": self.risk or risk}
        return Guarantee(self.max_drop, **{name: value for name, value in options.items() if value is not None})

    def procedure(self) -> Procedure:
        """How losses are tested; with --resume it is taken from the earlier certificate.

        Raises `InputError` for more options.
        """
        from pxcompress.run_folder.ledger import Procedure, read_earlier

        if self.resume is None:
            return Procedure(self.anytime, self.group, provider=self.provider)
        self.refuse((*_GOAL, "part", "group"), "--resume")
        earlier = read_earlier(self.resume)
        return Procedure(True, earlier.group, earlier, self.provider)

    @property
    def place(self) -> Path:
        """The folder for the samples to label and the certificate."""
        return self.out or Path("certificate")


@takes_record(Request)
def certify(request: Request) -> None:
    """Certify the smallest of several models that loses little.

    The exit code is 3 if none passes. Models are tested in order on samples that no other stage has seen. The
    certificate says that the risk (--risk) is at most --max-drop with the confidence --confidence.

    Without labels, it takes two steps: `--unlabelled DIR` writes the images to label to --out (to_label.html for a
    browser, to_label.csv for a spreadsheet), and `--answers FILE` certifies with the labels that you filled in.
    """
    from pxcompress.run_folder.place import check_folder

    check_folder(request.place)
    if request.answers is not None:
        request.refuse((*_MODELS, *_GOAL, "losses", "anytime", "group", "resume"), "--answers")
        _show(_certify_labels(request, request.answers), request)
    elif request.losses is not None:
        request.refuse(_MODELS, "--losses")
        _show(_certify_losses(request, request.losses), request, request.out)
    elif request.unlabelled:
        _ask_for_labels(request)
    else:
        _show(_certify_models(request), request, request.out)


_MODELS = ("files", "data", "unlabelled", "part")
"""Options that say which models are tested, and on which data."""

NOT_WRITTEN = "the certificate is written nowhere; give --out FOLDER to keep it"

_GOAL = ("max_drop", "confidence", "risk")
"""Options that say which guarantee to certify."""


def _certify_labels(request: Request, answers: Path) -> CertificateRecord:
    """The certificate from the labels in the file `answers`."""
    from pxcompress.run_folder.labelling import certify_answers

    return certify_answers(answers, request.place, notes(request.quiet))


def _certify_losses(request: Request, table: Path) -> CertificateRecord:
    """Certify a table of losses, for the risk in the options or else for their mean."""
    from pxcompress.run_folder.loss_table import certify_losses

    procedure = request.procedure()
    limit = procedure.limit or dataclasses.replace(request.guarantee(LOSS_RISKS[0]).limit, anytime=request.anytime)
    return certify_losses(table, limit, procedure.group, procedure.earlier)


def _certify_models(request: Request) -> CertificateRecord:
    """Certify models on labelled data. Raises `InputError`."""
    from pxcompress.run_folder.model_files import certify_files

    procedure = request.procedure()
    guarantee = procedure.limit or request.guarantee()
    if not request.files:
        raise InputError("no model is given; expected a run folder, or ONNX files from dense to smallest")
    return certify_files(request.files, request.data, guarantee, request.seed, procedure, notes(request.quiet))


def _ask_for_labels(request: Request) -> None:
    """Write the list of samples to label, and print what to do next; certify at once if no labels are needed."""
    from pxcompress.run_folder.labelling import QUESTIONS, request_labels

    procedure, note = request.procedure(), notes(request.quiet)
    guarantee = procedure.limit or request.guarantee()
    if request.data:
        raise InputError("--data and --unlabelled are given; give one of them")
    files = request.files or []
    questions = request_labels(files, request.unlabelled, guarantee, request.place, procedure, note)
    if not questions.to_label:
        _show(_certify_labels(request, request.place / QUESTIONS), request)
    elif request.as_json:
        print(json.dumps(dataclasses.asdict(questions), indent=1))
    else:
        print(_to_do(questions, request.place))


def _to_do(request: LabelRequest, folder: Path) -> str:
    """A message that says what a person has to do next."""
    from pxcompress.run_folder.labelling import PAGE, QUESTIONS, next_command

    count = f"{request.to_label} of {request.images} images need a label"
    if request.budget is not None:
        count = f"{count}, from the first line on until --answers says that the path is decided"
    return (
        f"{count}: on the others the models agree, so that their loss is 0\n"
        f"next: fill in {folder / PAGE} in a browser and save, or {folder / QUESTIONS} in a spreadsheet; then\n"
        f"      {next_command(folder)}"
    )


def _show(record: CertificateRecord, request: Request, out: Path | None = None) -> None:
    """Print a certificate, and write it to `out` if given. Raises `ResultError` where it certifies no smaller model."""
    from pxcompress.report.table import format_certificate
    from pxcompress.run_folder.certificate import FILE, write_record

    if out is not None:
        write_record(record, out)
    print(json.dumps(dataclasses.asdict(record), indent=1) if request.as_json else format_certificate(record))
    if request.answers is None:
        written = f"written to {out / FILE}; check it with pxcompress verify {out}" if out else NOT_WRITTEN
        notes(request.quiet)(written)
    if not record.chosen:
        raise ResultError("not certified: no model smaller than the first one passes")
