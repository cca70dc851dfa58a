"""Writes a model card in Markdown: what the model is, what it costs, how to run it, and its limits."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pxcompress.errors import list_some
from pxcompress.report.certificates import make_badge
from pxcompress.report.classes import describe_class_changes
from pxcompress.report.record import Report
from pxcompress.report.similarity import describe_similarity
from pxcompress.report.summary import (
    capitalise,
    compare_figures,
    describe_conditions,
    format_change_span,
    format_command,
    format_percent,
    format_span,
    is_classifier,
    takes_images,
    write_headline,
)
from pxcompress.report.targets import list_columns, list_targets

_CLASSES = 20
"""Most class names that a card lists; the ONNX file has all."""


def to_card(report: Report) -> str:
    """The model card as Markdown; names given by the user (classes, folder, notes) are escaped."""
    model, images = _escape_text(report.recipe.model), takes_images(report)
    classes = list_some([f"`{_escape_code(name)}`" for name in report.data.classes], _CLASSES)
    parts = (
        f"# {model}, compressed",
        f"{_escape_text(write_headline(report)).capitalize()}. Made from `{_escape_code(model)}` on "
        f"`{_escape_code(report.data.name)}` by pxcompress {report.environment.pxcompress}: units whose part "
        "in the model's decisions the "
        f"others can take over were removed for good{_describe_repair(report)}.",
        "## Figures",
        _format_table(("", "dense", "this model", "change"), _list_figures(report)),
        f"Measured on the exported file: {_escape_text(describe_conditions(report))}.",
        *_show_precisions(report),
        *_describe_guarantee(report),
        *_describe_explanations(report),
        "## Use",
        *(("    pip install onnxruntime numpy pillow\n    python predict.py image.jpg",) if images else ()),
        f"{_describe_inputs(report)}; {_describe_outputs(report)}. Task: "
        f"`{_escape_code(report.task)}`. Preprocessing and class names stand in the file's "
        f"`metadata_props`{'; `predict.py` reads them' if images else ''}. In PyTorch: `pxcompress.load(folder)`.",
        *((f"Classes: {classes}.",) if report.data.classes else ()),
        "## Limits",
        "\n".join(f"- {_escape_text(note)}" for note in _list_limits(report)),
        "## Provenance",
        f"    {format_command(report.recipe)}",
        _format_table(
            ("file", "sha256"), [(f"`{_escape_code(name)}`", f"`{digest}`") for name, digest in report.sha256.items()]
        ),
        f"Parity with PyTorch on {report.parity.samples} samples: largest difference {report.parity.max_abs:.1e}, "
        f"{format_percent(report.parity.agreement)} agreement of the decisions.",
    )
    return "\n\n".join(parts) + "\n"


def _describe_repair(report: Report) -> str:
    """Words on how the remaining units were repaired; "" without a repair."""
    repairs = report.recipe.repair
    if not repairs:
        return ""
    trained = any(each.partition(":")[0] == "finetune" for each in repairs)
    return ", and those repaired" + (" and trained towards the dense model's outputs" if trained else " in closed form")


def _list_figures(report: Report) -> list[tuple[str, ...]]:
    metric = report.metric
    unit = f" {metric.change_unit}" if metric.change_unit else ""
    change = f"{metric.format_change(report.change.value)}{unit} ({format_change_span(report.change, metric)})"
    qualities = report.dense.quality, report.pruned.quality
    values = (f"{metric.format(of.value)} ({format_span(of.low, of.high, metric)})" for of in qualities)
    accuracy = (f"{metric.name} (95 % interval)", *values, change)
    return [accuracy, *((row.label, row.dense_text, row.pruned_text, row.change) for row in compare_figures(report))]


def _show_precisions(report: Report) -> Sequence[str]:
    return ("## Precisions", _format_table(list_columns(report), list_targets(report))) if report.targets else ()


def _describe_guarantee(report: Report) -> Sequence[str]:
    if report.certificate is None:
        return ()
    outcome = make_badge(report.certificate)
    return ("## Guarantee", f"**{outcome.title}:** {_escape_text(outcome.text)}")


def _describe_explanations(report: Report) -> Sequence[str]:
    line = describe_similarity(report)
    return (f"{_escape_text(capitalise(line))}.",) if line else ()


def _describe_inputs(report: Report) -> str:
    """A sentence on the inputs of the file."""
    if report.inputs:
        shapes = [(_escape_code(each.name), ", ".join(map(str, ("batch", *each.shape)))) for each in report.inputs]
        listed = ", ".join(f"`{name}`, ({shape})" for name, shape in shapes)
        return f"Inputs: {listed}"
    return f"Input: `input`, float32, (batch, {', '.join(map(str, report.input_shape))})"


def _describe_outputs(report: Report) -> str:
    """Words on the outputs of the file."""
    if is_classifier(report):
        return f"output: `logits`, (batch, {len(report.data.classes)})"
    return "outputs: those of the dense model, by name"


def _list_limits(report: Report) -> Sequence[str]:
    """The limits of the model: warnings of this run, and some that hold for every run."""
    data = report.data
    return (
        *(note.text for note in report.notes),
        f"accuracy is of {data.test} test samples of {data.name!r}; other cameras, places and times are not measured",
        describe_class_changes(report),
    )


def _format_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [
        head,
        ["---"] * len(head),
        *([_escape_text(cell) if "`" not in cell else cell for cell in row] for row in body),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape_text(text: str) -> str:
    """`text` on one line, with characters escaped that Markdown or HTML would interpret."""
    harmless = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in harmless)


def _escape_code(text: str) -> str:
    """`text` on one line, fit to stand between backticks."""
    return " ".join(text.replace("`", "'").replace("|", "/").split())
