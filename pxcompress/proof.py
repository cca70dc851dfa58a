"""The proof: records of what was measured, under which conditions; `Report` holds them all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pxcompress.types import Attempt, Fixed, Kind


@dataclass(frozen=True)
class Artifact:
    """An exported ONNX file. `input_shape` has None for the dynamic batch."""

    path: Path
    opset: int
    input_shape: tuple[int | None, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Parity:
    """How far the exported file is from the PyTorch model on the same inputs."""

    samples: int
    max_abs: float
    top1_agreement: float
    passed: bool


@dataclass(frozen=True)
class Latency:
    """Wall time of one inference call, milliseconds; `quantiles` are those of 0 %, 5 % ... 100 % of the calls."""

    mean: float
    p50: float
    p90: float
    p99: float
    runs: int
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Speedup:
    """p50 of a reference / p50 of a model, with its 95 % interval over the runs of one measurement."""

    ratio: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        """ "1.90 to 2.11": both ends, rounded outwards, so that it never looks narrower than it is."""
        low, high = round(100 * self.low, 6), round(100 * self.high, 6)  # 1.1 * 100 is a little more than 110
        return f"{math.floor(low) / 100:.2f} to {math.ceil(high) / 100:.2f}"


@dataclass(frozen=True)
class Placement:
    """Which execution provider ran the graph. `fallback_reason` is empty when the asked one did all of it.

    `elsewhere` counts the nodes on other providers, by their name.
    """

    asked: str
    got: str
    nodes_on_provider: int
    nodes_total: int
    fallback_reason: str = ""
    elsewhere: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What one exported model costs and how often it is right. `top1` is a share in [0, 1]; throughput is samples/s."""

    top1: float
    samples: int
    params: int
    macs: int
    onnx_bytes: int
    latency_ms: Latency
    throughput: float
    batch_size: int
    provider: str
    precision: str = "fp32"


@dataclass(frozen=True)
class Target:
    """One ONNX file of a run folder, measured beside the others on the file itself.

    `agreement` is the share of test samples with the top-1 of model.onnx, `max_abs` the largest difference of a logit
    to it; `speedup` is against dense.onnx. On `both_right` samples dense.onnx is right as well.
    """

    file: str
    precision: str
    onnx_bytes: int
    top1: float
    samples: int
    agreement: float
    max_abs: float
    latency_ms: Latency
    throughput: float
    speedup: Speedup
    provider: Placement
    both_right: int


@dataclass(frozen=True)
class StageTime:
    """One stage of a run; `top1_after`, a share of the select split, stands where the stage changed the model."""

    name: str
    seconds: float
    peak_rss_bytes: int
    top1_after: float | None = None


@dataclass(frozen=True)
class GroupWidth:
    """Units of one group before and after."""

    name: str
    kind: Kind
    units: int
    kept: int


@dataclass(frozen=True)
class ClassShare:
    """Share of one class's relevance that the removed units carried, before repair; None without samples to score."""

    name: str
    samples: int
    removed: float | None


@dataclass(frozen=True)
class ClassChange:
    """On how many test samples of one class each exported model is right, and on how many `both` are."""

    name: str
    samples: int
    dense: int
    pruned: int
    both: int


def both_right(classes: Sequence[ClassChange]) -> int:
    """Samples that both models are right on."""
    return sum(each.both for each in classes)


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one module for one sample, without those of its children."""

    name: str
    dense: int
    pruned: int


@dataclass(frozen=True)
class OperatorTime:
    """Share of the time of all operators that those of one type take in either model, as ONNX Runtime profiles it."""

    name: str
    dense: float
    pruned: float


@dataclass(frozen=True)
class ExplanationSimilarity:
    """How alike the heatmaps of both models are, for the dense model's class: means over samples of the select split.

    1 is the same; `composite` are the rules of LRP. `unrelated` is the cosine of the dense model's heatmaps of one
    sample and of the next; 0 in reports of older versions.
    """

    samples: int
    composite: str
    cosine: float
    rank_correlation: float
    top_overlap: float
    unrelated: float = 0.0

    @property
    def least_cosine(self) -> float:
        """Half-way from heatmaps of other samples to the same heatmap: below it the model looks elsewhere.

        Of a small network on handwritten digits, pruned in ten ways, those within one point of the dense model's top-1
        have cosines from 0.68 up, those that lost four points and more from 0.57 down, the same network trained anew
        0.28 (epsilon) and 0.49 (gamma), an untrained one 0.01 and -0.07; half-way is 0.51 and 0.57.
        """
        return (1 + self.unrelated) / 2


@dataclass(frozen=True)
class Ratios:
    """pruned / dense, except `speedup_p50` (dense / pruned) and `top1_drop` (dense - pruned)."""

    params: float
    macs: float
    onnx_bytes: float
    speedup_p50: float
    top1_drop: float


@dataclass(frozen=True)
class DataSummary:
    """Name and classes of the data, samples per role, and images left out because they could not be read."""

    name: str
    classes: tuple[str, ...]
    score: int
    repair: int
    select: int
    certify: int
    test: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The proof: everything that was measured, under which conditions. `to_json` of it is report.json.

    `certificate` is what certificate.json holds; None where no guarantee was asked for. `class_shares` is empty where
    no class scores were, `attempts` where the budget is counted and not measured, `targets` where float32 alone was
    made, `explanations` None where the models' heatmaps could not be compared. `speedup` has the interval of that in
    `ratios`. `missed` says how far a goal in milliseconds is from what was measured in the end. `operators` is empty on
    a GPU. `sha256` has every file of the folder but the report's own and predict.py, by name.
    """

    recipe: Mapping[str, object]
    environment: Mapping[str, object]
    data: DataSummary
    weights: str
    input_shape: tuple[int, ...]
    dense: Measurement
    pruned: Measurement
    ratios: Ratios
    parity: Parity
    provider: Placement
    stages: tuple[StageTime, ...]
    groups: tuple[GroupWidth, ...]
    fixed: tuple[Fixed, ...]
    plan: Mapping[str, object]
    folder: str
    verdict: str
    speedup: Speedup
    class_changes: tuple[ClassChange, ...]
    layers: tuple[LayerCost, ...]
    sha256: Mapping[str, str]
    operators: tuple[OperatorTime, ...] = ()
    notes: tuple[str, ...] = ()
    certificate: Mapping[str, object] | None = None
    class_shares: tuple[ClassShare, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    missed: str = ""
    targets: tuple[Target, ...] = ()
    explanations: ExplanationSimilarity | None = None
    schema_version: int = field(default=1)
