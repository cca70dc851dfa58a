"""Records of what `pxcompress explain` computes, as JSON and as a table for the terminal."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pxcompress.columns import align
from pxcompress.report.summary import format_percent
from pxcompress.types import Kind

_WIDTH = 80
_NAME_WIDTH = 30
_LAYERS = 8
"""Most layers that the table lists; explain.json has all."""

Map = NDArray[np.float32]

TARGET_COLOUR = (255, 224, 130)
"""Colour (red, green, blue) for positions of a sequence that decide its class."""


@dataclass(frozen=True)
class Decision:
    """A model's answer for an input, in words; a class comes with its softmax probability."""

    name: str
    probability: float | None

    def __str__(self) -> str:
        return self.name if self.probability is None else f"{self.name} ({self.probability:.0%})"


@dataclass(frozen=True)
class CarryingUnit:
    """A unit with much of the relevance for a decision of the dense model (divided by the logit), and whether it was
    kept.
    """

    layer: str
    kind: Kind
    unit: int
    relevance: float
    kept: bool


@dataclass(frozen=True, eq=False)
class Marks:
    """What a model draws on an image.

    `boxes` are x1, y1, x2, y2 in pixels, each with the number of its class and a name; or `regions` have the class of
    every pixel.
    """

    boxes: tuple[tuple[float, ...], ...] = ()
    classes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    regions: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class Pictures:
    """The input as an image (height, width, 3) uint8, and heatmaps of relevance (height, width).

    `dense` and `pruned` are for the dense model's class, `own` is for the pruned model's where that is another one. An
    input that is no image has colours (positions, 3), maps (positions,), and as its `text` the letters or words that it
    is made of. `marks` are the dense and the pruned model's, where their answers are drawn on the image.
    """

    image: NDArray[np.uint8]
    dense: Map
    pruned: Map
    own: Map | None
    text: tuple[str, ...] = ()
    marks: tuple[Marks, ...] = ()

    @property
    def is_line(self) -> bool:
        """Whether the input is a sequence, drawn as a line of cells."""
        return self.dense.ndim == 1


@dataclass(frozen=True, eq=False)
class Case:
    """One explained input, by its name `sample`; `kind` says why it was chosen, such as "changed".

    `label` is None where the data have none. `subjects` are the outputs whose relevance is shown, in words, such as
    class names: first the dense model's largest output, shown for both models, then the pruned model's own largest
    one. `agreement` and `similarity` (by the names of `SIMILARITIES`) compare the heatmaps, `units` carry the most
    relevance.
    """

    sample: str
    kind: str
    label: str | None
    dense: Decision
    pruned: Decision
    agreement: float
    subjects: tuple[str, ...]
    similarity: Mapping[str, float]
    units: tuple[CarryingUnit, ...]
    pictures: Pictures = field(metadata={"json": False})


@dataclass(frozen=True)
class KindSimilarity:
    """Similarity of both models' heatmaps, and the sparsity of each: means over samples of one kind.

    They are of the dense model's class; `cosine_own` is between those of the class that each model predicts itself.
    """

    kind: str
    samples: int
    cosine: float
    rank_correlation: float
    top_overlap: float
    cosine_own: float
    gini_dense: float
    gini_pruned: float


@dataclass(frozen=True)
class TargetRelevance:
    """How much relevance lies on the positions that decide the class, by masks in the data: means over samples.

    `mass` is the share of the positive relevance that lies there, `rank` the share of its K positions among the K
    with the most relevance; `covered` is its share of all positions, what chance gives.
    """

    samples: int
    mass_dense: float
    mass_pruned: float
    rank_dense: float
    rank_pruned: float
    covered: float


@dataclass(frozen=True)
class LayerRelevance:
    """The share of a layer's relevance in the dense model that removed units carried, before repair."""

    name: str
    kind: Kind
    units: int
    kept: int
    removed: float


@dataclass(frozen=True)
class Flipping:
    """Areas under the pixel-flipping curve of a `measure`: by either model's relevance, and in a random order."""

    dense: float
    pruned: float
    random: float
    samples: int
    measure: str = "probability of the class"


@dataclass(frozen=True, eq=False)
class Explanation:
    """The comparison of both models' heatmaps, which are for the dense model's class, or for the named `subject`.

    A field may say otherwise.
    """

    model: str
    inputs: str
    method: str
    share: float
    composite: str
    subject: str
    similarity: tuple[KindSimilarity, ...]
    flipping: Flipping
    layers: tuple[LayerRelevance, ...]
    cases: tuple[Case, ...]
    target_relevance: TargetRelevance | None = None
    notes: tuple[str, ...] = ()


def format_explanation_json(explanation: Explanation) -> str:
    """The text of explain.json: all fields of the records but the pictures."""
    return json.dumps({"schema_version": 3, **_to_plain(explanation)}, indent=1, allow_nan=False)


def _to_plain(record: Any) -> Any:
    if dataclasses.is_dataclass(record):
        visible = [each for each in dataclasses.fields(record) if each.metadata.get("json", True)]
        return {each.name: _to_plain(getattr(record, each.name)) for each in visible}
    if isinstance(record, tuple):
        return [_to_plain(each) for each in record]
    return dict(record) if isinstance(record, Mapping) else record


def format_explanation(explanation: Explanation) -> str:
    """An explanation as text for the terminal, 80 columns wide. It has no newline at the end."""
    rows: list[tuple[str, ...]] = [
        ("inputs", "n", "cosine", "rank corr.", "top 10 %", "own class", "Gini dense", "pruned")
    ]
    rows += [(row.kind, str(row.samples), *format_means(row)) for row in explanation.similarity]
    sentences = [
        describe_method(explanation),
        *describe_findings(explanation),
        *(f"note: {note}" for note in explanation.notes),
    ]
    worst_layers = sorted(explanation.layers, key=lambda row: -row.removed)[:_LAYERS]
    layers = [("layer", "units", "kept", "relevance that the removed ones carried")]
    layers += [
        (_shorten_front(row.name), str(row.units), str(row.kept), format_percent(row.removed)) for row in worst_layers
    ]
    parts = [align(rows), _wrap(sentences), align(layers), _wrap(map(describe_case, explanation.cases))]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _shorten_front(name: str) -> str:
    """A module's name cut at the front to the width of the column, since its end is more distinctive."""
    return name if len(name) <= _NAME_WIDTH else f"...{name[3 - _NAME_WIDTH :]}"


def _wrap(texts: Any) -> Sequence[str]:
    return [line for text in texts for line in textwrap.wrap(text, _WIDTH, subsequent_indent="  ")]


def format_means(row: KindSimilarity) -> tuple[str, ...]:
    """The means in a row as texts with three decimals."""
    values = (row.cosine, row.rank_correlation, row.top_overlap, row.cosine_own, row.gini_dense, row.gini_pruned)
    return tuple(f"{value:.3f}" for value in values)


_CLASS = (
    "the class that the dense model predicts, in both models; own class: cosine where each explains its own decision"
)
"""Words for what is explained in classifiers."""


def describe_method(explanation: Explanation) -> str:
    """One sentence on how the heatmaps were made."""
    pruning_note = f", {explanation.share:.0%} of the mass pruned in each layer" if explanation.share else ""
    subject = f"{explanation.subject}, in both models" if explanation.subject else _CLASS
    return (
        f"{explanation.inputs}; {explanation.method} with rules {explanation.composite}{pruning_note}; "
        f"relevance of {subject}"
    )


def describe_findings(explanation: Explanation) -> Sequence[str]:
    """Sentences on the results other than similarity."""
    return [
        describe_flipping(explanation.flipping),
        *([] if explanation.target_relevance is None else [describe_target_relevance(explanation.target_relevance)]),
    ]


def describe_target_relevance(target_relevance: TargetRelevance) -> str:
    """One sentence on how much relevance lies on the positions that decide the class."""
    return (
        f"relevance where the data know that the class is made, more is better: share of the mass dense "
        f"{target_relevance.mass_dense:.3f}, pruned {target_relevance.mass_pruned:.3f}; of the top ranks dense "
        f"{target_relevance.rank_dense:.3f}, pruned {target_relevance.rank_pruned:.3f}; by chance "
        f"{target_relevance.covered:.3f} ({target_relevance.samples} inputs)"
    )


def describe_flipping(flipping: Flipping) -> str:
    """One sentence on the results of pixel flipping."""
    return (
        f"pixel flipping, area under the curve of the {flipping.measure}, less is more faithful: dense "
        f"{flipping.dense:.3f}, pruned {flipping.pruned:.3f}, random order {flipping.random:.3f} "
        f"({flipping.samples} inputs)"
    )


def describe_case(case: Case) -> str:
    """One line on a case."""
    agreement = "" if case.dense.probability is not None else f"agreement {case.agreement:.2f}, "
    cosine = f"{agreement}cosine {case.similarity['cosine']:.2f}"
    return f"{case.kind}: {case.sample}{describe_label(case)}: dense {case.dense}, pruned {case.pruned}, {cosine}"


def describe_label(case: Case) -> str:
    """The class or value that the data give for a case, as words to append; "" if they give none."""
    if case.label is None:
        return ""
    return f" of class {case.label}" if case.dense.probability is not None else f", by the data {case.label}"
