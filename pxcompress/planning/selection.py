"""Selects which groups a plan may prune: by name, by where they lie, and how much of each must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from torch import nn

from pxcompress.choices import SCOPES
from pxcompress.errors import InputError, list_some, unknown
from pxcompress.graph import is_depthwise
from pxcompress.graph.dependencies import PRODUCERS
from pxcompress.types import FixedLayer, Group, Structure


@dataclass(frozen=True)
class Selection:
    """Which groups may lose units, as globs on their names: `only` these, all but `keep`.

    `floors` are least shares, GLOB=SHARE. Scope "inner" leaves every group whole whose units are written by layers of
    several modules, as in a residual stream. Raises `InputError` for a scope or a floor that is not valid.
    """

    only: Sequence[str] = ()
    keep: Sequence[str] = ()
    scope: str = "all"
    floors: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        _ = self.least

    @property
    def least(self) -> Mapping[str, float]:
        """Glob of group names -> least share of their units that stays."""
        return dict(_parse_floor(text) for text in self.floors)

    def of(self, structure: Structure, model: nn.Module) -> Structure:
        """`structure` with unselected groups moved to those that stay.

        Raises `InputError` for a glob that matches no group, and if no group is left.
        """
        names = [group.name for group in structure.groups]
        for option, globs in (("only", self.only), ("keep", self.keep), ("floors", tuple(self.least))):
            for glob in globs:
                if not any(fnmatchcase(name, glob) for name in names):
                    raise InputError(
                        f"{option} {glob!r} fits no group; `pxcompress inspect` lists them: {list_some(names, 5)}"
                    )
        reasons = {group.name: self._explain_whole(group, model) for group in structure.groups}
        prunable_groups = tuple(group for group in structure.groups if not reasons[group.name])
        if structure.groups and not prunable_groups:
            reason_counts = ", ".join(
                f"{len([*kept_groups])} {reason}" for reason, kept_groups in groupby(sorted(reasons.values()))
            )
            raise InputError(
                f"nothing may be removed: all {len(names)} groups stay ({reason_counts}); leave some to prune"
            )
        kept_groups = [
            FixedLayer(group.name, group.units, reasons[group.name])
            for group in structure.groups
            if group not in prunable_groups
        ]
        return Structure(prunable_groups, (*structure.fixed, *kept_groups))

    def _explain_whole(self, group: Group, model: nn.Module) -> str:
        """The reason why `group` is not selected; "" if it is."""
        if self.only and not any(fnmatchcase(group.name, glob) for glob in self.only):
            return "not among --only"
        if any(fnmatchcase(group.name, glob) for glob in self.keep):
            return "among --keep"
        if self.scope == "inner" and len(set(_list_writers(group, model))) > 1:
            return "a residual stream, outside --scope inner"
        return ""


def _list_writers(group: Group, model: nn.Module) -> Iterator[str]:
    """Names of the parents of all layers that write a group's units."""
    for member in group.members:
        module = dict(model.named_modules()).get(member.module)
        if member.axis == "out" and isinstance(module, PRODUCERS) and not is_depthwise(module):
            yield member.module.rpartition(".")[0]


def _parse_floor(text: str) -> tuple[str, float]:
    glob, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"floors has {text!r}; expected GLOB=SHARE with a share from 0 to 1, such as layer1.*=0.5")
    return glob.strip(), value
