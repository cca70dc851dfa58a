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
    classes: Annotated[int | None, typer.Option(help="Classes of the data.  [default: the model's own]")] = None,
    input_size: InputSize = None,
    task: Annotated[
        str, typer.Option(help="As for `run`: agreement takes any outputs.  [default: classification, or by --data]")
    ] = "",
    relevance: Annotated[
        bool, typer.Option("--relevance", help="Add relevance in and out of every layer, and what has no rule.")
    ] = False,
    composite: Annotated[
        str, typer.Option(help="Rules of --relevance; see `pxcompress methods`.  [default: the scorer lrp's]")
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            help="Images of --relevance, as for `run`, with the weights `run` uses, or arrays that say the sizes which "
            "an ONNX file leaves open.  [default: noise]"
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

    Costs are listed with it. No data are needed, but for --relevance.
    """
    from pxcompress.cost.latency import Conditions
    from pxcompress.inspection.conservation import conservation
    from pxcompress.inspection.conservation import to_table as flow_table
    from pxcompress.inspection.survey import survey, to_table
    from pxcompress.models.onnx_file import is_onnx

    if (composite or (data and not is_onnx(model))) and not relevance:
        raise InputError(f"{'--composite' if composite else '--data'} has no effect without --relevance; add it")
    if data and classes is not None:
        raise InputError(f"--classes {classes} is given, but --data {data!r} says how many; leave one out")
    if data:
        loaded, inputs = _load_on_data(model, checkpoint, input_size, data, task)
    else:
        loaded, inputs = _load_without_data(model, checkpoint, input_size, classes, task)
    conditions = Conditions(batch_size, provider, threads) if latency else None
    result = survey(model, loaded, conditions, notes(quiet=not latency))
    words = {"data": data or "random images", "weights": loaded.weights}
    flow = conservation(loaded.model, inputs, composite, **words) if relevance else None
    if as_json:
        print(json.dumps(asdict(result) | ({"relevance": asdict(flow)} if flow else {}), indent=1))
    else:
        print(to_table(result) if flow is None else f"{to_table(result)}\n\n{flow_table(flow)}")


def _load_without_data(
    model: str, checkpoint: Path | None, input_size: str | None, classes: int | None, task: str
) -> tuple[Any, Any]:
    """A model as it is without data, and random images for it."""
    from pxcompress.inspection.conservation import random_images
    from pxcompress.inspection.survey import load_for
    from pxcompress.tasks.choice import build_task
    from pxcompress.types import ImageSize

    size = None if input_size is None else read_input_size(input_size)
    pixels = ImageSize(*size) if isinstance(size, tuple) else size
    loaded = load_for(model, build_task(task or "classification"), classes, checkpoint, pixels)
    return loaded, random_images(loaded.preprocessing.input_size)


def _load_on_data(model: str, checkpoint: Path | None, input_size: str | None, data: str, task: str) -> tuple[Any, Any]:
    """A model as `run` would have it on `data`, for their task or `task`; and the first batch of the score split."""
    from pxcompress.recipe import ModelAndData
    from pxcompress.tasks.choice import AUTO
    from pxcompress.workload import load_workload, with_baseline

    weights = None if checkpoint is None else str(checkpoint)
    size = None if input_size is None else read_input_size(input_size)
    request = ModelAndData(model, data=data, checkpoint=weights, input_size=size, task=task or AUTO)
    workload = with_baseline(load_workload(request), request.seed, notes(quiet=False))
    return workload.loaded, next(iter(workload.splits.score))[0]
