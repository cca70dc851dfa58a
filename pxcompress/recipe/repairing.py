"""The part of a recipe about how a pruned model regains quality, and in how many rounds it is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from pxcompress.checks import check_types
from pxcompress.choices import one_of
from pxcompress.errors import InputError
from pxcompress.recipe.scoring import AUTO
from pxcompress.registry import name_of, names_in, option

CLOSED_FORM = ("fold", "least-squares", "batchnorm")
DEFAULT_REPAIR = (*CLOSED_FORM, "finetune")
NAMED = {AUTO: DEFAULT_REPAIR, "closed-form": CLOSED_FORM}
"""Names that stand for several repairs in a row."""


@dataclass(frozen=True, kw_only=True)
class Repairing:
    """The repairs in order, as texts like "fold:ridge=0.1" in short form, and the number of `rounds` of pruning.

    All repairs run after each round. "auto" means `DEFAULT_REPAIR`, "closed-form" those of them that do not train, ()
    none. Raises `InputError` for an unknown repair, for one given twice, and for one in front of another whose result
    it needs.
    """

    repair: Sequence[str] = option(
        (AUTO,),
        "How outputs of the pruned model are brought back to the dense one's; repeat the option for several, in order: "
        f"{one_of(names_in('pxcompress.repair'))}, or your own package.module:Class; "
        "closed-form: the defaults that do not train; none for none.  "
        f"[default: {', '.join(DEFAULT_REPAIR)}]",
        repeat=True,
    )
    rounds: int = option(1, "Prune in this many steps, with new scores and repairs after each: slower, small gains.")
    temperature_scaling: bool = option(
        False, "Divide the logits by a temperature fitted to held-out labels: probabilities that can be trusted."
    )

    def __post_init__(self) -> None:
        from pxcompress.repair import PHASES, REPAIRS

        check_types(self, Repairing)
        if self.rounds < 1:
            raise InputError(f"rounds is {self.rounds}; expected 1 or more")
        texts = [text for text in self.repair for text in NAMED.get(text, (text,))]
        _check_one_each(texts)
        repairs = [REPAIRS.build(text) for text in texts]
        object.__setattr__(self, "repair", tuple(REPAIRS.text(repair) for repair in repairs))
        _check_order(self.repair, [PHASES.index(repair.phase) for repair in repairs])


def _check_one_each(repairs: Sequence[str]) -> None:
    """Raise `InputError` if one text names several repairs; commas separate options of one repair."""
    for text in repairs:
        names = text.partition(":")[0].split(",")
        if len(names) > 1:
            repeated = " ".join(f"--repair {name.strip()}" for name in names)
            raise InputError(f"repair {text!r} names {len(names)} at once; repeat the option: {repeated}")


def _check_order(repairs: Sequence[str], phases: Sequence[int]) -> None:
    """Raise `InputError` for a repair that is given twice, or before one of an earlier phase.

    `phases` are the repairs' phases, as positions in `PHASES`.
    """
    names = [name_of(text) for text in repairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"repair {name!r} is given {names.count(name)} times; give it once")
    for one, other in combinations(range(len(names)), 2):
        if phases[one] > phases[other]:
            raise InputError(f"repair {names[one]!r} stands before {names[other]!r}, whose result it needs; swap them")
