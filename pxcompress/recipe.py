"""All that a user asks for, as one frozen record of plain values: it prints, compares, hashes and travels as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pxcompress.checks import check_keys, check_types, make_file_name, read_record
from pxcompress.choices import LOSS_RISKS, NORMALISATIONS, PARTS, PROVIDERS, RISKS, SCOPES, one_of
from pxcompress.choices import TARGETS as TARGETS
from pxcompress.errors import InputError, short, unknown
from pxcompress.model_and_data import ModelAndData
from pxcompress.registry import names_in, option

if TYPE_CHECKING:
    from pxcompress.certify.parts import Part
    from pxcompress.certify.path import Goal
    from pxcompress.types import Budget

DEFAULT_BUDGET = "macs"
MEASURED = 0
"""As `round_to`: the step of widths that measures best on the machine at hand."""

DEFAULT_REPAIR = ("fold", "least-squares", "batchnorm")


@dataclass(frozen=True)
class _Goal:
    """A way to say how small: what it counts by, its range, what is expected, and its end in a folder's name."""

    budget: str
    above: float
    expected: str
    suffix: str = ""
    below: float = math.inf


GOALS = {
    "ratio": _Goal("", 0, "a share of the cost to remove, between 0 and 1", below=1),
    "speedup": _Goal("latency", 1, "a factor above 1, such as 2x", "x"),
    "latency_ms": _Goal("latency", 0, "milliseconds above 0", "ms"),
    "max_bytes": _Goal("bytes", 0, "a size above 0, such as 20MB", "B"),
    "relevance_share": _Goal("", 0, "a share of every layer's scores, between 0 and 1", "-relevance", below=1),
}
"""One of them is given. A goal with a budget sets it."""

AUTO = "auto"

AUTO_SCORERS = ("lrp-residual", "lrp-residual:metric=weights")
"""Scorers among which held-out samples choose where nothing is said: errors weighed by relevance, or all alike."""


def auto_normalise(budget: str) -> str:
    """How groups are made comparable where nothing is said, for a budget's text: as the budget wants it."""
    return _budget(budget).normalise


def auto_round_to(budget: str) -> int:
    """The step of widths where nothing is said, for a budget's text: as the budget wants it."""
    return _budget(budget).round_to


def _budget(text: str) -> type[Budget]:
    """The budget's class; for an unknown one, which a report may hold, the class with the defaults."""
    from pxcompress.budgets import BUDGETS
    from pxcompress.types import Budget

    name = text.partition(":")[0]
    return BUDGETS.get(name) if name in BUDGETS else Budget


@dataclass(frozen=True)
class Bench:
    """How latency is measured: samples per call, execution provider, CPU threads (0: all physical cores)."""

    batch_size: int = option(1, "Samples per call when latency is measured.")
    provider: str = option("auto", f"ONNX Runtime execution provider: {one_of(PROVIDERS)}.")
    threads: int = option(0, "CPU threads of ONNX Runtime; 0: all physical cores.")

    def __post_init__(self) -> None:
        from pxcompress.deploy.runtime import check_threads, list_providers

        check_types(self)
        if self.provider not in list_providers():
            raise unknown("provider", self.provider, list_providers())
        if self.batch_size < 1:
            raise InputError(f"batch-size is {self.batch_size}; expected 1 or more")
        check_threads(self.threads)


@dataclass(frozen=True)
class Guarantee:
    """What is to be certified: with this confidence the risk, one of `certify.RISKS`, is at most `max_drop`.

    It is tested on `steps` ever smaller models, the last of which has the recipe's ratio; the smallest that passes
    is the result. `part` and `coverage` say which samples count, as `parts.Part` does.
    """

    max_drop: float = option(MISSING, "Certify that the risk is at most this, such as 0.03.")
    confidence: float = option(0.95, "Confidence with which a certificate holds, over the draw of its samples.")
    risk: str = option(
        "negative-flips",
        f"What is certified: {one_of(RISKS)}; {one_of(LOSS_RISKS)} for any task.",
    )
    steps: int = option(8, "Models on the path to --ratio that --max-drop tests.")
    part: str = option(
        "all",
        f"Which predictions count: {one_of(PARTS)}. confident: those of which the dense model is sure; classes: the "
        "risk is held in every class, by true label.",
    )
    coverage: float | None = option(
        None, "With --part confident: share of the select split that counts.  [default: 0.8]"
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; expected a share between 0 and 1, such as 0.95")
        if not 0 < self.max_drop < 1:
            raise InputError(f"max-drop is {self.max_drop}; expected a share of the predictions, such as 0.03")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; expected 1 or more models to test")
        if self.risk not in (*RISKS, *LOSS_RISKS):
            raise unknown("risk", self.risk, (*RISKS, *LOSS_RISKS))
        object.__setattr__(self, "coverage", self.counted.coverage)

    @property
    def goal(self) -> Goal:
        """The same as `certify` takes it."""
        from pxcompress.certify.path import Goal

        return Goal(self.risk, alpha=self.max_drop, delta=round(1 - self.confidence, 12))

    @property
    def counted(self) -> Part:
        """The samples that count."""
        from pxcompress.certify.parts import Part

        return Part(self.part, self.coverage)

    def ratios(self, last: float) -> tuple[float, ...]:
        """The ratios of the path, ascending in equal steps; it is frozen before any sample to certify on is seen."""
        return tuple(last * step / self.steps for step in range(1, self.steps + 1))


@dataclass(frozen=True)
class Recipe(ModelAndData):
    """One run: what is given, how small it is to get, and how.

    `ratio` is the share of the dense cost to remove, in the budget's unit, or another of `GOALS` is given. `scorer`,
    `budget` and `repair` are texts like "lrp:centre=true", checked and put in short form; "auto" stands for what the
    budget wants, and for `DEFAULT_REPAIR`, or `TASK_REPAIR` where classes are given. Raises `InputError` for anything
    unknown or out of range.
    """

    ratio: float | None = option(None, "Share of the dense cost to remove, in the budget's unit.")
    speedup: float | None = option(None, "Instead of --ratio: how many times faster, such as 2x; budget latency.")
    latency_ms: float | None = option(None, "Instead of --ratio: milliseconds a call may take; budget latency.")
    max_bytes: int | None = option(
        None, "Instead of --ratio: size the whole ONNX file may have, such as 20MB, also with --only; budget bytes."
    )
    relevance_share: float | None = option(
        None, "Instead of --ratio: remove of every layer the units that hold at most this share of its scores."
    )
    budget: str = option(
        "auto", f"What ratio is a share of: {one_of(names_in('pxcompress.budgets'))}.  [default: {DEFAULT_BUDGET}]"
    )
    scorer: str = option(
        AUTO,
        f"Scorer, as NAME:option=value,...: {one_of(names_in('pxcompress.scorers'))}; see `pxcompress methods`. auto: "
        "that of two lrp-residual whose model comes nearer to the dense one on held-out samples.",
    )
    normalise: str = option(
        "auto", f"How groups are made comparable: auto (as the budget wants it), {one_of(NORMALISATIONS)}."
    )
    repair: tuple[str, ...] = option(
        (AUTO,),
        f"Repairs in order (repeat the option): {one_of(names_in('pxcompress.repair'))}; none for none.  "
        f"[default: {', '.join(DEFAULT_REPAIR)}]",
    )
    rounds: int = option(1, "Prune in this many steps, scored and repaired anew after each; more time, small gains.")
    round_to: int | None = option(
        None, "Widths are multiples of this; 1: no alignment; 0: as measures best here.  [default: 8; 0 for latency]"
    )
    min_keep: float = option(0.1, "Least share of every group that stays.")
    floors: tuple[str, ...] = option((), "Least shares of single groups, as GLOB=SHARE with commas.")
    only: tuple[str, ...] = option((), "Prune only groups of these names: globs with commas; see `pxcompress inspect`.")
    keep: tuple[str, ...] = option((), "Leave groups of these names whole: globs with commas.")
    scope: str = option("all", f"Which groups may lose units: {one_of(SCOPES)} (residual streams stay whole).")
    class_scores: bool = option(False, "Keep units' relevance for every class; needs labels of the score split.")
    temperature_scaling: bool = option(
        False, "Divide the logits by a temperature fitted to held-out labels: probabilities that can be trusted."
    )
    bench: Bench = field(default_factory=Bench)
    guarantee: Guarantee | None = None
    targets: tuple[str, ...] = option(
        ("fp32",), f"Precisions of the exported model, with commas: {', '.join(TARGETS)}; {TARGETS[0]} is always made."
    )
    against: tuple[str, ...] = option(
        (),
        "Measure this model too (repeat the option), with int8 and smaller images: a timm name, MODEL=CHECKPOINT or an "
        "ONNX file; the report says which to ship.",
    )
    fixed_batch: bool = option(False, "The exported files take --batch-size samples a call, no other number.")

    def __post_init__(self) -> None:
        from pxcompress.budgets import BUDGETS
        from pxcompress.planning.limits import Limits
        from pxcompress.planning.selection import Selection
        from pxcompress.repair import PHASES, REPAIRS
        from pxcompress.scorers import SCORERS

        super().__post_init__()
        _check_goal(self)
        if self.rounds < 1 or (self.rounds > 1 and self.guarantee):
            raise InputError(f"rounds is {self.rounds}; expected 1 or more, and 1 where a guarantee is asked for")
        object.__setattr__(self, "targets", _ordered(self.targets))
        if self.normalise == "auto":
            object.__setattr__(self, "normalise", auto_normalise(self.budget))
        if self.round_to is not None and self.round_to < 0:
            raise InputError(f"round-to is {self.round_to}; expected 0 (as measures best), 1 (no alignment) or more")
        if self.round_to is None:
            object.__setattr__(self, "round_to", auto_round_to(self.budget))
        Limits(self.normalise, self.round_to or 1, self.min_keep)
        Selection(self.only, self.keep, self.scope, self.floors)
        if self.scorer != AUTO:
            object.__setattr__(self, "scorer", SCORERS.text(SCORERS.build(self.scorer)))
        object.__setattr__(self, "budget", BUDGETS.text(_on_bench(self.budget, self.bench)))
        chosen = DEFAULT_REPAIR if self.repair == (AUTO,) else self.repair
        _check_one_each(chosen)
        repairs = [REPAIRS.build(text) for text in chosen]
        object.__setattr__(self, "repair", tuple(REPAIRS.text(repair) for repair in repairs))
        _check_order(self.repair, [PHASES.index(repair.phase) for repair in repairs])

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorer, or those among which held-out samples choose; the first one where there are none."""
        return AUTO_SCORERS if self.scorer == AUTO else (self.scorer,)

    @property
    def label(self) -> str:
        """Name of the run folder: model, budget, ratio, to how many classes, and what is guaranteed."""
        promise = f"-drop-{self.guarantee.max_drop:g}" if self.guarantee else ""
        if self.guarantee and self.guarantee.part != "all":
            promise += f"-{self.guarantee.part}"
        task = f"-{len(self.classes)}-classes" if self.classes else ""
        return f"{self.stem}-{self._goal_label}{task}{promise}"

    @property
    def stem(self) -> str:
        """Model and budget, as a folder may be named."""
        return f"{make_file_name(self.model)}-{self.budget.partition(':')[0]}"

    @property
    def _goal_label(self) -> str:
        if self.ratio is not None:
            return f"{self.ratio:.2f}" if round(self.ratio, 2) == self.ratio else f"{self.ratio:.4g}"
        goal = next(name for name in GOALS if getattr(self, name) is not None)
        return f"{getattr(self, goal):g}{GOALS[goal].suffix}"

    @property
    def limit(self) -> float | None:
        """What the result may cost, in the budget's unit, where the goal says that; None where it is a share."""
        return self.latency_ms if self.latency_ms is not None else self.max_bytes

    def share(self, cost: float) -> float:
        """Share of the dense model's `cost`, in the budget's unit, that is to be removed.

        Raises `InputError` where the dense model is small or fast enough already.
        """
        wanted = {
            "ratio": lambda value: value,
            "speedup": lambda value: 1 - 1 / value,
            "latency_ms": lambda value: 1 - value / cost,
            "max_bytes": lambda value: 1 - value / cost,
        }
        goal = next(name for name in GOALS if getattr(self, name) is not None)
        share = wanted[goal](getattr(self, goal))
        if share <= 0:
            raise InputError(
                f"{goal.replace('_', '-')} is {getattr(self, goal):g}; the dense model takes {cost:.4g} already"
            )
        return float(share)

    @property
    def onnx_batch(self) -> int | None:
        """Samples a call that the exported files take; None for any number."""
        return self.bench.batch_size if self.fixed_batch else None

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
            return cls.from_dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a recipe ({error}); expected JSON as recipe.json holds") from error

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """A recipe of plain values, as `to_json` writes them. Raises as `from_json` does."""
        if not isinstance(content, Mapping):
            raise InputError(f"not a recipe but {short(repr(content), 40)}; expected what recipe.json holds")
        for part, values in ((cls, content), (Bench, content.get("bench")), (Guarantee, content.get("guarantee"))):
            check_keys(part, values if isinstance(values, Mapping) else {})
        try:
            return read_record(cls, json.dumps(content), "the recipe")
        except TypeError as error:
            raise InputError(f"not a recipe ({error}); expected what recipe.json holds") from error

    def but(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return replace(self, **changes)


def _check_goal(recipe: Recipe) -> None:
    """Raise `InputError` unless there is one goal, within its range; put the budget that it needs into `recipe`."""
    given = {name: value for name in GOALS if (value := getattr(recipe, name)) is not None}
    flags = {name: f"--{name.replace('_', '-')}" for name in GOALS}
    if not given:
        raise InputError(f"nothing says how small; give one of {', '.join(flags.values())}")
    if len(given) > 1:
        raise InputError(f"{' and '.join(flags[name] for name in given)} are given; give one of them")
    ((name, value),) = given.items()
    goal = GOALS[name]
    if not goal.above < value < goal.below:
        raise InputError(f"{name.replace('_', '-')} is {value}; expected {goal.expected}")
    budget = recipe.budget.partition(":")[0]
    if goal.budget and budget not in (goal.budget, "auto"):
        raise InputError(f"{flags[name]} counts by {goal.budget}, --budget says {budget}; leave one out")
    if name == "relevance_share" and recipe.rounds > 1:
        raise InputError(f"rounds is {recipe.rounds}; {flags[name]} is met in one, leave --rounds out")
    if name != "ratio" and recipe.guarantee:
        raise InputError(f"{flags[name]} is given with a guarantee, whose path ends at a ratio; give --ratio")
    if budget == "auto":
        object.__setattr__(recipe, "budget", goal.budget or DEFAULT_BUDGET)


def _on_bench(text: str, bench: Bench) -> Any:
    """A budget that reads a clock reads it as the bench does, where its text says nothing else."""
    from pxcompress.budgets import BUDGETS

    budget = BUDGETS.build(text)
    said = {part.partition("=")[0] for part in text.partition(":")[2].split(",")}
    shared = [field.name for field in fields(budget) if hasattr(bench, field.name)]  # type: ignore[arg-type]
    return replace(budget, **{name: getattr(bench, name) for name in shared if name not in said})  # type: ignore[type-var]


def _check_one_each(repairs: Sequence[str]) -> None:
    """Raise `InputError` where one text names several repairs: commas are for the options of one."""
    for text in repairs:
        names = text.partition(":")[0].split(",")
        if len(names) > 1:
            said = " ".join(f"--repair {name.strip()}" for name in names)
            raise InputError(f"repair {text!r} names {len(names)} at once; repeat the option: {said}")


def _check_order(repairs: Sequence[str], phases: Sequence[int]) -> None:
    """Raise `InputError` where a repair stands twice, or before one of an earlier phase, as a place in `PHASES`."""
    names = [text.partition(":")[0] for text in repairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"repair {name!r} is given {names.count(name)} times; give it once")
    for one, other in combinations(range(len(names)), 2):
        if phases[one] > phases[other]:
            raise InputError(f"repair {names[one]!r} stands before {names[other]!r}, whose result it needs; swap them")


def _ordered(targets: Sequence[str]) -> tuple[str, ...]:
    """Precisions in the order of `TARGETS`, each once, float32 among them: the others are made from it."""
    for name in targets:
        if name not in TARGETS:
            raise unknown("target", name, TARGETS)
    return tuple(name for name in TARGETS if name in {"fp32", *targets})
