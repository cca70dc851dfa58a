"""Which rule at which depth: composites, their text form, and named ones.

A composite's text is parts separated by "|": `low`, `mid` and `high` (the first quarter, the middle half and the last
quarter of the hidden layers, in the order in which the model executes them), `classifier`, optionally `first` (the very
first layer) and `softmax`. A part's value is a rule, or two, for convolutions / for linear layers. Text that does not
start with `part=` starts with a named composite or with one rule for all layers; what follows changes single parts.

    epsilon                                     gamma|first=flat                    gamma(0.1)|classifier=epsilon
    first=zbox(-2.1;2.6)|low=alphabeta(2;1)|mid=gamma(0.25)/gamma(0.05)|high=epsilon|classifier=epsilon|softmax=attn

No commas and no brackets but round ones, so a composite can be an option of a scorer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pxcompress.attribution.attention import SOFTMAX_RULES, SoftmaxRule
from pxcompress.attribution.rules import RULES, AlphaBeta, Gamma, Rule
from pxcompress.errors import InputError, unknown

Part = Literal["first", "low", "mid", "high", "classifier"]

PARTS: tuple[Part, ...] = ("first", "low", "mid", "high", "classifier")

COMPOSITES: Mapping[str, str] = {
    "epsilon": "low=epsilon|mid=epsilon|high=epsilon|classifier=epsilon",
    "gamma": "low=gamma|mid=gamma|high=gamma|classifier=gamma",
    "zplus": "low=zplus|mid=zplus|high=zplus|classifier=zplus",
    "alpha2beta1": "low=alpha2beta1|mid=alpha2beta1|high=alpha2beta1|classifier=alpha2beta1",
    "pxp-cnn": "low=alpha2beta1|mid=gamma|high=epsilon|classifier=epsilon",
    "pxp-vit": "low=gamma|mid=gamma|high=epsilon|classifier=epsilon|softmax=cp",
    "epsilon-plus": "low=zplus/epsilon|mid=zplus/epsilon|high=zplus/epsilon|classifier=epsilon",
    "epsilon-gamma-box": "first=zbox|low=gamma(0.25)/epsilon|mid=gamma(0.25)/epsilon|high=gamma(0.25)/epsilon"
    "|classifier=epsilon",
}
"""Named composites, as the text that defines each.

`pxp-*` follow "Pruning by Explaining Revisited": the network's depth in four parts, with the usual order of rules,
stable near the input and faithful near the output; the paper tunes them for each model. `epsilon-plus` and
`epsilon-gamma-box` are zennit's.
"""


@dataclass(frozen=True)
class Choice:
    """The rules for one part of the network: one for its convolutions, one for its linear layers."""

    convolution: Rule
    linear: Rule

    def __str__(self) -> str:
        for word, choice in _WORDS.items():
            if choice == self:
                return word
        pair = (str(self.convolution), str(self.linear))
        return pair[0] if pair[0] == pair[1] and pair[0] not in _WORDS else "/".join(pair)


def _use_for_both(rule: Rule) -> Choice:
    return Choice(rule, rule)


_WORDS: Mapping[str, Choice] = {
    **{name: _use_for_both(rule()) for name, rule in RULES.items() if name not in ("gamma", "alphabeta")},
    "gamma": Choice(Gamma(0.25), Gamma(0.05)),
    "alpha2beta1": _use_for_both(AlphaBeta(2.0, 1.0)),
}
"""Rule names that may be written without numbers, with the parameters that PXP sets: gamma is smaller for linear
layers.
"""

PXP_RULES = ("epsilon", "alpha2beta1", "gamma", "zplus")
"""The rules among which "Pruning by Explaining Revisited" (PXP) chooses for each part of the network."""


def list_varied_parameters(word: str) -> tuple[dataclasses.Field[Any], ...]:
    """The parameters, of the rule named `word`, that a search varies."""
    return tuple(
        field for field in dataclasses.fields(cast(Any, _WORDS[word].linear)) if field.metadata.get("searched")
    )


def set_parameters(word: str, values: Mapping[str, float]) -> Choice:
    """The rules named `word`, with `values` as the parameters of the rule for convolutions.

    Parameters of the rule for linear layers keep their ratio to those: its gamma is a fifth.
    """
    choice = cast(Any, _WORDS[word])
    linear = {
        name: float(f"{value * getattr(choice.linear, name) / getattr(choice.convolution, name):.6g}")
        for name, value in values.items()
    }
    return Choice(dataclasses.replace(choice.convolution, **values), dataclasses.replace(choice.linear, **linear))


@dataclass(frozen=True)
class Composite:
    """A rule for every layer, chosen by how deep it lies in the network.

    `str` of it is the shortest text that parses to it.
    """

    low: Choice
    mid: Choice
    high: Choice
    classifier: Choice
    first: Choice | None = None
    softmax: SoftmaxRule = "cp"

    def __str__(self) -> str:
        for name, text in COMPOSITES.items():
            if parse_composite(text) == self:
                return name
        if self.low == self.mid == self.high == self.classifier:
            parts = [str(self.low)]
            parts += [f"first={self.first}"] if self.first else []
        else:
            parts = [f"{part}={getattr(self, part)}" for part in PARTS if getattr(self, part) is not None]
        return "|".join(parts if self.softmax == "cp" else [*parts, f"softmax={self.softmax}"])

    def choice(self, part: Part) -> Choice:
        """The rules for a part of the network; the part `first` takes those of `low` where it has none of its own."""
        return self.low if part == "first" and self.first is None else getattr(self, part)


def split_by_depth(classifier: Sequence[bool]) -> list[Part]:
    """Assign each layer to a part of the network.

    `classifier` says in executed order which layers are the classifier's. Of n other layers the first and the last
    ceil(n / 4) are low and high; the very first is `first`.
    """
    hidden = [index for index, is_classifier in enumerate(classifier) if not is_classifier]
    quarter = math.ceil(len(hidden) / 4)
    parts: list[Part] = ["classifier"] * len(classifier)
    for place, index in enumerate(hidden):
        parts[index] = "low" if place < quarter else "high" if place >= len(hidden) - quarter else "mid"
    if hidden:
        parts[hidden[0]] = "first"
    return parts


def parse_composite(text: str) -> Composite:
    """The composite that `text` describes; the module's docstring explains the format.

    Raises `InputError`, one line, for an unknown part, rule or name, a wrong number or value of parameters, a part
    given twice, and for parts that are left without a rule.
    """
    segments = [segment.strip() for segment in text.split("|")]
    if not all(segments):
        raise InputError(
            f"composite {text!r} has an empty part; expected for example 'gamma' or 'low=zplus|mid=gamma|...'"
        )
    values: dict[str, Choice | str] = {}
    if "=" not in segments[0]:
        values.update(_parse_base(segments.pop(0)))
    keys: set[str] = set()
    for segment in segments:
        part, sign, value = (piece.strip() for piece in segment.partition("="))
        if not sign:
            raise InputError(f"composite {text!r}: {segment!r} is not part=rule; parts: {', '.join(PARTS)}, softmax")
        if part not in (*PARTS, "softmax"):
            raise unknown("part of a composite", part, (*PARTS, "softmax"))
        if part in keys:
            raise InputError(f"composite {text!r} gives part {part!r} twice")
        keys.add(part)
        values[part] = _parse_softmax(value) if part == "softmax" else _parse_choice(value)
    missing = [part for part in PARTS[1:] if part not in values]
    if missing:
        raise InputError(
            f"composite {text!r} has no rule for: {', '.join(missing)}; add them, or start with a rule for all, "
            f"as in 'epsilon|{segments[0]}'"
        )
    return Composite(**cast("dict[str, Any]", values))


def _parse_base(text: str) -> dict[str, Choice | str]:
    """Rules by part for a text without "|": those of a named composite, or the same rule for all parts."""
    if text in COMPOSITES:
        composite = parse_composite(COMPOSITES[text])
        return {field.name: getattr(composite, field.name) for field in dataclasses.fields(composite)}
    if re.fullmatch(r"[\w-]+", text) and text not in (*_WORDS, *RULES):
        raise unknown("composite or rule", text, {*COMPOSITES, *_WORDS, *RULES})
    return dict.fromkeys(PARTS[1:], _parse_choice(text))


def _parse_softmax(text: str) -> str:
    if text not in SOFTMAX_RULES:
        raise unknown("softmax rule", text, SOFTMAX_RULES)
    return text


def _parse_choice(text: str) -> Choice:
    """Parse "rule" or "rule for convolutions/rule for linear layers". Raises `InputError`."""
    choices = [_parse_rule(piece.strip()) for piece in text.split("/")]
    if len(choices) > 2:
        raise InputError(f"{text!r} names {len(choices)} rules; expected one, or two: convolutions/linear layers")
    return Choice(choices[0].convolution, choices[-1].linear)


def _parse_rule(text: str) -> Choice:
    """Parse "name" or "name(number;number)" as the rules for convolutions and linear layers. Raises `InputError`."""
    match = re.fullmatch(r"([\w-]+)\s*(?:\(([^()]*)\))?", text)
    if match is None:
        raise InputError(f"rule {text!r} cannot be read; expected name or name(number;number), for example gamma(0.25)")
    name, arguments = match.groups()
    if name not in RULES and name not in _WORDS:
        raise unknown("rule", name, {*RULES, *_WORDS})
    if arguments is None:
        return _WORDS[name] if name in _WORDS else _use_for_both(RULES[name]())
    if name not in RULES:
        raise InputError(f"rule {name!r} takes no parameters; given: {text!r}")
    fields = [field.name for field in dataclasses.fields(cast("type[AlphaBeta]", RULES[name]))]
    numbers = _parse_numbers(arguments, text)
    if len(numbers) != len(fields):
        expected = f"{name}({';'.join(fields)})" if fields else f"{name} without parameters"
        raise InputError(f"rule {text!r} has {len(numbers)} parameters; expected {expected}")
    return _use_for_both(RULES[name](*numbers))


def _parse_numbers(text: str, source: str) -> list[float]:
    """Parse numbers that are separated by ";" or ","; `source` is the whole text for the error message."""
    try:
        return [float(piece) for piece in re.split("[;,]", text)] if text.strip() else []
    except ValueError:
        raise InputError(f"rule {source!r}: expected numbers between the brackets, separated by ;") from None
