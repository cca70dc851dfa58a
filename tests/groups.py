"""Groups of any size and prices of their units, for plans."""

from __future__ import annotations

from collections.abc import Sequence

from pxcompress.planning.limits import Limits
from pxcompress.types import Group, Kind, Meter, Price

FREE = Limits("none", 1, 0.0)


def make_group(name: str, units: int, kind: Kind = "channel") -> Group:
    return Group(name, kind, units, ())


def coins_of(meter: Meter) -> Price:
    return Price("toy", "coins", meter)


def price_by_count(groups: Sequence[Group]) -> Price:
    return coins_of(lambda widths: float(sum(widths.get(group.name, group.units) for group in groups)))
