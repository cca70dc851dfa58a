"""Records of everything that was measured, and under which conditions; `Report` contains them all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pxcompress.types import Kind

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteNumber = Annotated[float, Field(allow_inf_nan=False)]
"""A finite number, as a report may contain it."""


@dataclass(frozen=True)
class Metric:
    """The measure of quality by which models are judged: its name, its unit, and which direction is better.

    The unit "share" is a number in [0, 1], shown in percent; "number" is in the unit of the data. `binary` metrics are
    the share of samples that are right.
    """

    name: str
    unit: Literal["share", "number"] = "share"
    higher_is_better: bool = True
    binary: bool = False

    def format(self, value: float) -> str:
        """A value as text: "97.2%" for a share, else three digits."""
        return f"{value:.1%}" if self.unit == "share" else f"{value:.3g}"

    def format_change(self, change: float) -> str:
        """A signed difference of two values, in percentage points for a share: "-0.6", "0.0"."""
        text = f"{100 * change:+.1f}" if self.unit == "share" else f"{change:+.3g}"
        return text[1:] if float(text) == 0 else text

    @property
    def change_unit(self) -> str:
        """Unit of a difference of two values: "points" for a share, else ""."""
        return "points" if self.unit == "share" else ""

    def gain(self, change: float) -> float:
        """`change` with its sign set so that positive is better."""
        return change if self.higher_is_better else -change


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval: a model's quality, or a change of it, pruned minus dense."""

    value: FiniteNumber
    low: FiniteNumber
    high: FiniteNumber

    @property
    def is_shown(self) -> bool:
        """Whether the interval of a change excludes zero, so that a change is shown to be real."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Artifact:
    """An exported ONNX file. `input_shape` is that of its first input; it has None for the dynamic batch."""

    path: Path
    opset: int
    input_shape: tuple[int | None, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Parity:
    """How far an exported file's outputs are from the PyTorch model's, and how often their decisions agree."""

    samples: Count
    max_abs: Positive
    agreement: Share
    passed: bool


@dataclass(frozen=True)
class Latency:
    """Wall time of one inference call in milliseconds; `quantiles` are those of 0 %, 5 % ... 100 % of the calls."""

    mean: Positive
    p50: Positive
    p90: Positive
    p99: Positive
    runs: Count
    quantiles: tuple[Positive, ...]


@dataclass(frozen=True)
class Speedup:
    """Median latency of a reference divided by a model's, with the 95 % interval over the runs."""

    ratio: Positive
    low: Positive
    high: Positive

    @property
    def interval(self) -> str:
        """The interval as text, "1.90 to 2.11", rounded outwards, so that it never looks narrower than it is."""
        low, high = round(100 * self.low, 6), round(100 * self.high, 6)  # 1.1 * 100 is a little more than 110
        return f"{math.floor(low) / 100:.2f} to {math.ceil(high) / 100:.2f}"


@dataclass(frozen=True)
class Placement:
    """Which execution provider ran the graph. `fallback_reason` is "" if the requested one ran all of it.

    `elsewhere` counts the nodes on other providers, by their name; `options` are settings of the provider that change
    speed or results, as it reports them. `device` is the backend's for this provider: "cpu" or "cuda".
    """

    asked: str
    got: str
    nodes_on_provider: Count
    nodes_total: Count
    fallback_reason: str = ""
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"


@dataclass(frozen=True)
class Measurement:
    """Cost and quality of one exported model, and on how many samples; throughput is samples per second."""

    quality: Estimate
    samples: Count
    params: Count
    macs: Count
    onnx_bytes: Count
    latency_ms: Latency
    throughput: Positive
    batch_size: Count
    provider: str
    precision: str = "fp32"


@dataclass(frozen=True)
class Target:
    """The model in one precision: an ONNX file of a run folder, measured beside the others.

    `agreement` is how far its decisions are those of model.onnx, `max_abs` the largest difference of an output to it;
    `speedup` and `change` of the quality are against dense.onnx.
    """

    file: str
    precision: str
    onnx_bytes: Count
    quality: Estimate
    samples: Count
    agreement: Share
    max_abs: Positive
    latency_ms: Latency
    throughput: Positive
    speedup: Speedup
    provider: Placement
    change: Estimate


ContenderKind = Literal["dense", "pruned", "dense-int8", "pruned-int8", "smaller-images", "given"]
"""Kind of a contender: dense or pruned, either as int8, on smaller images, or a model that the user named."""


@dataclass(frozen=True)
class Contender:
    """One of several models that could be shipped, all measured on the same test samples with inputs of their own.

    `params` and `macs` are None if only the file is known. `speedup` and `change` of the quality are relative to the
    dense model; `beside_pruned` is its quality minus the pruned one's.
    """

    name: str
    kind: ContenderKind
    input_shape: tuple[int, ...]
    params: Count | None
    macs: Count | None
    onnx_bytes: Count
    quality: Estimate
    samples: Count
    latency_ms: Latency
    speedup: Speedup
    change: Estimate
    beside_pruned: Estimate


@dataclass(frozen=True)
class StageTime:
    """Time and peak memory of a stage of a run, and quality on select after it (`quality_after`) if it changed the
    model.
    """

    name: str
    seconds: Positive
    peak_rss_bytes: Count
    quality_after: FiniteNumber | None = None


@dataclass(frozen=True)
class GroupWidth:
    """Number of units of one group, before and after pruning."""

    name: str
    kind: Kind
    units: Count
    kept: Count


@dataclass(frozen=True)
class ClassShare:
    """Share of one class's relevance that the removed units carried, before repair.

    None if no sample is of the class.
    """

    name: str
    samples: Count
    removed: Share | None


@dataclass(frozen=True)
class ClassChange:
    """Test samples of one class: how many each exported model gets right, and how many `both` do."""

    name: str
    samples: Count
    dense: Count
    pruned: Count
    both: Count


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of one module for one sample, without those of its children."""

    name: str
    dense: Count
    pruned: Count


@dataclass(frozen=True)
class OperatorTime:
    """Share of the run time that one type of operator takes in each model, by ONNX Runtime's profile."""

    name: str
    dense: Positive
    pruned: Positive


@dataclass(frozen=True)
class ExplanationSimilarity:
    """How similar both models' heatmaps are, for the class that the dense model predicts: means over select samples.

    1 means equal; `composite` are the rules of LRP. `unrelated` is the cosine between the dense model's heatmaps of
    different samples, one and the next.
    """

    samples: Count
    composite: str
    cosine: FiniteNumber
    rank_correlation: FiniteNumber
    top_overlap: Positive
    unrelated: FiniteNumber = 0.0

    @property
    def least_cosine(self) -> float:
        """Threshold of the cosine, half-way between heatmaps of different samples and equal ones.

        Below it the model looks elsewhere. Of a small network on handwritten digits, pruned in ten ways, those within
        one point of the dense model's top-1 have cosines from 0.68 up, those that lost four points and more from 0.57
        down, the same network trained anew 0.28 (epsilon) and 0.49 (gamma), an untrained one 0.01 and -0.07; half-way
        is 0.51 and 0.57.
        """
        return (1 + self.unrelated) / 2


@dataclass(frozen=True)
class Ratios:
    """Ratios pruned / dense, except `speedup_p50`, which is dense / pruned."""

    params: Positive
    macs: Positive
    onnx_bytes: Positive
    speedup_p50: Positive


@dataclass(frozen=True)
class DataSummary:
    """Name and classes of the data, number of samples by role, and of images left out because they were damaged.

    `layout` is the form of the targets: "classes", "masks", "labels", "numbers", "unlabelled"; `images` says whether
    inputs are made from images, as the exported files describe.
    """

    name: str
    classes: tuple[str, ...]
    score: Count
    repair: Count
    select: Count
    certify: Count
    test: Count
    skipped: tuple[str, ...] = ()
    layout: str = "classes"
    images: bool = True


@dataclass(frozen=True)
class NamedInput:
    """One of several inputs of a file: its name and the shape of one sample.

    For texts, of the length used for costs.
    """

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape)) or 1}"


@dataclass(frozen=True)
class Environment:
    """Versions and hardware that measured figures depend on; `threads` are CPU threads."""

    pxcompress: str
    python: str
    torch: str
    torchvision: str
    timm: str
    torch_pruning: str
    zennit: str
    onnx: str
    onnxscript: str
    numpy: str
    onnxruntime: str
    onnx_opset: int
    device_name: str
    cpu_name: str
    cpu_count: int | None
    threads: int
    platform: str
    cuda: str | None
    nvidia_tf32_override: str | None


WarningCode = Literal[
    "demonstration",
    "part-of-classes",
    "trained-here",
    "factory-weights",
    "weights",
    "data",
    "near-chance",
    "busy",
    "machine-changed",
    "provider",
    "spent",
    "skipped",
    "sizes",
    "closed-loop",
    "precision",
    "explanations",
    "loading",
    "remark",
    "against",
    "smaller-images",
]
"""Machine-readable kind of a warning; what people read is the warning's text."""


@dataclass(frozen=True)
class Warning:
    """Something that a reader of the report must know beside the figures."""

    code: WarningCode
    text: str
