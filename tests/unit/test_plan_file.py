"""plan.json: it comes back, and is refused where it fits no model."""

from __future__ import annotations

import json

import pytest
from groups import make_group

from pxcompress.errors import InputError
from pxcompress.planning.plan_file import plan_from_json, plan_to_json
from pxcompress.types import Group, Plan


def _example() -> tuple[list[Group], Plan]:
    groups = [make_group("a", 4), make_group("b.attn", 3, "head")]
    return groups, Plan({"a": (0, 3), "b.attn": ()}, "macs", "MACs", 100.0, 55.5, 60.0)


def test_plan_json_round_trip() -> None:
    groups, plan = _example()
    text = plan_to_json(plan, groups)
    assert plan_from_json(text, groups) == plan
    assert json.loads(text)["groups"] == {"a": {"kind": "channel", "units": 4}, "b.attn": {"kind": "head", "units": 3}}
    assert plan_to_json(plan_from_json(text, groups), groups) == text


@pytest.mark.parametrize(
    "others",
    [
        [make_group("a", 4)],
        [make_group("a", 5), make_group("b.attn", 3, "head")],
        [make_group("a", 4), make_group("b.attn", 3)],
        [make_group("a", 4), make_group("c", 3, "head")],
    ],
)
def test_a_plan_for_another_model_is_refused(others: list[Group]) -> None:
    groups, plan = _example()
    with pytest.raises(InputError, match="groups"):
        plan_from_json(plan_to_json(plan, groups), others)


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"groups": 3}'])
def test_a_file_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_from_json(text, _example()[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("removed", [{"a": [4]}, {"a": [-1]}, {"a": [0, 0]}, {"a": [0, 1, 2, 3]}, {"nowhere": [0]}])
def test_a_plan_that_removes_what_is_not_there_is_refused(removed: dict[str, list[int]]) -> None:
    groups, plan = _example()
    content = json.loads(plan_to_json(plan, groups))
    content["removed"] = removed
    with pytest.raises(InputError):
        plan_from_json(json.dumps(content), groups)
