"""What a search varies, read from the options of scorers, rules and repairs; and the recipe that a choice stands for.

Every choice names every parameter, also those that its rules or its scorer do not use: samplers and importances want
one space for all trials.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass
from typing import Any, cast

from pxcompress.attribution import COMPOSITES, SOFTMAX_RULES, Composite, parse_composite
from pxcompress.attribution.composites import PARTS, PXP_RULES, varied, with_parameters
from pxcompress.planning.order import NORMALISATIONS
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS

Value = str | float
Values = Mapping[str, Value]
"""Parameter name -> what is chosen."""

DEPTHS = PARTS[1:]
"""Parts that have a rule in every composite."""

SMALLEST = 1e-6
"""Where a logarithmic range whose lower end is 0 starts, as a share of its upper end."""

PXP_AGGREGATES = ("abs", "signed")

SPACES = {
    "full": "rules and their parameters, softmax rule, score and its options, normalisation, strength of the repairs",
    "pxp": "rules, softmax rule, and |R| or R: what PXP searches",
}


@dataclass(frozen=True)
class Parameter:
    """One of `choices`, or where there are none a number from `low` to `high`; `default` is that of the option."""

    name: str
    default: Value
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def fits(self, value: object) -> bool:
        """Whether `value` can be chosen."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high


def _parameter(name: str, field: Field[Any]) -> Parameter:
    """The parameter of an option."""
    default = cast(Any, field.default)
    if isinstance(default, bool):
        return Parameter(name, str(default).lower(), ("false", "true"))
    if field.metadata["choices"]:
        return Parameter(name, default, field.metadata["choices"])
    low, high, log = (field.metadata[key] for key in ("low", "high", "log"))
    return Parameter(name, default, (), high * SMALLEST if log and low == 0 else low, high, log)


def _options(fields: Sequence[Field[Any]], prefix: str = "") -> Iterator[Parameter]:
    return (_parameter(prefix + field.name, field) for field in fields if field.metadata.get("searched"))


def _ruled_scorers() -> tuple[str, ...]:
    """Scorers with a composite."""
    return tuple(name for name in SCORERS if any(field.name == "composite" for field in SCORERS.options(name)))


def plain_scorers() -> tuple[str, ...]:
    """Scorers without rules: the baselines of a search."""
    return tuple(name for name in SCORERS if name not in _ruled_scorers())


@dataclass(frozen=True)
class Space:
    """Parameters, and the recipe that says everything else; its scorer is one with rules."""

    recipe: Recipe
    parameters: tuple[Parameter, ...]

    def recipe_at(self, values: Values) -> Recipe:
        """The recipe that `values`, one for each parameter, stand for."""
        values = {key: _rounded(value) for key, value in values.items()}
        name = str(values.get("scorer", self._scorer))
        options = {**self._said(name), **values, "composite": str(_composite(values))}
        known = [field.name for field in SCORERS.options(name)]
        text = ",".join(f"{key}={value}" for key, value in options.items() if key in known)
        repairs = tuple(_repair(text, values) for text in self.recipe.repair)
        changed: dict[str, Any] = {"normalise": str(values.get("normalise", self.recipe.normalise))}
        changed |= {"ratio": float(values["ratio"])} if "ratio" in values else {}
        return self.recipe.but(scorer=f"{name}:{text}", repair=repairs, **changed)

    @property
    def _scorer(self) -> str:
        return self.recipe.scorer.partition(":")[0]

    def _said(self, scorer: str) -> dict[str, Value]:
        """Options of `scorer` as the recipe has them, at their defaults where it has another one."""
        built = SCORERS.build(self.recipe.scorer if scorer == self._scorer else scorer)
        found = {field.name: getattr(built, field.name) for field in SCORERS.options(scorer)}
        return {key: str(value).lower() if isinstance(value, bool) else value for key, value in found.items()}

    @property
    def defaults(self) -> dict[str, Value]:
        """Every parameter as the recipe has it, at its default where the recipe does not say it."""
        said = {"scorer": self._scorer, "normalise": self.recipe.normalise, **self._said(self._scorer)}
        said |= {"ratio": str(self.recipe.ratio)}
        said |= _words(str(said["composite"]))
        return {each.name: said.get(each.name, each.default) for each in self.parameters}

    def starts(self) -> list[dict[str, Value]]:
        """What every search begins with: the recipe's own choice, and with it all named composites of `PXP_RULES`."""
        found = [self.defaults]
        for text in COMPOSITES.values():
            values = {**self.defaults, **_words(text)}
            found += [values] if values not in found else []
        return found

    def fitting(self, values: Values) -> dict[str, Value]:
        """`values` where they can be chosen here, defaults elsewhere: a choice that was made in another space."""
        known = {each.name: values[each.name] for each in self.parameters if each.fits(values.get(each.name))}
        return {**self.defaults, **known}

    def unfit(self, values: Values) -> list[str]:
        """Names of those among `values` that cannot be chosen here."""
        known = {each.name: each for each in self.parameters}
        return [name for name, value in values.items() if name not in known or not known[name].fits(value)]

    @property
    def grid_size(self) -> int:
        """How many choices there are with all numbers at their defaults."""
        return math.prod(len(parameter.choices) or 1 for parameter in self.parameters)

    def grid(self, place: int) -> dict[str, Value]:
        """The choice at `place` of that grid, in an order that soon has been everywhere."""
        step = next(s for s in itertools.count(round(0.618 * self.grid_size) or 1) if math.gcd(s, self.grid_size) == 1)
        place = place * step % self.grid_size
        values = self.defaults
        for parameter in self.parameters:
            if parameter.choices:
                place, index = divmod(place, len(parameter.choices))
                values[parameter.name] = parameter.choices[index]
        return values


def space_of(recipe: Recipe, name: str, *, attention: bool, ratios: Sequence[float] = ()) -> Space:
    """The space `name`, one of `SPACES`, around `recipe`, with the softmax rule where the model has `attention`.

    Where there are `ratios`, how much goes is chosen from them, too.
    """
    shares = [Parameter("ratio", str(recipe.ratio), tuple(map(str, ratios)))] if ratios else []
    rules = [Parameter(part, "epsilon", PXP_RULES) for part in DEPTHS]
    softmax = [Parameter("softmax", "cp", tuple(SOFTMAX_RULES))] if attention else []
    if name == "pxp":
        aggregate = Parameter("aggregate", "abs", PXP_AGGREGATES)
        return Space(recipe.but(scorer="lrp", normalise="none"), (*rules, *softmax, aggregate, *shares))
    scorers = _ruled_scorers()
    if recipe.scorer.partition(":")[0] not in scorers:
        recipe = recipe.but(scorer=Recipe.scorer)
    numbers = [each for part in DEPTHS for word in PXP_RULES for each in _options(varied(word), f"{part}.")]
    own = {each.name: each for scorer in scorers for each in _options(SCORERS.options(scorer))}
    ranking = Parameter("normalise", "mean", tuple(NORMALISATIONS))
    repairs = (text.partition(":")[0] for text in recipe.repair)
    strengths = [each for name in repairs for each in _options(REPAIRS.options(name), f"{name}.")]
    scorer = Parameter("scorer", Recipe.scorer, scorers)
    return Space(recipe, (*rules, *numbers, *softmax, scorer, *own.values(), ranking, *strengths, *shares))


def trial_repairs(texts: Sequence[str]) -> tuple[str, ...]:
    """Those of a recipe's repairs that do not cost many times what a trial costs otherwise."""
    return tuple(text for text in texts if not getattr(REPAIRS.get(text.partition(":")[0]), "costly", False))


def with_repairs(recipe: Recipe, texts: Sequence[str]) -> Recipe:
    """`recipe` with the repairs `texts`, those that it has already as it has them."""
    own = {text.partition(":")[0]: text for text in recipe.repair}
    return recipe.but(repair=tuple(own.get(text.partition(":")[0], text) for text in texts))


def _rounded(value: Value) -> Value:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _words(text: str) -> dict[str, str]:
    """The parts of a composite, where all of them are `PXP_RULES` without parameters of their own."""
    composite = parse_composite(text)
    words = {str(part): str(composite.choice(part)) for part in DEPTHS}
    return words if composite.first is None and set(words.values()) <= set(PXP_RULES) else {}


def _composite(values: Values) -> Composite:
    parts: dict[str, Any] = {}
    for part in DEPTHS:
        word = str(values[part])
        names = [field.name for field in varied(word)]
        numbers = {name: cast(float, values[f"{part}.{name}"]) for name in names if f"{part}.{name}" in values}
        parts[part] = with_parameters(word, numbers)
    return Composite(**parts, softmax=cast(Any, values.get("softmax", "cp")))


def _repair(text: str, values: Values) -> str:
    name = text.partition(":")[0]
    fields = REPAIRS.options(name)
    said = {field.name: values[f"{name}.{field.name}"] for field in fields if f"{name}.{field.name}" in values}
    return REPAIRS.text(dataclasses.replace(cast(Any, REPAIRS.build(text)), **said))
