"""The report of a run as a record: everything that was measured, and under which conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pxcompress.certify.calibration import CalibrationRecord
from pxcompress.certify.record import CertificateRecord
from pxcompress.proof import (
    ClassChange,
    ClassShare,
    Contender,
    DataSummary,
    Environment,
    Estimate,
    ExplanationSimilarity,
    GroupWidth,
    LayerCost,
    Measurement,
    Metric,
    NamedInput,
    OperatorTime,
    Parity,
    Placement,
    Positive,
    Ratios,
    Speedup,
    StageTime,
    Target,
    Warning,
)
from pxcompress.recipe import Recipe
from pxcompress.types import Agreements, Attempt, FixedLayer


@dataclass(frozen=True)
class PlanCosts:
    """Cost of the dense model, of the plan, and the target, in the unit of the budget."""

    budget: str
    unit: str
    cost_dense: Positive
    cost_planned: Positive
    cost_target: Positive


@dataclass(frozen=True)
class Report:
    """Everything that was measured in a run, under which conditions. `build.to_json` of it is report.json.

    `certificate` is None where no guarantee was asked for. `class_shares` is empty where no class scores were,
    `attempts` where the budget is counted and not measured, `targets` where float32 alone was made, `explanations` None
    where the models' heatmaps could not be compared. `speedup` has the interval of that in `ratios`. `missed` says how
    far a goal in milliseconds is from what was measured in the end. `task` says what outputs mean, `metric` how they
    are judged; `change` is that of the quality, pruned less dense. `operators` is empty on a GPU. `sha256` has every
    file of the folder but the report's own and predict.py, by name. `calibration` is there for classifiers; the
    pruned model's logits were divided by `temperature`. `contenders` are what was measured with --against, the dense
    and the pruned model first. `inputs` are several, which are packed in one tensor of `input_shape`.
    """

    recipe: Recipe
    environment: Environment
    data: DataSummary
    task: str
    metric: Metric
    weights: str
    input_shape: tuple[int, ...]
    dense: Measurement
    pruned: Measurement
    ratios: Ratios
    parity: Parity
    provider: Placement
    stages: tuple[StageTime, ...]
    groups: tuple[GroupWidth, ...]
    fixed: tuple[FixedLayer, ...]
    plan: PlanCosts
    folder: str
    verdict: str
    speedup: Speedup
    change: Estimate
    class_changes: tuple[ClassChange, ...]
    layers: tuple[LayerCost, ...]
    sha256: Mapping[str, str]
    operators: tuple[OperatorTime, ...] = ()
    notes: tuple[Warning, ...] = ()
    certificate: CertificateRecord | None = None
    class_shares: tuple[ClassShare, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    missed: str = ""
    targets: tuple[Target, ...] = ()
    explanations: ExplanationSimilarity | None = None
    agreements: Agreements | None = None
    calibration: CalibrationRecord | None = None
    temperature: Positive = 1.0
    contenders: tuple[Contender, ...] = ()
    inputs: tuple[NamedInput, ...] = ()
    schema_version: Literal[1] = 1
