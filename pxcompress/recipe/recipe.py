"""The recipe: all options of a run as one frozen record of plain values, which can be saved as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pxcompress.checks import check_keys, make_file_name, read_record
from pxcompress.errors import InputError, short
from pxcompress.recipe.bench import Bench
from pxcompress.recipe.export import Export
from pxcompress.recipe.goal import GOALS, Goal
from pxcompress.recipe.guarantee import Guarantee
from pxcompress.recipe.model_and_data import ModelAndData
from pxcompress.recipe.repairing import Repairing
from pxcompress.recipe.scoring import Scoring
from pxcompress.registry import name_of, option, split_method

if TYPE_CHECKING:
    from pxcompress.types import OpenAxes


@dataclass(frozen=True)
class Pruning(Export, Repairing, Scoring, Goal):
    """All options on how a model is pruned, timed and exported, whatever model and data are.

    It has the fields of all its parts, so that each option has one name everywhere; a stage gets it as the part that it
    needs. Raises `InputError` for options that contradict each other.
    """

    bench: Bench = field(default_factory=Bench, kw_only=True)

    def __post_init__(self) -> None:
        for part in (Goal, Scoring, Repairing, Export):
            part.__post_init__(self)
        if self.relevance_share is not None and self.rounds > 1:
            raise InputError(f"rounds is {self.rounds}; --relevance-share is met in one, leave --rounds out")

    def _shorten_budget(self) -> str:
        """The budget's text in short form; a latency budget takes the bench's conditions unless it has its own."""
        from pxcompress.budgets import BUDGETS

        budget = BUDGETS.build(self.budget)
        name, options = split_method(self.budget)
        named = {part.partition("=")[0] for part in options.split(",")}
        shared = {each.name for each in BUDGETS.options(name) if hasattr(self.bench, each.name)}
        changes = {name: getattr(self.bench, name) for name in shared - named}
        return BUDGETS.text(replace(budget, **changes))  # type: ignore[type-var]

    @property
    def open_axes(self) -> OpenAxes:
        """Which axes of exported files may have any size."""
        from pxcompress.types import OpenAxes

        return OpenAxes(self.bench.batch_size if self.fixed_batch else None, self.dynamic_size)


@dataclass(frozen=True)
class Recipe(Pruning, ModelAndData):
    """All options of one run: model and data, how small it must become, how, and what is to be certified.

    Raises `InputError` for anything unknown or out of range.
    """

    _: KW_ONLY
    against: Sequence[str] = option(
        (),
        "Compare with this model too (repeat the option): a timm name, MODEL=CHECKPOINT or an ONNX file; also with "
        "int8 and with smaller images. The report says which to ship.",
        repeat=True,
    )
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        ModelAndData.__post_init__(self)
        Pruning.__post_init__(self)
        object.__setattr__(self, "against", tuple(self.against))
        if self.guarantee and self.rounds > 1:
            raise InputError(f"rounds is {self.rounds}; expected 1 where a guarantee is asked for")
        if self.guarantee and self.ratio is None:
            flag = self.way.replace("_", "-")
            raise InputError(f"--{flag} is given with a guarantee, whose path ends at a ratio; give --ratio")

    @property
    def label(self) -> str:
        """Name of the run folder, made of model, budget, ratio, number of classes, and guarantee."""
        promise = f"-drop-{self.guarantee.max_drop:g}" if self.guarantee else ""
        if self.guarantee and (scope := self.guarantee.group or self.guarantee.part) != "all":
            promise += f"-{make_file_name(scope)}"
        task = f"-{len(self.classes)}-classes" if self.classes else ""
        return f"{self.stem}-{self._goal_label}{task}{promise}"

    @property
    def stem(self) -> str:
        """First part of the run folder's name: model and budget."""
        return f"{make_file_name(self.model)}-{make_file_name(name_of(self.budget))}"

    @property
    def _goal_label(self) -> str:
        if self.ratio is not None:
            return f"{self.ratio:.2f}" if round(self.ratio, 2) == self.ratio else f"{self.ratio:.4g}"
        return f"{getattr(self, self.way):g}{GOALS[self.way].suffix}"

    @property
    def hash(self) -> str:
        """sha256 of the recipe's JSON, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """JSON text that `from_json` turns into an equal recipe."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, source: str = "the recipe") -> Recipe:
        """Read a recipe from JSON. Raises `InputError`, which names its `source`, for what is no recipe."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not a recipe ({error}); expected JSON as recipe.json holds") from error
        return cls.from_dict(content, source)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "the recipe") -> Recipe:
        """Make a recipe from plain values, as `to_json` writes them. Raises as `from_json` does."""
        if not isinstance(content, Mapping):
            raise InputError(f"{source} is {short(repr(content), 40)}; expected what recipe.json holds")
        for part, values in ((cls, content), (Bench, content.get("bench")), (Guarantee, content.get("guarantee"))):
            check_keys(part, values if isinstance(values, Mapping) else {})
        try:
            return read_record(cls, json.dumps(content), source)
        except TypeError as error:
            raise InputError(f"{source} is not a recipe ({error}); expected what recipe.json holds") from error

    def but(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return replace(self, **changes)
