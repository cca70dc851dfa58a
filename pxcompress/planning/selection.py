"""Which groups a plan may touch: by name, by where they lie, and how much of each has to stay."""

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
from pxcompress.types import Fixed, Group, Structure


@dataclass(frozen=True)
class Selection:
    """Globs on group names: `only` these may lose units, these `keep` all, `floors` are least shares as GLOB=SHARE.

    Scope "inner" leaves every group whole whose units several modules write, as the blocks of a residual stream do.
    Raises `InputError` for a scope or a floor that is none.
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
        """Least share of units that stays, by the glob of group names."""
        return dict(_parse_floor(text) for text in self.floors)

    def of(self, structure: Structure, model: nn.Module) -> Structure:
        """`structure` with the groups that must stay whole made fixed; `InputError` for a glob that fits no group."""
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
            Fixed(group.name, group.units, reasons[group.name])
            for group in structure.groups
            if group not in prunable_groups
        ]
        return Structure(prunable_groups, (*structure.fixed, *kept_groups))

    def _explain_whole(self, group: Group, model: nn.Module) -> str:
        """Why `group` stays whole; empty where it need not."""
        if self.only and not any(fnmatchcase(group.name, glob) for glob in self.only):
            return "not among --only"
        if any(fnmatchcase(group.name, glob) for glob in self.keep):
            return "among --keep"
        if self.scope == "inner" and len(set(_list_writers(group, model))) > 1:
            return "a residual stream, outside --scope inner"
        return ""


def _list_writers(group: Group, model: nn.Module) -> Iterator[str]:
    """The parents of the layers that write a group's units."""
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
