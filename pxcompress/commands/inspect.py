"""`pxcompress inspect`: what can be removed, and what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pxcompress.commands.options import AsJson, Checkpoint, InputSize, Model, Provider, Threads, read_input_size
from pxcompress.commands.terminal import notes
from pxcompress.errors import InputError


def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes.  [default: the model's own]")] = None,
    input_size: InputSize = None,
    task: Annotated[
        str, typer.Option(help="As for `run`: agreement takes any outputs.  [default: classification, or by --data]")
    ] = "",
    relevance: Annotated[
        bool, typer.Option("--relevance", help="List LRP relevance in and out of layers, and functions without a rule.")
    ] = False,
    composite: Annotated[
        str, typer.Option(help="LRP rules for --relevance; see `pxcompress methods`.  [default: the scorer lrp's]")
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            help="Inputs for --relevance, as for `run --data`; the model gets the weights that it has there. Without "
            "--relevance: arrays with the sizes that an ONNX file leaves open.  [default: noise]"
        ),
    ] = "",
    latency: Annotated[
        bool, typer.Option("--latency", help="Add every group's share of the milliseconds on this machine.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Samples per call, for --latency.")] = 1,
    provider: Provider = "auto",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """List what can be removed from a model, what stays, and why.

    Costs are listed with it. No data are needed.
    """
    from pxcompress.cost.latency import Conditions
    from pxcompress.inspection.conservation import conservation
    from pxcompress.inspection.conservation import to_table as flow_table
    from pxcompress.inspection.survey import survey, to_table

    if not relevance:
        _check_use(model, composite, data)
    loaded, inputs = _load(model, checkpoint, input_size, classes, data, task)
    conditions = Conditions(batch_size, provider, threads) if latency else None
    result = survey(model, loaded, conditions, notes(quiet=not latency))
    words = {"data": data or "random images", "weights": loaded.weights}
    flow = conservation(loaded.model, inputs, composite, **words) if relevance else None
    content, tables = asdict(result), [to_table(result)]
    if flow:
        content["relevance"] = asdict(flow)
        tables.append(flow_table(flow))
    print(json.dumps(content, indent=1) if as_json else "\n\n".join(tables))


def _check_use(model: str, composite: str, data: str) -> None:
    """Raise `InputError` for options that have no effect without --relevance."""
    from pxcompress.models.onnx_file import is_onnx

    if composite or (data and not is_onnx(model)):
        raise InputError(f"{'--composite' if composite else '--data'} has no effect without --relevance; add it")


def _load(
    model: str, checkpoint: Path | None, input_size: str | None, classes: int | None, data: str, task: str
) -> tuple[Any, Any]:
    """The model in its task, and a batch of inputs for it: from the data, or random images without any.

    Raises `InputError` where both data and a number of classes are given.
    """
    if not data:
        return _load_without_data(model, checkpoint, input_size, classes, task)
    if classes is not None:
        raise InputError(f"--classes {classes} is given, but --data {data!r} says how many; leave one out")
    return _load_on_data(model, checkpoint, input_size, data, task)


def _load_without_data(
    model: str, checkpoint: Path | None, input_size: str | None, classes: int | None, task: str
) -> tuple[Any, Any]:
    """The model as it is loaded without data, and random images for it."""
    from pxcompress.inspection.conservation import random_images
    from pxcompress.inspection.survey import load_for
    from pxcompress.tasks import TASKS
    from pxcompress.types import ImageSize

    size = None if input_size is None else read_input_size(input_size)
    pixels = ImageSize(*size) if isinstance(size, tuple) else size
    loaded = load_for(model, TASKS.build(task or "classification"), classes, checkpoint, pixels)
    return loaded, random_images(loaded.preprocessing.input_size)


def _load_on_data(model: str, checkpoint: Path | None, input_size: str | None, data: str, task: str) -> tuple[Any, Any]:
    """The model as `run` would load it for `data`, and the first batch of the score split."""
    from pxcompress.recipe import ModelAndData
    from pxcompress.tasks.choice import AUTO
    from pxcompress.workload import load_workload, with_baseline

    weights = None if checkpoint is None else str(checkpoint)
    size = None if input_size is None else read_input_size(input_size)
    request = ModelAndData(model, data=data, checkpoint=weights, input_size=size, task=task or AUTO)
    workload = with_baseline(load_workload(request), request.seed, notes(quiet=False))
    return workload.loaded, next(iter(workload.splits.score))[0]
