"""`pxcompress inspect`: what can be removed, and what it costs."""

from __future__ import annotations

import dataclasses
import json
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
        str,
        typer.Option(
            help="What outputs mean, as for `run`: agreement takes any.  [default: classification, or by --data]"
        ),
    ] = "",
    relevance: Annotated[
        bool, typer.Option("--relevance", help="Add relevance in and out of every layer, and what has no rule.")
    ] = False,
    composite: Annotated[
        str, typer.Option(help="Rules of --relevance; see `pxcompress methods`.  [default: the scorer lrp's]")
    ] = "",
    data: Annotated[
        str, typer.Option(help="Images of --relevance, as for `run`, with the weights `run` uses.  [default: noise]")
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
    from pxcompress.inspection.conservation import conservation, random_images
    from pxcompress.inspection.conservation import to_table as flow_table
    from pxcompress.inspection.survey import load_for, survey, to_table
    from pxcompress.tasks.choice import build_task

    if (composite or data) and not relevance:
        raise InputError(f"{'--composite' if composite else '--data'} has no effect without --relevance; add it")
    if data:
        if classes is not None:
            raise InputError(f"--classes {classes} is given, but --data {data!r} says how many; leave one out")
        model_of_data, inputs = _on_data(model, checkpoint, input_size, data, task)
    else:
        model_of_data = load_for(model, build_task(task or "classification"), classes, checkpoint, _pixels(input_size))
        inputs = random_images(model_of_data.preprocessing.input_size)
    conditions = Conditions(batch_size, provider, threads) if latency else None
    result = survey(model, model_of_data, conditions, notes(quiet=not latency))
    words = {"data": data or "random images", "weights": model_of_data.weights}
    flow = conservation(model_of_data.model, inputs, composite, **words) if relevance else None
    if as_json:
        relevance_record = {} if flow is None else {"relevance": dataclasses.asdict(flow)}
        print(json.dumps({**dataclasses.asdict(result), **relevance_record}, indent=1))
    else:
        print(to_table(result) if flow is None else f"{to_table(result)}\n\n{flow_table(flow)}")


def _pixels(text: str | None) -> Any:
    """The input size as models are loaded with it."""
    from pxcompress.types import ImageSize

    size = None if text is None else read_input_size(text)
    return ImageSize(*size) if isinstance(size, tuple) else size


def _on_data(model: str, checkpoint: Path | None, input_size: str | None, data: str, task: str) -> tuple[Any, Any]:
    """A model as `run` would have it on `data`, for their task or `task`; and the first batch of the score split."""
    from pxcompress.recipe import ModelAndData
    from pxcompress.tasks.choice import AUTO
    from pxcompress.workload import load_workload, with_baseline

    weights = None if checkpoint is None else str(checkpoint)
    size = None if input_size is None else read_input_size(input_size)
    request = ModelAndData(model, data=data, checkpoint=weights, input_size=size, task=task or AUTO)
    workload = with_baseline(load_workload(request), request.seed, notes(quiet=False))
    return workload.loaded, next(iter(workload.splits.score))[0]
