"""The records that the pipeline hands from stage to stage, and the three things that can be plugged in.

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
"""Group name -> (units,) float32; higher means keep."""

Meter = Callable[[Mapping[str, int]], float]
"""Units kept per group (by name; groups left out are whole) -> cost in the budget's unit."""

Kind = Literal["channel", "neuron", "head", "direction"]
Axis = Literal["out", "in"]


class ImageSize(NamedTuple):
    """Sides of an image in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class OpenAxes:
    """Which axes of an exported file are open: any batch, or one of `batch`, and with `size` height and width too."""

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
    """Makes packed inputs of texts."""

    @property
    def content(self) -> str:
        """A tokenizer.json."""
        ...

    @property
    def longest(self) -> int:
        """The most tokens that the model takes."""
        ...

    def words(self, ids: Sequence[int]) -> Sequence[str]:
        """The tokens of such ids."""
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
        """The parts that shape a model, by role; those that judge it are not among them."""
        return {"score": self.score, "repair": self.repair, "select": self.select}


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one module (or parameter) that follows a group: unit `u` owns the rows `index[u]`.

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
    """Units that can be removed one by one, each across all members at once. `members[0]` is the root."""

    name: str
    kind: Kind
    units: int
    members: tuple[Member, ...]

    @property
    def rows_beside(self) -> int:
        """Rows of its layers that stay beside its units: of a rotated stream the one that makes up for the mean."""
        return 1 if self.kind == "direction" else 0

    @property
    def consumers(self) -> tuple[Member, ...]:
        """Members that read the units; zeroing their rows equals removing the units."""
        return tuple(member for member in self.members if member.axis == "in")


@dataclass(frozen=True)
class Fixed:
    """A layer whose outputs stay whole, and why."""

    name: str
    units: int
    reason: str


@dataclass(frozen=True, eq=False)
class Structure:
    """What can be removed from a model and what cannot."""

    groups: tuple[Group, ...]
    fixed: tuple[Fixed, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which units go. Saved as plan.json; costs are in `unit`, the budget's."""

    removed: Mapping[str, tuple[int, ...]]
    budget: str
    unit: str
    cost_dense: float
    cost_planned: float
    cost_target: float

    def kept(self, group: Group) -> list[int]:
        """Units of `group` that stay, ascending."""
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
    """What a model costs by one budget, in its unit, at any widths: a meter with a name."""

    budget: str
    unit: str
    meter: Meter

    def __call__(self, kept_units: Mapping[str, int]) -> float:
        """The cost where `kept_units` units stay, by group name; groups that are not named are whole."""
        return self.meter(kept_units)


@dataclass(frozen=True, eq=False)
class ScoredModel:
    """A dense model whose units have a score and a price: what every cut of it starts from.

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
    """One turn of a closed loop, in the budget's unit: what the plan foresaw, what its file cost, what it may cost.

    From the second turn on, `planned` is corrected by what was measured in the one before.
    """

    planned: float
    measured: float
    allowed: float


@dataclass(frozen=True)
class Agreement:
    """How a pruned model compares with the dense one on `samples` samples, without labels.

    `share` is in [0, 1]: for logits the share of samples with the same largest class, for other outputs 1 less the
    error as a share of the outputs' variance, as a mean over samples. `divergence`, 0 for equal outputs, is what small
    changes show in: the mean KL divergence from the dense model's distribution over classes, or the error's share.
    """

    samples: int
    share: float
    divergence: float


@dataclass(frozen=True)
class Agreements:
    """Agreement on samples that nothing was fitted to, and on those that the weights were fitted to."""

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
        """Rules of LRP, as a composite's text, which a search varies and explanations are made with; "" for none."""
        return ""

    @property
    def target(self) -> str:
        """Class whose output is attributed, "" for none. "label" needs labels; else those of the batches are unused."""
        return ""

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Scores of every group; `model` is left as it was."""
        ...


class Budget(Protocol):
    """Prices a width for every group. Classes derive from it: it holds the defaults of what they may declare."""

    unit: str

    normalise: ClassVar[str] = "knapsack"
    """How scores of different groups are made comparable when the recipe does not say it."""

    round_to: ClassVar[int] = 8
    """Step of widths when the recipe does not say it, in units; 0 stands for the step that is measured as fastest."""

    def meter(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
        """A pure function from units kept to cost."""
        ...


@runtime_checkable
class FileBudget(Protocol):
    """A budget that a plan only predicts, and that the exported file tells."""

    unit: str
    tolerance: float

    def measure_files(self, files: Sequence[Path], example: Tensor) -> Sequence[float]:
        """What ONNX files cost, measured side by side; a share `tolerance` too much is within the noise."""
        ...


Phase = Literal["absorb", "refit", "statistics", "train"]
"""What a repair does: put what is gone into what stays, fit weights, set the moments of what norms see, or train."""


class Repair(Protocol):
    """A method that makes the pruned model compute again what the dense one did; a repair derives from this class.

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
        """May change `pruned.model` in place; never `pruned.dense`. `held_out` is for choosing, not for fitting."""
        ...
