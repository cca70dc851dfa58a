"""The records that stages of the pipeline pass on, and the protocols of what can be plugged in.

Recipe -> (model, Splits) -> Groups -> Scores -> Plan -> Pruned -> Artifact -> Measurement -> Report
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
"""Inputs (n, ...) float32 and labels (n,) int64."""

Batches = Iterable[Batch]
"""Re-iterable: every `iter()` yields the same batches in the same order."""

Scores = Mapping[str, Tensor]
"""Group name -> scores of its units, (units,) float32; units with higher scores are kept."""

Meter = Callable[[Mapping[str, int]], float]
"""Function from units kept, by group name (groups left out are whole), to cost in the budget's unit."""

Kind = Literal["channel", "neuron", "head", "direction"]
Axis = Literal["out", "in"]


class ImageSize(NamedTuple):
    """Height and width of an image in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class OpenAxes:
    """Which axes of exported files may vary: the batch, unless fixed to `batch`; with `size` height and width."""

    batch: int | None = None
    size: bool = False


@dataclass(frozen=True)
class Input:
    """One tensor (n, *shape) of several; `low` and `high` bound whole numbers and booleans. A size None is open."""

    name: str | int
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    low: float = -math.inf
    high: float = math.inf


class TextEncoder(Protocol):
    """Turns texts into packed inputs."""

    @property
    def content(self) -> str:
        """The content of a tokenizer.json."""
        ...

    @property
    def longest(self) -> int:
        """The most tokens that the model takes."""
        ...

    def words(self, ids: Sequence[int]) -> Sequence[str]:
        """The tokens with these ids, as text."""
        ...

    def encode(self, texts: Sequence[tuple[str, ...]]) -> tuple[Tensor, int]:
        """Packed inputs (n, inputs, length), and how many texts had to be cut."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input: resize, centre crop, to [0, 1], (x - mean) / std.

    `input_size` is (channels, height, width); `crop` is the share of the resized image that the centre crop keeps.
    `crop_mode` is timm's: "center" loses the ends of the longer side, "border" keeps the whole image with a border
    around it (a letterbox), "squash" changes its proportions.
    Without mean and std the input is no image: numbers of shape `input_size`, taken as they are. Where a model takes
    several `inputs`, that is the shape in which they are packed; a `tokenizer` makes them of texts.
    """

    input_size: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bicubic"
    crop: float = 1.0
    crop_mode: str = "center"
    inputs: tuple[Input, ...] = ()
    tokenizer: TextEncoder | None = None

    @property
    def is_image(self) -> bool:
        """Whether the input is an image, which can be resized."""
        return bool(self.mean)


@dataclass(frozen=True)
class Splits:
    """Five parts of the data, of which only score and repair may overlap; a stage is handed its own, never this record.

    `ids` holds the sample ids of every role; `example` is one input, shape (1, ...); `notes` say what a reader must
    know of how the data were read and cut. `contents` has a text for every sample of a role, by which it is known
    again: what an image or a text holds, else its place in the data. `served` counts the samples that were left out of
    `certify`, since they served models in another role before.
    """

    score: Batches
    repair: Batches
    select: Batches
    certify: Batches
    test: Batches
    example: Tensor
    ids: Mapping[str, tuple[str, ...]]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    contents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    served: int = 0

    def __post_init__(self) -> None:
        role_by_id: dict[str, str] = {}
        for role, ids in self.ids.items():
            for sample in ids:
                if role_by_id.get(sample, role) != role and {role, role_by_id[sample]} != {"score", "repair"}:
                    raise ValueError(f"sample {sample!r} is in both {role_by_id[sample]!r} and {role!r}")
                role_by_id[sample] = role

    @property
    def parts(self) -> dict[str, Batches]:
        """The parts that may shape the model, by role; not certify and test, which only judge it."""
        return {"score": self.score, "repair": self.repair, "select": self.select}


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one module (or parameter) that belongs to a group: unit `u` owns the rows `index[u]`.

    `axis` "out": rows the module produces or carries (convolution, linear, norm, depthwise convolution, parameter).
    `axis` "in": rows it consumes. A group's consumers are exactly its "in" members.
    For a parameter or buffer outside any layer `module` is its name, and `dim` the dimension that the rows lie in. For
    an attribute that holds the sizes of a split it is the same, with 0 as `dim`: the rows are those that are split.
    """

    module: str
    axis: Axis
    index: Tensor  # (units, k) int64
    dim: int | None = None

    def rows(self, units: Sequence[int]) -> Tensor:
        """Rows owned by `units`, sorted, shape (len(units) * k,)."""
        return self.index[list(units)].flatten().sort().values


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be removed one by one, each from all members at once. `members[0]` is the root."""

    name: str
    kind: Kind
    units: int
    members: tuple[Member, ...]

    @property
    def rows_beside(self) -> int:
        """Number of rows that its layers have beside those of its units: 1 in rotated streams, for the mean, else 0."""
        return 1 if self.kind == "direction" else 0

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members that read the units (their layers); zeroing their rows equals removing the units."""
        return tuple(member for member in self.members if member.axis == "in")


@dataclass(frozen=True)
class FixedLayer:
    """A layer whose outputs all stay, and the reason."""

    name: str
    units: int
    reason: str


@dataclass(frozen=True, eq=False)
class Structure:
    """The groups of a model that can be pruned, and the layers that cannot."""

    groups: tuple[Group, ...]
    fixed: tuple[FixedLayer, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which units are removed. Saved as plan.json; costs are in `unit`, the budget's."""

    removed: Mapping[str, tuple[int, ...]]
    budget: str
    unit: str
    cost_dense: float
    cost_planned: float
    cost_target: float

    def kept(self, group: Group) -> list[int]:
        """Indices of the units of `group` that stay, ascending."""
        removed_units = set(self.removed.get(group.name, ()))
        return [unit for unit in range(group.units) if unit not in removed_units]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A physically smaller model beside the dense one it came from. Repairs may change `model`, never `dense`.

    Pruned in rounds, `dense` is the model at the start of the round, and `first` the one before all of them.
    """

    model: nn.Module
    dense: nn.Module
    groups: tuple[Group, ...]
    plan: Plan
    first: Pruned | None = None

    @property
    def whole(self) -> Pruned:
        """The slim model beside the dense model from before all rounds, with everything that was removed since."""
        return self.first or self


@dataclass(frozen=True, eq=False)
class ClassRelevance:
    """How much each class rests on each unit: group name -> (classes, units) float32, and samples per class.

    Rows of classes without samples are 0.
    """

    units: Mapping[str, Tensor]
    samples: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Price:
    """The cost of a model at any widths, by one budget: a meter with a name, and a unit."""

    budget: str
    unit: str
    meter: Meter

    def __call__(self, kept_units: Mapping[str, int]) -> float:
        """The cost where `kept_units` units stay, by group name; groups that are not named are whole."""
        return self.meter(kept_units)


@dataclass(frozen=True, eq=False)
class ScoredModel:
    """A dense model whose units have scores and costs, from which plans of any size can be made.

    `example` is one input, shape (1, ...); `ratio` is the share of the dense price to remove, 0 where the scores say
    how much; `scorer` is the text of the scorer whose scores these are. Class relevance is None where it was not asked
    for. `rates` are what scores of a group were multiplied by, by its name, to be worth as much as those of others.
    """

    model: nn.Module
    example: Tensor
    structure: Structure
    scores: Scores
    price: Price
    ratio: float
    class_relevance: ClassRelevance | None = None
    scorer: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """One attempt to fit a budget: cost foreseen by the plan, measured on its file, and allowed, in the budget's unit.

    From the second attempt on, `planned` is corrected by what was measured in the one before.
    """

    planned: float
    measured: float
    allowed: float


@dataclass(frozen=True)
class Agreement:
    """How similar a pruned model's outputs are to the dense one's on `samples` samples, without labels.

    `share` is in [0, 1]: for logits the share of samples with the same predicted class, for other outputs 1 minus the
    squared error divided by the variance of the dense model's outputs, as a mean over samples. `divergence` is 0 for
    equal outputs and shows smaller changes: for logits the mean KL divergence, for others that relative error.
    """

    samples: int
    share: float
    divergence: float


@dataclass(frozen=True)
class Agreements:
    """Agreement on held-out samples, and on samples that weights were fitted to."""

    held_out: Agreement
    calibration: Agreement


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A repaired slim model and what led to it: `scores` of the dense model, `attempts` where files are measured.

    `agreements` are None where no samples were held out. The logits were divided by `temperature`.
    """

    structure: Structure
    scores: Scores
    pruned: Pruned
    class_relevance: ClassRelevance | None = None
    attempts: tuple[Attempt, ...] = ()
    agreements: Agreements | None = None
    temperature: float = 1.0


class Scorer(Protocol):
    """A measure of how much the model's decisions rest on each unit: a frozen dataclass whose fields are its options.

    A scorer derives from this class; an option of the name `composite` or `target` overrides the property.
    """

    @property
    def composite(self) -> str:
        """LRP rules as the text of a composite, for searches and explanations; "" if the scorer has none."""
        return ""

    @property
    def target(self) -> str:
        """Class whose output is attributed, "" for none. "label" needs labels; others ignore those of the batches."""
        return ""

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Scores of every group; `model` is left as it was."""
        ...


class Budget(Protocol):
    """What a width of every group costs, in one unit. Budgets derive from this class, which has the defaults."""

    unit: str

    normalise: ClassVar[str] = "knapsack"
    """Default way in which scores of different groups are made comparable."""

    round_to: ClassVar[int] = 8
    """Default step of widths, in units; 0 stands for the step that is measured as fastest."""

    def meter(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
        """A function from kept units, by group name, to cost."""
        ...


@runtime_checkable
class FileBudget(Protocol):
    """A budget that a plan can only predict: it is measured on the exported file."""

    unit: str
    tolerance: float

    def measure_files(self, files: Sequence[Path], example: Tensor) -> Sequence[float]:
        """Measured costs of ONNX files, side by side; a share `tolerance` above a limit counts as noise."""
        ...


Phase = Literal["absorb", "refit", "statistics", "train"]
"""What a repair does: move lost contributions into kept units, refit weights, set moments of norms, or train."""


class Repair(Protocol):
    """A method that brings a pruned model's outputs back to the dense one's; repairs derive from this class.

    `phase` says when it runs: a recipe's repairs run in the order of `Phase`, within one phase in any order.
    `costly` is true where it takes many times as long as pruning and measuring: searches leave it out of their trials.
    """

    phase: ClassVar[Phase]
    costly: ClassVar[bool] = False

    @property
    def needs_labels(self) -> bool:
        """Whether it takes one label a sample, (n,), and logits (n, classes)."""
        return False

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Repair `pruned.model`, perhaps in place; never `pruned.dense`. `held_out` is for choices, not for fitting."""
        ...
