"""What every registered repair promises. New repairs are tested by being registered."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from models import CLASSES, Subject, batches_of, extreme_plan, plan_of, random_plan, snapshot
from models import subject as subject_named
from torch import nn

from pxcompress.cost.count import count_macs
from pxcompress.errors import InputError
from pxcompress.graph import prune
from pxcompress.recipe import Recipe
from pxcompress.repair import PHASES, REPAIRS
from pxcompress.state import seeded
from pxcompress.types import Batch, Plan, Pruned

NAMES = list(REPAIRS)
SHORT = {"finetune": {"steps": 3}}
"""Repairs that would take many steps take few here."""

NEEDS_LABELS: set[str] = set()
"""Repairs that may look at labels; the others must not depend on them."""


def _variants() -> Iterator[str]:
    for name in NAMES:
        yield name
        for field in REPAIRS.options(name):
            values = field.metadata["choices"] or (("true", "false") if isinstance(field.default, bool) else ())
            for value in values:
                if value not in (field.default, str(field.default).lower()):
                    yield f"{name}:{field.name}={value}"


VARIANTS = list(_variants())


def _batches(subject: Subject) -> list[Batch]:
    with seeded(4):
        return batches_of(torch.randn(14, *subject.inputs.shape[1:]), 8)


def _pruned(subject: Subject, plan: Plan | None = None, dense: nn.Module | None = None) -> Pruned:
    return prune(dense or subject.model, subject.groups, plan or random_plan(subject.groups, 1))


def _repaired(text: str, pruned: Pruned, batches: list[Batch]) -> Pruned:
    repair = dataclasses.replace(REPAIRS.build(text), **SHORT.get(text.partition(":")[0], {}))  # type: ignore[type-var]
    with seeded(3):
        return repair(pruned, batches)


@pytest.mark.parametrize("text", VARIANTS)
def test_the_dense_model_and_the_batches_are_left_as_they_were(text: str, small: Subject) -> None:
    dense = copy.deepcopy(small.model).train()
    next(iter(dense.children())).eval()
    next(dense.parameters()).requires_grad_(False)
    before = snapshot(dense)
    batches = _batches(small)
    values = [inputs.clone() for inputs, _ in batches]
    pruned = _pruned(small, dense=dense)
    repaired = _repaired(text, pruned, batches)
    assert snapshot(dense) == before
    assert repaired.dense is dense
    assert (repaired.groups, repaired.plan) == (pruned.groups, pruned.plan)
    for (inputs, _), value in zip(batches, values, strict=True):
        assert torch.equal(inputs, value)
        assert not inputs.requires_grad


@pytest.mark.parametrize("text", VARIANTS)
def test_the_slim_model_keeps_its_widths_modes_and_hooks(text: str, small: Subject) -> None:
    dense = copy.deepcopy(small.model).train()
    next(iter(dense.children())).eval()
    next(dense.parameters()).requires_grad_(False)
    pruned = _pruned(small, dense=dense)
    macs = count_macs(pruned.model, small.example)
    shapes = {name: value.shape for name, value in pruned.model.state_dict().items()}
    modes = snapshot(pruned.model)[2]
    grads = {name: value.requires_grad for name, value in pruned.model.named_parameters()}
    model = _repaired(text, pruned, _batches(small)).model
    assert snapshot(model)[2] == modes
    assert count_macs(model, small.example) == macs
    after = model.state_dict()
    assert {name: after[name].shape for name in shapes} == shapes
    assert all(name.endswith(".bias") for name in set(after) - set(shapes)), "only a bias may be added"
    assert {name: value.requires_grad for name, value in model.named_parameters() if name in grads} == grads
    assert not {value.data_ptr() for value in model.parameters()} & {value.data_ptr() for value in dense.parameters()}


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("plan", [extreme_plan, lambda groups: random_plan(groups, 2), lambda groups: plan_of({})])
def test_outputs_stay_finite(text: str, plan: object, small: Subject) -> None:
    """All but one unit gone, a part gone, nothing gone."""
    model = _repaired(text, _pruned(small, plan(small.groups)), _batches(small)).model.eval()  # type: ignore[operator]
    with torch.no_grad():
        outputs = model(small.inputs)
    assert outputs.shape == (len(small.inputs), CLASSES)
    assert outputs.isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("text", [text for text in VARIANTS if "labels=true" not in text])
def test_where_nothing_is_removed_nothing_changes(text: str, small: Subject) -> None:
    """On inputs unlike those of training, too: repairs bring the dense model back, they do not improve on it."""
    with seeded(6):
        inputs = 2 * torch.randn(24, *small.inputs.shape[1:]) + 1
    batches = batches_of(inputs, 7)
    repair = dataclasses.replace(REPAIRS.build(text), **SHORT.get(text.partition(":")[0], {}))  # type: ignore[type-var]
    with seeded(3):
        model = repair(_pruned(small, plan_of({})), batches, batches).model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), small.model(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_can_be_repaired(name: str, subject: Subject) -> None:
    model = _repaired(name, _pruned(subject), batches_of(subject.inputs, 3)).model
    with torch.no_grad():
        assert model(subject.inputs).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_model(name: str, small: Subject) -> None:
    first, second = (_repaired(name, _pruned(small), _batches(small)).model.state_dict() for _ in range(2))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_LABELS])
def test_labels_are_not_looked_at(name: str) -> None:
    subject = subject_named("flatten_cnn")
    shuffled = [(inputs, labels.flip(0) * 0) for inputs, labels in _batches(subject)]
    first = _repaired(name, _pruned(subject), _batches(subject)).model.state_dict()
    second = _repaired(name, _pruned(subject), shuffled).model.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_repairs_can_follow_each_other(name: str) -> None:
    """In any order; a recipe allows fewer."""
    subject = subject_named("resnet_basic")
    for other in NAMES:
        pruned = _repaired(name, _pruned(subject), _batches(subject))
        model = _repaired(other, pruned, _batches(subject)).model
        with torch.no_grad():
            assert model(subject.inputs).isfinite().all()


@pytest.mark.parametrize("text", VARIANTS)
def test_options_survive_text_and_json(text: str) -> None:
    built = REPAIRS.build(text)
    assert REPAIRS.build(REPAIRS.text(built)) == built
    recipe = Recipe("resnet50", 0.5, repair=(text,))
    again = Recipe.from_json(json.dumps(json.loads(recipe.to_json())))
    assert [REPAIRS.build(each) for each in again.repair] == [built]


@pytest.mark.parametrize("name", NAMES)
def test_a_repair_says_where_it_stands(name: str) -> None:
    phase = REPAIRS.get(name).phase
    for other in set(NAMES) - {name}:
        earlier, later = sorted((name, other), key=lambda each: PHASES.index(REPAIRS.get(each).phase))
        Recipe("resnet50", 0.5, repair=(earlier, later))
        if REPAIRS.get(other).phase != phase:
            with pytest.raises(InputError, match="stands before"):
                Recipe("resnet50", 0.5, repair=(later, earlier))
