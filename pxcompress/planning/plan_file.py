"""Reads and writes plan.json: a plan and the groups that it was made for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from pxcompress.errors import InputError
from pxcompress.types import Group, Plan


def plan_to_json(plan: Plan, groups: Sequence[Group]) -> str:
    """The text of plan.json: the plan, and kind and size of each group."""
    sizes = {group.name: {"kind": group.kind, "units": group.units} for group in groups}
    return json.dumps({**asdict(plan), "groups": sizes}, indent=1)


def read_planned_streams(text: str) -> list[str]:
    """Names of the groups in a plan.json whose units are directions of a residual stream."""
    groups = json.loads(text)["groups"]
    return [name for name, group in groups.items() if group["kind"] == "direction"]


def read_planned_groups(text: str, groups: Sequence[Group]) -> list[Group]:
    """Those of `groups` that a plan.json was made for. Raises `InputError` for other text."""
    try:
        names = json.loads(text)["groups"]
        return [group for group in groups if group.name in names]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"not a plan ({type(error).__name__}: {error}); expected what plan.json holds") from error


def plan_from_json(text: str, groups: Sequence[Group]) -> Plan:
    """Read a plan from plan.json. Raises `InputError` for other text, and if it does not fit `groups`, the model's."""
    try:
        content = json.loads(text)
        planned_for = content.pop("groups")
        content["removed"] = {name: tuple(units) for name, units in content["removed"].items()}
        plan = Plan(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"not a plan ({type(error).__name__}: {error}); expected what plan.json holds") from error
    if planned_for != {group.name: {"kind": group.kind, "units": group.units} for group in groups}:
        raise InputError("the plan was made for other groups than this model has; rebuild it with the same versions")
    sizes = {group.name: group.units for group in groups}
    for name, units in plan.removed.items():
        is_legal = isinstance(units, tuple) and all(
            type(unit) is int and 0 <= unit < sizes.get(name, 0) for unit in units
        )
        if not is_legal or len(set(units)) != len(units) or len(units) == sizes[name]:
            raise InputError(f"the plan removes units of {name!r} that it cannot: {str(units)[:60]}")
    return plan
