"""The command line. The only place that prints: results on stdout, progress and errors on stderr.

Exit codes: 0 done; 1 a defect of ours; 2 the input is wrong; 3 the result failed its own check; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pxcompress import __version__
from pxcompress.errors import InputError, PxError, ResultError

INTERRUPTED = 130
"""What Typer exits with after Ctrl-C."""

app = typer.Typer(
    name="pxcompress",
    help="Make trained vision models physically smaller: attribution, structured pruning, repair, ONNX, proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Option(help="timm name, hf-hub:NAME, local-dir:PATH, or package.module:factory for your own nn.Module.")
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights: .safetensors, or .pth that holds tensors only.")]
InputSize = Annotated[int | None, typer.Option(help="Side of the square input, pixels.  [default: the model's own]")]
Provider = Annotated[str, typer.Option(help="ONNX Runtime execution provider: auto, cuda, tensorrt or cpu.")]
Threads = Annotated[int, typer.Option(help="CPU threads of ONNX Runtime; 0: all physical cores.")]
MaxDrop = Annotated[float | None, typer.Option(help="Certify that the risk is at most this, such as 0.03.")]
Confidence = Annotated[float | None, typer.Option(help="Of the certificate.  [default: 0.95]")]
Risk = Annotated[
    str | None,
    typer.Option(
        help="What is certified: negative-flips, disagreement, accuracy-drop or top1-error.  [default: negative-flips]"
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        help="Which predictions count: all, confident (those of which the dense model is sure), or classes (the risk "
        "is held in every class, by true label).  [default: all]"
    ),
]
Coverage = Annotated[
    float | None, typer.Option(help="With --part confident: share of the select split that counts.  [default: 0.8]")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pxcompress {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options that come before the command."""


@app.command()
def run(
    model: Model,
    ratio: Annotated[float, typer.Option(help="Share of the dense cost to remove, in the budget's unit.")],
    budget: Annotated[str, typer.Option(help="What ratio is a share of: channels, params or macs.")] = "channels",
    data: Annotated[str, typer.Option(help="digits, glyphs, an image folder, or a timm dataset spec.")] = "digits",
    classes: Annotated[
        str | None, typer.Option(help="Keep only these classes: names with commas, or a file with one per line.")
    ] = None,
    checkpoint: Checkpoint = None,
    input_size: InputSize = None,
    score: Annotated[
        str, typer.Option(help="Scorer, as NAME:option=value,...; see `pxcompress methods`.")
    ] = "lrp-residual",
    normalise: Annotated[
        str,
        typer.Option(
            help="How groups are made comparable: none, mean, max, sum, norm, cost, uniform, isomorphic, auto."
        ),
    ] = "auto",
    repair: Annotated[
        list[str] | None, typer.Option(help="Repairs in order (repeat the option); `none` for none.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="Prune in this many steps, scored and repaired anew after each; more time, small gains.")
    ] = 1,
    round_to: Annotated[int, typer.Option(help="Widths are multiples of this; 1: no alignment.")] = 8,
    min_keep: Annotated[float, typer.Option(help="Least share of every group that stays.")] = 0.1,
    class_scores: Annotated[
        bool,
        typer.Option("--class-scores", help="Keep units' relevance for every class; needs labels of the score split."),
    ] = False,
    class_guard: Annotated[
        bool,
        typer.Option("--class-guard", help="Raise scores of what single classes rest on; implies --class-scores."),
    ] = False,
    max_drop: MaxDrop = None,
    confidence: Confidence = None,
    risk: Risk = None,
    steps: Annotated[
        int | None, typer.Option(help="Models on the path to --ratio that --max-drop tests.  [default: 8]")
    ] = None,
    part: Part = None,
    coverage: Coverage = None,
    batch_size: Annotated[int, typer.Option(help="Samples per call when latency is measured.")] = 1,
    provider: Provider = "auto",
    threads: Threads = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder.  [default: exported/MODEL-BUDGET-RATIO]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run folder if it exists.")] = False,
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out images that cannot be read, and count them.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prune, repair, export and measure a model; the run folder holds the artefact and the proof.

    With --max-drop the result is the smallest model, at most --ratio smaller, for which that much is certified; where
    there is none the folder holds the dense model, and the exit code is 3.
    """
    from pxcompress.pipeline import assist, compress
    from pxcompress.ranks import is_first, joined
    from pxcompress.recipe import Bench, Recipe
    from pxcompress.report.build import to_json
    from pxcompress.report.table import to_table

    chosen: dict[str, Any] = {} if repair is None else {"repair": () if repair == ["none"] else tuple(repair)}
    recipe = Recipe(
        model=model,
        ratio=ratio,
        budget=budget,
        data=data,
        classes=() if classes is None else _names(classes),
        checkpoint=None if checkpoint is None else str(checkpoint),
        input_size=input_size,
        scorer=score,
        normalise=normalise,
        rounds=rounds,
        round_to=round_to,
        min_keep=min_keep,
        class_scores=class_scores,
        class_guard=class_guard,
        bench=Bench(batch_size, provider, threads),
        guarantee=_guarantee(max_drop, confidence=confidence, risk=risk, steps=steps, part=part, coverage=coverage),
        skip_corrupt=skip_corrupt,
        seed=seed,
        **chosen,
    )
    with joined():
        if not is_first():
            return assist(recipe)
        report = compress(recipe, out, force=force, note=_notes(quiet))
    print(to_json(report) if as_json else to_table(report))
    if report.certificate is not None and not report.certificate["chosen"]:
        raise ResultError(f"not certified: no smaller model passes; the dense one is in {report.folder}")


def _names(text: str) -> tuple[str, ...]:
    """Class names from a file, one per line, or from `text`, with commas."""
    try:
        parts = Path(text).read_text().splitlines() if os.path.isfile(text) else text.split(",")
    except UnicodeDecodeError as error:
        raise InputError(f"classes {text!r} is not a text file; expected one with a class name per line") from error
    names = tuple(name for part in parts if (name := part.strip()))
    if not names:
        raise InputError(f"classes {text!r} has no names; expected names with commas, or a file with one per line")
    return names


def _guarantee(max_drop: float | None, **given: Any) -> Any:
    """What --max-drop and its companions ask for; None without it."""
    from pxcompress.recipe import Guarantee

    chosen = {name: value for name, value in given.items() if value is not None}
    if max_drop is not None:
        return Guarantee(max_drop, **chosen)
    if chosen:
        raise InputError(f"--{next(iter(chosen))} has no effect without --max-drop; add it")
    return None


@app.command()
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
    from pxcompress.certificate import certify_files
    from pxcompress.report.table import certificate_table

    guarantee = _guarantee(max_drop, confidence=confidence, risk=risk, part=part, coverage=coverage)
    content = certify_files(files, data, guarantee, seed)
    print(json.dumps(content, indent=1) if as_json else certificate_table(content))
    if not content["chosen"]:
        raise ResultError("not certified: no model smaller than the first one passes")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A run folder made with --max-drop.")],
    data: Annotated[str, typer.Option(help="Where the data are now.  [default: as in the run]")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute the certificate of a run folder from its data and ONNX files; exit code 3 if it does not hold."""
    from pxcompress.certificate import verify as recompute
    from pxcompress.report.table import certificate_table

    result = recompute(folder, data, _notes(quiet))
    if as_json:
        print(json.dumps({"holds": not result.problems, "problems": result.problems, **result.content}, indent=1))
    else:
        print(certificate_table(result.content))
    if result.problems:
        raise ResultError(f"the certificate does not hold: {'; '.join(result.problems)}")
    if not as_json:
        print(f"recomputed on {result.content['n']} samples: the certificate holds")


@app.command()
def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    classes: Annotated[int | None, typer.Option(help="Classes of the data.  [default: the model's own]")] = None,
    input_size: InputSize = None,
    relevance: Annotated[
        bool, typer.Option("--relevance", help="Add relevance in and out of every layer, and what has no rule.")
    ] = False,
    composite: Annotated[
        str, typer.Option(help="Rules of --relevance; see `pxcompress methods`.  [default: the scorer lrp's]")
    ] = "",
    data: Annotated[
        str, typer.Option(help="Images of --relevance, as for `run`, with the weights `run` uses.  [default: noise]")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List what can be removed from a model and what it costs, what stays and why. Needs no data."""
    from pxcompress.conservation import conservation, random_images
    from pxcompress.conservation import to_table as flow_table
    from pxcompress.models import load_model
    from pxcompress.survey import survey, to_table

    if (composite or data) and not relevance:
        raise InputError(f"{'--composite' if composite else '--data'} has no effect without --relevance; add it")
    if data:
        if classes is not None:
            raise InputError(f"--classes {classes} is given, but --data {data!r} says how many; leave one out")
        loaded, inputs = _on_data(model, checkpoint, input_size, data)
    else:
        loaded = load_model(model, classes=classes, checkpoint=checkpoint, input_size=input_size)
        inputs = random_images(loaded.preprocessing.input_size)
    result = survey(model, loaded)
    words = {"data": data or "random images", "weights": loaded.weights}
    flow = conservation(loaded.model, inputs, composite, **words) if relevance else None
    if as_json:
        added = {} if flow is None else {"relevance": dataclasses.asdict(flow)}
        print(json.dumps({**dataclasses.asdict(result), **added}, indent=1))
    else:
        print(to_table(result) if flow is None else f"{to_table(result)}\n\n{flow_table(flow)}")


def _on_data(model: str, checkpoint: Path | None, input_size: int | None, data: str) -> tuple[Any, Any]:
    """A model as `run` would have it on `data`, and the first batch of the score split."""
    from pxcompress.recipe import Recipe
    from pxcompress.subject import load_subject, with_baseline

    weights = None if checkpoint is None else str(checkpoint)
    recipe = Recipe(model=model, ratio=0.5, data=data, checkpoint=weights, input_size=input_size)
    subject = with_baseline(load_subject(recipe), recipe.seed, _notes(quiet=False))
    return subject.loaded, next(iter(subject.splits.score))[0]


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="ONNX classifiers or run folders, timed in turns.")],
    batch_size: Annotated[str, typer.Option(help="Samples per call; several with commas.")] = "1",
    provider: Provider = "auto",
    threads: Threads = 0,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the square input, pixels, where the file leaves it open.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time ONNX files on ONNX Runtime: latency percentiles, throughput, and which provider ran how many nodes."""
    from pxcompress.measure import bench as time_files
    from pxcompress.report.table import bench_table

    try:
        sizes = [int(part) for part in batch_size.split(",")]
    except ValueError:
        raise InputError(f"batch-size is {batch_size!r}; expected whole numbers with commas, like 1,8,32") from None
    size = None if input_size is None else (3, input_size, input_size)
    files = [file / "model.onnx" if file.is_dir() else file for file in files]
    rows = time_files(files, sizes, provider=provider, threads=threads, input_size=size)
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if as_json else bench_table(rows))


@app.command()
def methods() -> None:
    """List scorers, budgets and repairs with their options, and composites with the rules that they are made of."""
    from pxcompress.attribution import COMPOSITES, RULES, SOFTMAX_RULES
    from pxcompress.budgets import BUDGETS
    from pxcompress.repair import REPAIRS
    from pxcompress.scorers import SCORERS

    for registry in (SCORERS, BUDGETS, REPAIRS):
        print(f"{registry.kind}s")
        for name in registry:
            print(f"  {name:<22} {(registry.get(name).__doc__ or '').splitlines()[0]}")
            for field in registry.options(name):
                low, high = field.metadata["low"], field.metadata["high"]
                span = "|".join(field.metadata["choices"]) or (f"{low} to {high}" if low is not None else "")
                print(f"      {field.name}={field.default}  {field.metadata['help']}{f'  [{span}]' if span else ''}")
    rules = {str(rule()): (rule.__doc__ or "").splitlines()[0] for rule in RULES.values()}
    for title, table in (("composite", COMPOSITES), ("rule", rules), ("softmax rule", SOFTMAX_RULES)):
        print(f"{title}s")
        for name, text in table.items():
            print(f"  {name:<22} {text}")


def _notes(quiet: bool) -> Callable[[str], None]:
    """Where progress goes: nowhere, to a live line on a terminal, or as plain lines into a log."""
    if quiet:
        return lambda message: None
    if not sys.stderr.isatty():
        return lambda message: print(message, file=sys.stderr, flush=True)
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    status = console.status("")

    def note(message: str) -> None:
        if message.endswith(" ..."):
            status.update(message)
            status.start()
        else:
            console.print(message, style="dim", markup=False)

    return note


def main() -> None:
    """Run the command line and exit; one line on stderr for every error that is not ours."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except PxError as error:
        print(f"pxcompress: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("pxcompress: interrupted; nothing was written", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno is None:
            raise
        print(
            f"pxcompress: {error.strerror}: {error.filename or 'while writing'}; nothing was written", file=sys.stderr
        )
        sys.exit(2)
