"""The parameters that a search varies, taken from the options of scorers and rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass
from typing import Any, cast

from pxcompress.attribution import COMPOSITES, SOFTMAX_RULES, Composite, parse_composite
from pxcompress.attribution.composites import PARTS, PXP_RULES, list_varied_parameters, set_parameters
from pxcompress.planning.order import NORMALISATIONS
from pxcompress.recipe import Recipe
from pxcompress.recipe.scoring import AUTO_SCORERS
from pxcompress.registry import name_of
from pxcompress.scorers import SCORERS

Value = str | float
Values = Mapping[str, Value]
"""Parameter name -> chosen value."""

DEPTHS = PARTS[1:]
"""Parts of a network, by depth, for which every composite has a rule."""

SMALLEST = 1e-6
"""Lower end of a logarithmic range whose option starts at 0, as a share of the upper end."""

PXP_AGGREGATES = ("abs", "signed")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a search: one of `choices`, or, if there are none, a number from `low` to `high`."""

    name: str
    default: Value
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


def _make_parameter(name: str, field: Field[Any]) -> Parameter:
    """The search parameter for an option."""
    default = cast(Any, field.default)
    if isinstance(default, bool):
        return Parameter(name, str(default).lower(), ("false", "true"))
    if field.metadata["choices"]:
        return Parameter(name, default, field.metadata["choices"])
    low, high, log = (field.metadata[key] for key in ("low", "high", "log"))
    return Parameter(name, default, (), high * SMALLEST if log and low == 0 else low, high, log)


def _list_parameters(fields: Sequence[Field[Any]], prefix: str = "") -> Iterator[Parameter]:
    return (_make_parameter(prefix + field.name, field) for field in fields if field.metadata.get("searched"))


@dataclass(frozen=True)
class Space:
    """The parameters of a search, and the recipe for everything else."""

    recipe: Recipe
    parameters: tuple[Parameter, ...]

    def recipe_at(self, values: Values) -> Recipe:
        """The recipe for `values`, which has one value for each parameter."""
        values = {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in values.items()}
        name = str(values.get("scorer", self._scorer))
        options = self._list_options(name)
        if _has_rules(name):
            options |= {**values, "composite": str(_build_composite(values))}
        option_names = [field.name for field in SCORERS.options(name)]
        text = ",".join(f"{key}={value}" for key, value in options.items() if key in option_names)
        normalise = str(values.get("normalise", self.recipe.normalise))
        return self.recipe.but(scorer=f"{name}:{text}", normalise=normalise)

    @property
    def _scorer(self) -> str:
        return name_of(self.recipe.scorer)

    def _list_options(self, scorer: str) -> dict[str, Value]:
        """Options of `scorer`: as in the recipe if it has this scorer, else their defaults."""
        instance = SCORERS.build(self.recipe.scorer if scorer == self._scorer else scorer)
        options = {field.name: getattr(instance, field.name) for field in SCORERS.options(scorer)}
        return {key: str(value).lower() if isinstance(value, bool) else value for key, value in options.items()}

    @property
    def defaults(self) -> dict[str, Value]:
        """The value of every parameter in the recipe, or its default if the recipe does not say it."""
        values = {"scorer": self._scorer, "normalise": self.recipe.normalise, **self._list_options(self._scorer)}
        values |= _parse_words(str(values.get("composite", "epsilon")))
        return {each.name: values.get(each.name, each.default) for each in self.parameters}

    def starts(self) -> list[dict[str, Value]]:
        """Values to try first: the recipe's own, and those of the named composites."""
        scorer = self._scorer if _has_rules(self._scorer) else AUTO_SCORERS[0]
        starts = [self.defaults]
        for text in COMPOSITES.values():
            values = {
                **self.defaults,
                **({"scorer": scorer} if "scorer" in self.defaults else {}),
                **_parse_words(text),
            }
            starts += [values] if values not in starts else []
        return starts


def make_space(recipe: Recipe, *, attention: bool) -> Space:
    """The parameters that a search varies, with `recipe` for everything else.

    They are the scorer, its options and LRP rules, the rule for softmax (if the model has `attention`), and the
    normalisation.
    """
    recipe, scorers = recipe.but(scorer=recipe.scorers[0]), [name for name in SCORERS if _has_rules(name)]
    numbers = [
        each
        for part in DEPTHS
        for word in PXP_RULES
        for each in _list_parameters(list_varied_parameters(word), f"{part}.")
    ]
    parameters = {each.name: each for scorer in scorers for each in _list_parameters(SCORERS.options(scorer))}
    ranking = Parameter("normalise", "mean", tuple(NORMALISATIONS))
    own_scorer = name_of(recipe.scorer)
    scorer = Parameter("scorer", own_scorer, tuple(dict.fromkeys((own_scorer, *scorers))))
    return Space(recipe, (*_list_rule_parameters(attention), *numbers, scorer, *parameters.values(), ranking))


def make_pxp_space(recipe: Recipe, *, attention: bool) -> Space:
    """The space that PXP searches: a rule for every depth, the softmax rule, and |R| or R."""
    aggregate = Parameter("aggregate", "abs", PXP_AGGREGATES)
    return Space(recipe.but(scorer="lrp", normalise="none"), (*_list_rule_parameters(attention), aggregate))


def _list_rule_parameters(attention: bool) -> list[Parameter]:
    softmax = [Parameter("softmax", "cp", tuple(SOFTMAX_RULES))] if attention else []
    return [*(Parameter(part, "epsilon", PXP_RULES) for part in DEPTHS), *softmax]


def _has_rules(scorer: str) -> bool:
    return any(field.name == "composite" for field in SCORERS.options(scorer))


def _parse_words(text: str) -> dict[str, str]:
    """The rule of each part of a composite by name; empty unless all are `PXP_RULES` without numbers."""
    composite = parse_composite(text)
    words = {str(part): str(composite.choice(part)) for part in DEPTHS}
    return words if composite.first is None and set(words.values()) <= set(PXP_RULES) else {}


def _build_composite(values: Values) -> Composite:
    parts: dict[str, Any] = {}
    for part in DEPTHS:
        word = str(values[part])
        names = [field.name for field in list_varied_parameters(word)]
        numbers = {name: cast(float, values[f"{part}.{name}"]) for name in names if f"{part}.{name}" in values}
        parts[part] = set_parameters(word, numbers)
    return Composite(**parts, softmax=cast(Any, values.get("softmax", "cp")))
