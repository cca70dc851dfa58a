"""The part of a recipe about how small the model must become, how that is measured, and what may be removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from pxcompress.checks import check_types
from pxcompress.choices import CONVERSIONS, NORMALISATIONS, SCOPES, one_of
from pxcompress.errors import InputError
from pxcompress.registry import name_of, names_in, option

if TYPE_CHECKING:
    from pxcompress.planning.limits import Limits
    from pxcompress.planning.selection import Selection
    from pxcompress.types import Budget

DEFAULT_BUDGET = "macs"
MEASURED_STEP = 0
"""Value of `round_to` for the step of widths that measures best on this machine."""


@dataclass(frozen=True)
class _Way:
    """One way to give the goal: its budget, its range, a text on what is expected, and its ending in folder names."""

    budget: str
    above: float
    expected: str
    suffix: str = ""
    below: float = math.inf


GOALS = {
    "ratio": _Way("", 0, "a share of the cost to remove, between 0 and 1, such as 0.5 for half", below=1),
    "speedup": _Way("latency", 1, "a factor above 1, such as 2x", "x"),
    "latency_ms": _Way("latency", 0, "milliseconds above 0", "ms"),
    "max_bytes": _Way("bytes", 0, "a size above 0, such as 20MB", "B"),
    "relevance_share": _Way("", 0, "a share of every layer's scores, between 0 and 1", "-relevance", below=1),
}
"""The ways to give the goal, by option; exactly one is used. One with a budget of its own sets the budget."""


@dataclass(frozen=True)
class Goal:
    """How small the model must become: `ratio`, the share of the dense cost to remove, or another of `GOALS`.

    `budget` is a text like "latency:threads=2", stored in short form. `only`, `keep`, `scope`, `min_keep` and `floors`
    say which groups may lose units, and how many; `normalise` and `round_to` default to what suits the budget. Raises
    `InputError` for anything unknown or out of range, and unless there is exactly one goal.
    """

    ratio: float | None = option(None, "Share of the model's cost to remove, 0 to 1; --budget says which cost.")
    _: KW_ONLY
    speedup: float | None = option(
        None, "Instead of --ratio: how many times faster, such as 2x, measured on this machine."
    )
    latency_ms: float | None = option(
        None, "Instead of --ratio: milliseconds that a call may take, measured on this machine."
    )
    max_bytes: int | None = option(None, "Instead of --ratio: largest size of the whole ONNX file, such as 20MB.")
    relevance_share: float | None = option(
        None,
        "Instead of --ratio: remove from every layer its lowest-scored units, which together hold at most this share "
        "of the layer's scores.",
    )
    budget: str = option(
        "auto",
        f"Cost that --ratio is a share of: {one_of(names_in('pxcompress.budgets'))}, or your own "
        f"package.module:Class.  [default: {DEFAULT_BUDGET}]",
    )
    normalise: str = option(
        "auto",
        "How scores of groups of units are scaled to be compared: auto (as suits the budget), "
        f"{one_of(NORMALISATIONS)}; `pxcompress methods` explains them.",
    )
    round_to: int | None = option(
        None,
        "Make layer widths multiples of this number. 1: any width; 0: the multiple that measures fastest; "
        f"{one_of(CONVERSIONS)}: what suits that runtime.  [default: 8; 0 with --budget latency]",
    )
    min_keep: float = option(
        0.1,
        "Smallest share of its units that every group keeps, 0 to 1. Units are channels, neurons or heads; a group has "
        "those of all layers that must lose the same ones.",
    )
    floors: Sequence[str] = option(
        (), "As --min-keep, for single groups: GLOB=SHARE with commas, such as 'layer4*=0.5'."
    )
    only: Sequence[str] = option(
        (), "Prune only groups whose name matches: globs with commas; `pxcompress inspect` lists names."
    )
    keep: Sequence[str] = option((), "Do not prune groups whose name matches: globs with commas.")
    scope: str = option(
        "all",
        f"Which groups may lose units: {one_of(SCOPES)} (inner: all but residual streams).",
    )

    def __post_init__(self) -> None:
        from pxcompress.budgets import BUDGETS

        check_types(self, Goal)
        _check_goal(self)
        if self.budget == "auto":
            object.__setattr__(self, "budget", GOALS[self.way].budget or DEFAULT_BUDGET)
        object.__setattr__(self, "budget", self._shorten_budget())
        budget = BUDGETS.get(name_of(self.budget))
        if self.normalise == "auto":
            object.__setattr__(self, "normalise", budget.normalise)
        if self.round_to is None:
            object.__setattr__(self, "round_to", budget.round_to)
        if (self.round_to or 0) < 0:
            raise InputError(f"round-to is {self.round_to}; expected 0 (as measures best), 1 (no alignment) or more")
        _ = self.limits, self.selection

    def _shorten_budget(self) -> str:
        """The budget's text in its shortest form. Raises `InputError` if it is not valid."""
        from pxcompress.budgets import BUDGETS

        return BUDGETS.text(BUDGETS.build(self.budget))

    @property
    def way(self) -> str:
        """Name of the goal that was given, one of `GOALS`."""
        return next(name for name in GOALS if getattr(self, name) is not None)

    @property
    def limits(self) -> Limits:
        """Limits on what a plan may do to a group."""
        from pxcompress.planning.limits import Limits

        return Limits(self.normalise, self.round_to or 1, self.min_keep, self.selection.least)

    @property
    def selection(self) -> Selection:
        """Which groups a plan may prune."""
        from pxcompress.planning.selection import Selection

        return Selection(self.only, self.keep, self.scope, self.floors)

    @property
    def limit(self) -> float | None:
        """Most that the result may cost, in the budget's unit; None if the goal is a share."""
        return self.latency_ms if self.latency_ms is not None else self.max_bytes

    def share(self, cost: float) -> float:
        """Share of the dense model's `cost`, in the budget's unit, that must be removed.

        Raises `InputError` if the dense model meets the goal already.
        """
        share_by_way = {
            "ratio": lambda value: value,
            "speedup": lambda value: 1 - 1 / value,
            "latency_ms": lambda value: 1 - value / cost,
            "max_bytes": lambda value: 1 - value / cost,
        }
        value = getattr(self, self.way)
        share = share_by_way[self.way](value)
        if share <= 0:
            raise InputError(f"{self.way.replace('_', '-')} is {value:g}; the dense model takes {cost:.4g} already")
        return float(share)


def auto_normalise(budget: str) -> str:
    """Default of `normalise`, how groups are made comparable, for a budget's text."""
    return _budget(budget).normalise


def auto_round_to(budget: str) -> int:
    """Default of `round_to`, the step of widths, for a budget's text."""
    return _budget(budget).round_to


def _budget(text: str) -> type[Budget]:
    from pxcompress.budgets import BUDGETS

    return BUDGETS.get(name_of(text))


def _check_goal(goal: Goal) -> None:
    """Raise `InputError` unless exactly one goal is given, in its range, with a budget that fits it."""
    values = {name: value for name in GOALS if (value := getattr(goal, name)) is not None}
    flags = {name: f"--{name.replace('_', '-')}" for name in GOALS}
    if not values:
        raise InputError(f"nothing says how small; give one of {', '.join(flags.values())}")
    if len(values) > 1:
        raise InputError(f"{' and '.join(flags[name] for name in values)} are given; give one of them")
    ((name, value),) = values.items()
    way = GOALS[name]
    if not way.above < value < way.below:
        raise InputError(f"{name.replace('_', '-')} is {value}; expected {way.expected}")
    budget = name_of(goal.budget)
    if way.budget and budget not in (way.budget, "auto"):
        raise InputError(f"{flags[name]} counts by {way.budget}, --budget says {budget}; leave one out")
