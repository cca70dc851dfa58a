"""The survey of `pxcompress inspect`: the groups of a model, what they cost, and what stays and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import wrap

from pxcompress.clock import Clock
from pxcompress.columns import align
from pxcompress.cost.count import count_params, macs_meter, params_meter
from pxcompress.cost.latency import Conditions, latency_meter
from pxcompress.deploy.onnx_modules import check_agrees
from pxcompress.graph import find_groups, make_rotatable
from pxcompress.models.inputs import blank_inputs
from pxcompress.models.loading import LoadedModel, classifier_names, load_model
from pxcompress.models.onnx_file import count_numbers, ports_for
from pxcompress.notes import Note, silent
from pxcompress.tasks.choice import as_judged
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import FixedLayer, ImageSize, Kind


@dataclass(frozen=True)
class GroupCost:
    """The cost of one group, as shares of the whole model's cost: everything that is removed with all of its units.

    A layer between two groups counts in both, so the shares of all groups add up to more than one.
    """

    name: str
    kind: Kind
    units: int
    layers: int
    params_share: float
    macs_share: float
    latency_share: float | None = None


@dataclass(frozen=True)
class Survey:
    """The result of `pxcompress inspect`; costs are for one sample of `input_shape` (channels, height, width)."""

    model: str
    input_shape: tuple[int, ...]
    classes: int
    params: int
    macs: int
    units: int
    latency_ms: float | None
    groups: tuple[GroupCost, ...]
    fixed: tuple[FixedLayer, ...]


def load_for(
    name: str, task: Task, classes: int | None, checkpoint: Path | None, input_size: ImageSize | int | None
) -> LoadedModel:
    """Load the model `name` for a task, without data. Raises `ModelError`."""
    is_classifier = isinstance(task, Classification)
    ports = ports_for(name)
    inputs = () if ports is None or ports.takes_one_array else ports.blank()
    loaded = load_model(
        name,
        classes=classes,
        checkpoint=checkpoint,
        input_size=(count_numbers(inputs),) if inputs else input_size,
        classifier=is_classifier,
        inputs=inputs,
    )
    check_agrees(loaded.model)
    if is_classifier:
        return loaded
    return replace(loaded, model=as_judged(loaded.model, blank_inputs(loaded.preprocessing), task))


def survey(name: str, loaded: LoadedModel, conditions: Conditions | None = None, note: Note = silent) -> Survey:
    """Groups, units, and their shares of parameters, MACs, and, given `conditions`, milliseconds; needs no data.

    `note` is told about progress.
    """
    clock = Clock(note)
    model, shape = loaded.model, loaded.preprocessing.input_size
    example = blank_inputs(loaded.preprocessing)
    with clock.stage("find groups"):
        model = make_rotatable(model, example)
        structure = find_groups(model, example, classifier_names(model, example))
    params, macs = params_meter(model, structure.groups), macs_meter(model, structure.groups, example)
    latency = None
    if conditions:
        with clock.stage("time operators one by one; what was timed before is in the cache"):
            latency = latency_meter(model, structure.groups, example, conditions)
    rows = tuple(
        GroupCost(
            group.name,
            group.kind,
            group.units,
            len({member.module for member in group.members}),
            1 - params({group.name: 0}) / params({}),
            1 - macs({group.name: 0}) / macs({}),
            1 - latency({group.name: 0}) / latency({}) if latency else None,
        )
        for group in structure.groups
    )
    units = sum(group.units for group in structure.groups)
    costs = count_params(loaded.model), int(macs({}))
    milliseconds = latency({}) if latency else None
    return Survey(name, shape, loaded.classes, *costs, units, milliseconds, rows, structure.fixed)


def to_table(result: Survey) -> str:
    """The survey as text for a terminal."""
    shape = " x ".join(str(size) for size in result.input_shape)
    classes = f", {result.classes} classes" if result.classes else ""
    lines = [
        f"{result.model}: {result.params:,} parameters, {result.macs:,} MACs at {shape}{classes}; "
        f"{result.units:,} removable units in {len(result.groups)} groups"
        + ("" if result.latency_ms is None else f"; {result.latency_ms:.4g} ms a call, as its operators add up to"),
        "",
    ]
    rows = [("group", "kind", "units", "layers", "params", "MACs", "" if result.latency_ms is None else "latency")]
    for row in result.groups:
        time = "" if row.latency_share is None else f"{row.latency_share:.1%}"
        shares = f"{row.params_share:.1%}", f"{row.macs_share:.1%}", time
        rows.append((row.name, row.kind, str(row.units), str(row.layers), *shares))
    return "\n".join([*lines, *align(rows, "<<>>>>>"), *_OVERLAP, "", *_list_whole(result.fixed)])


_OVERLAP = (
    "",
    "Shares are of the whole model: all that would go with every unit of a group, of",
    "the layers that make its units and of those that read them. A layer between two",
    "groups is in both, so the shares add up to more than 100 %.",
)


def _list_whole(fixed: Sequence[FixedLayer]) -> Iterator[str]:
    """Lines of text on the layers that keep all their outputs, by reason; number of outputs in brackets."""
    yield f"stays whole: {len(fixed)} layer{'s' * (len(fixed) > 1)} (outputs in brackets); all others are in groups"
    for reason, layers in by_reason(fixed).items():
        yield f"  {reason}:"
        yield from wrap(
            ", ".join(f"{layer.name} ({layer.units})" for layer in layers),
            80,
            initial_indent="    ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def by_reason(fixed: Sequence[FixedLayer]) -> dict[str, list[FixedLayer]]:
    """Reason -> the layers that stay for it, in order."""
    reasons: dict[str, list[FixedLayer]] = {}
    for layer in fixed:
        reasons.setdefault(layer.reason, []).append(layer)
    return reasons
