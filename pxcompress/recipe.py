"""All that a user asks for, as one frozen record of plain values: it prints, compares, hashes and travels as JSON."""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pxcompress.certify import Goal
from pxcompress.errors import InputError, unknown
from pxcompress.parts import Part

DEFAULT_REPAIR = ("fold", "batchnorm")
DEFAULT_NORMALISE = {"macs": "cost"}
"""By budget; "mean" elsewhere. Measured by benchmarks/one_shot.py, of the MACs only."""

TASK_REPAIR = ("fold", "batchnorm:match=dense")
"""For some of the classes: statistics of few classes are not those that the weights expect."""


def auto_normalise(budget: str) -> str:
    """How groups are made comparable where nothing is said, for a budget's text."""
    return DEFAULT_NORMALISE.get(budget.partition(":")[0], "mean")


def auto_repair(classes: Sequence[str] | None) -> tuple[str, ...]:
    """The repairs where nothing is said, for the classes that are kept."""
    return TASK_REPAIR if classes else DEFAULT_REPAIR


@dataclass(frozen=True)
class Bench:
    """How latency is measured: samples per call, execution provider, CPU threads (0: all physical cores)."""

    batch_size: int = 1
    provider: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        from pxcompress.runtime import PROVIDERS

        check_types(self)
        if self.provider not in PROVIDERS:
            raise unknown("provider", self.provider, PROVIDERS)
        if self.batch_size < 1:
            raise InputError(f"batch-size is {self.batch_size}; expected 1 or more")
        if self.threads < 0:
            raise InputError(f"threads is {self.threads}; expected 0 (all cores) or more")


@dataclass(frozen=True)
class Guarantee:
    """What is to be certified: with this confidence the risk, one of `certify.RISKS`, is at most `max_drop`.

    It is tested on `steps` ever smaller models, the last of which has the recipe's ratio; the smallest that passes
    is the result. `part` and `coverage` say which samples count, as `parts.Part` does.
    """

    max_drop: float
    confidence: float = 0.95
    risk: str = "negative-flips"
    steps: int = 8
    part: str = "all"
    coverage: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; expected a share between 0 and 1, such as 0.95")
        if not 0 < self.max_drop < 1:
            raise InputError(f"max-drop is {self.max_drop}; expected a share of the predictions, such as 0.03")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; expected 1 or more models to test")
        _ = self.goal  # an unknown risk is found here
        object.__setattr__(self, "coverage", self.counted.coverage)

    @property
    def goal(self) -> Goal:
        """The same as `certify` takes it."""
        return Goal(self.risk, alpha=self.max_drop, delta=round(1 - self.confidence, 12))

    @property
    def counted(self) -> Part:
        """The samples that count."""
        return Part(self.part, self.coverage)

    def ratios(self, last: float) -> tuple[float, ...]:
        """The ratios of the path, ascending in equal steps; it is frozen before any sample to certify on is seen."""
        return tuple(last * step / self.steps for step in range(1, self.steps + 1))


@dataclass(frozen=True)
class Recipe:
    """One run. `scorer`, `budget` and `repair` are texts like "lrp:centre=true", checked and put in short form.

    `ratio` is the share of the dense cost to remove, in the budget's unit; `classes` are the only ones of the data and
    of the model's outputs that are kept, in this order (none: all); `input_size` is a side length in pixels
    (None: the model's own, or the embedded data's). "auto" stands for `DEFAULT_NORMALISE`, and for `DEFAULT_REPAIR`, or
    `TASK_REPAIR` where classes are given. Raises `InputError` for anything unknown or out of range.
    """

    model: str
    ratio: float
    data: str = "digits"
    classes: tuple[str, ...] = ()
    checkpoint: str | None = None
    input_size: int | None = None
    scorer: str = "lrp-residual"
    budget: str = "channels"
    normalise: str = "auto"
    round_to: int = 8
    min_keep: float = 0.1
    class_scores: bool = False
    class_guard: bool = False
    repair: tuple[str, ...] = ("auto",)
    rounds: int = 1
    bench: Bench = field(default_factory=Bench)
    guarantee: Guarantee | None = None
    skip_corrupt: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        from pxcompress.budgets import BUDGETS
        from pxcompress.plan import Limits
        from pxcompress.repair import REPAIRS
        from pxcompress.scorers import SCORERS

        check_types(self)
        if not 0 < self.ratio < 1:
            raise InputError(f"ratio is {self.ratio}; expected a share of the cost to remove, between 0 and 1")
        if self.input_size is not None and self.input_size < 8:
            raise InputError(f"input-size is {self.input_size}; expected a side length of 8 pixels or more")
        if self.rounds < 1 or (self.rounds > 1 and self.guarantee):
            raise InputError(f"rounds is {self.rounds}; expected 1 or more, and 1 where a guarantee is asked for")
        _check_classes(self.classes)
        if self.normalise == "auto":
            object.__setattr__(self, "normalise", auto_normalise(self.budget))
        Limits(self.normalise, self.round_to, self.min_keep)
        object.__setattr__(self, "scorer", SCORERS.text(SCORERS.build(self.scorer)))
        object.__setattr__(self, "budget", BUDGETS.text(BUDGETS.build(self.budget)))
        chosen = auto_repair(self.classes) if self.repair == ("auto",) else self.repair
        repairs = [REPAIRS.build(text) for text in chosen]
        object.__setattr__(self, "repair", tuple(REPAIRS.text(repair) for repair in repairs))
        _check_order(self.repair, [getattr(repair, "requires", ()) for repair in repairs])

    @property
    def label(self) -> str:
        """Name of the run folder: model, budget, ratio, to how many classes, and what is guaranteed."""
        model = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in self.model)
        ratio = f"{self.ratio:.2f}" if round(self.ratio, 2) == self.ratio else f"{self.ratio:.4g}"
        promise = f"-drop-{self.guarantee.max_drop:g}" if self.guarantee else ""
        if self.guarantee and self.guarantee.part != "all":
            promise += f"-{self.guarantee.part}"
        task = f"-{len(self.classes)}-classes" if self.classes else ""
        return f"{model}-{self.budget.partition(':')[0]}-{ratio}{task}{promise}"

    @property
    def hash(self) -> str:
        """sha256 of the recipe's JSON, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """JSON text that `from_json` turns into an equal recipe."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe; unknown keys are refused, the known ones listed."""
        try:
            content = _checked(cls, json.loads(text))
            for key, part in (("bench", Bench), ("guarantee", Guarantee)):
                if content.get(key) is not None:
                    content[key] = part(**_checked(part, content[key]))
            for key in ("repair", "classes"):
                if isinstance(content.get(key), list):
                    content[key] = tuple(content[key])
            return cls(**content)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"not a recipe ({error}); expected JSON as recipe.json holds") from error

    def but(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return replace(self, **changes)


def _check_order(repairs: Sequence[str], required: Sequence[Sequence[str]]) -> None:
    """Raise `InputError` where a repair stands twice, or before one that it requires to have been done."""
    names = [text.partition(":")[0] for text in repairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"repair {name!r} is given {names.count(name)} times; give it once")
    for place, name in enumerate(names):
        for later in names[place + 1 :]:
            if later in required[place]:
                raise InputError(f"repair {name!r} stands before {later!r}, whose result it needs; swap them")


def _check_classes(names: Sequence[str]) -> None:
    """Raise `InputError` for a task that is none; no names stand for all classes."""
    if len(names) == 1:
        raise InputError(f"classes are only {names[0]!r}; expected two or more names, or a file with one per line")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"class {name!r} is given {names.count(name)} times; give it once")


def check_types(record: Any) -> None:
    """Raise `InputError` for a field whose value is not of its declared type; whole numbers pass as floats."""
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not any(_is_a(value, kind) for kind in allowed):
            expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
            raise InputError(f"{name.replace('_', '-')} is {value!r}; expected {expected}")


def _is_a(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _checked(cls: type, content: Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(cls)]
    for key in content:
        if key not in known:
            raise unknown("recipe key", key, known)
    return dict(content)
