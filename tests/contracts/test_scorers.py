"""What every registered scorer promises. New scorers are tested by being registered; only the tables name any."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator

import pytest
import torch
from models import Subject, batches_of, snapshot
from models import subject as subject_named
from torch import nn

from pxcompress.recipe import Recipe
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded
from pxcompress.types import Batch, Batches, Scores

IGNORES_THE_MODEL = {"random"}
"""Scorers that know nothing about the units: a dead one need not come last."""

SIGNED = ("aggregate=signed",)
"""Options that let scores be negative: what speaks against a decision scores below a dead unit."""

NAMES = list(SCORERS)


def _variants() -> Iterator[str]:
    """Every method at its defaults, and with every other value of one option that has few."""
    for name in NAMES:
        yield name
        for field in SCORERS.options(name):
            values = field.metadata["choices"] or (("true", "false") if isinstance(field.default, bool) else ())
            values = ("gamma",) if field.name == "composite" else values
            for value in values:
                if value not in (field.default, str(field.default).lower()):
                    yield f"{name}:{field.name}={value}"


VARIANTS = list(_variants())


def _score(text: str, subject: Subject, batches: Batches | None = None, model: nn.Module | None = None) -> Scores:
    with seeded(3):
        return SCORERS.build(text)(model or subject.model, subject.groups, batches or _batches(subject))


def _batches(subject: Subject, size: int = 8) -> list[Batch]:
    """Fourteen inputs in batches, the last one short."""
    with seeded(4):
        return batches_of(torch.randn(14, *subject.inputs.shape[1:]), size)


def _assert_alike(scores: Scores, expected: Scores) -> None:
    assert list(scores) == list(expected)
    for name, values in expected.items():
        assert torch.allclose(scores[name], values, rtol=1e-2, atol=1e-3 * float(values.abs().max())), name


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("name", ["flatten_cnn", "vit"])
def test_one_finite_score_a_unit(text: str, name: str) -> None:
    subject = subject_named(name)
    scores = _score(text, subject)
    assert list(scores) == [group.name for group in subject.groups]
    for group in subject.groups:
        values = scores[group.name]
        assert values.shape == (group.units,)
        assert values.dtype == torch.float32
        assert values.device.type == "cpu"
        assert not values.requires_grad
        assert values.isfinite().all()
        assert len(set(values.tolist())) > 1, f"all units of {group.name} score the same"


@pytest.mark.parametrize("text", [text for text in VARIANTS if ":" in text])
def test_every_option_counts(text: str) -> None:
    """On one of two models at least the scores are others than the default's."""
    changed = []
    for subject in (subject_named("flatten_cnn"), subject_named("vit")):
        scores, default = _score(text, subject), _score(text.partition(":")[0], subject)
        changed += [name for name in scores if not torch.equal(scores[name], default[name])]
    assert changed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "family", ["vgg_bn", "resnext", "mobilenetv2", "efficientnet", "densenet", "regnet", "deit_distilled", "convnext"]
)
def test_every_geometry_is_scored(name: str, family: str) -> None:
    """Also with far fewer samples than channels."""
    subject = subject_named(family)
    scores = _score(name, subject, batches_of(subject.inputs, 4))
    for group in subject.groups:
        assert scores[group.name].shape == (group.units,)
        assert scores[group.name].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_scores(name: str, small: Subject) -> None:
    first, second = _score(name, small), _score(name, small)
    assert all(torch.equal(first[group], second[group]) for group in first)


HALVES = {"lrp-residual"}
"""Scorers that judge one half of the samples by the other, so that their order counts."""


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(name: str, small: Subject) -> None:
    expected = _score(name, small)
    _assert_alike(_score(name, small, _batches(small, 14)), expected)
    parts = _batches(small, 3)
    _assert_alike(_score(name, small, parts if name in HALVES else parts[::-1]), expected)


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("name", ["flatten_cnn", "vit"])
def test_the_model_is_left_as_it_was(text: str, name: str) -> None:
    """In whatever modes, with whatever hooks and frozen parameters they come; the modes do not change the scores."""
    subject = subject_named(name)
    model = copy.deepcopy(subject.model).train()
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    next(model.modules()).register_forward_hook(lambda module, args, output: None)
    before = snapshot(model)
    scores = _score(text, subject, model=model)
    assert snapshot(model) == before
    _assert_alike(scores, _score(text, subject))


@pytest.mark.parametrize("name", NAMES)
def test_the_batches_are_left_as_they_were(name: str) -> None:
    batches = _batches(subject_named("flatten_cnn"))
    values = [inputs.clone() for inputs, _ in batches]
    _score(name, subject_named("flatten_cnn"), batches)
    for (inputs, _), value in zip(batches, values, strict=True):
        assert torch.equal(inputs, value)
        assert not inputs.requires_grad
        assert inputs.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_gradients_being_off_does_not_matter(name: str) -> None:
    subject = subject_named("flatten_cnn")
    expected = _score(name, subject)
    with torch.no_grad():
        _assert_alike(_score(name, subject), expected)
        assert not torch.is_grad_enabled()


class _Fails:
    """One good batch, then a broken disk."""

    def __init__(self, subject: Subject) -> None:
        self.first = _batches(subject)[0]

    def __iter__(self) -> Iterator[Batch]:
        yield self.first
        raise OSError("disk")


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_leaves_the_model_as_it_was(name: str) -> None:
    subject = subject_named("flatten_cnn")
    model = copy.deepcopy(subject.model).train()
    before = snapshot(model)
    grad = torch.is_grad_enabled()
    with contextlib.suppress(OSError):  # not every scorer reads the batches
        _score(name, subject, _Fails(subject), model)
    assert snapshot(model) == before
    assert torch.is_grad_enabled() == grad


@pytest.mark.parametrize(
    "text",
    [text for text in VARIANTS if text.partition(":")[0] not in IGNORES_THE_MODEL and not text.endswith(SIGNED)],
)
@pytest.mark.parametrize("name", ["flatten_cnn", "conv1d", "grouped", "vit"])
def test_a_dead_unit_comes_last(text: str, name: str) -> None:
    """All weights that write the unit or read it are zero: nothing can score below it."""
    subject = subject_named(name)
    model = copy.deepcopy(subject.model)
    dead = {group.name: group.units // 2 for group in subject.groups}
    with torch.no_grad():
        for group in subject.groups:
            for member in group.members:
                module, rows = model.get_submodule(member.module), member.index[dead[group.name]]
                if member.axis == "out":
                    for parameter in module.parameters():
                        parameter[rows] = 0
                else:
                    width = module.weight.shape[1]
                    per_group = module.weight.unflatten(0, (getattr(module, "groups", 1), -1))
                    per_group[rows // width, :, rows % width] = 0
    scores = _score(text, subject, model=model)
    for group in subject.groups:
        values = scores[group.name]
        alive = torch.cat([values[: dead[group.name]], values[dead[group.name] + 1 :]])
        assert float(values[dead[group.name]]) <= float(alive.min()) + 1e-6 * float(values.abs().max()), group.name
        assert float(values[dead[group.name]]) < float(alive.max()), group.name


@pytest.mark.parametrize("text", VARIANTS)
def test_options_survive_text_and_json(text: str) -> None:
    built = SCORERS.build(text)
    assert SCORERS.build(SCORERS.text(built)) == built
    recipe = Recipe("resnet50", 0.5, scorer=text)
    again = Recipe.from_json(json.dumps(json.loads(recipe.to_json())))
    assert SCORERS.build(again.scorer) == built


def test_an_exceptions_table_names_only_what_exists() -> None:
    assert set(NAMES) >= IGNORES_THE_MODEL


def test_magnitude_by_hand() -> None:
    """A neuron of the flatten net: its own weights and those of the classifier that read it."""
    subject = subject_named("flatten_cnn")
    model = subject.model
    for p in (1, 2):
        scores = SCORERS.build(f"magnitude:p={p}")(model, subject.groups, [])["fc1"]
        for unit in range(10):
            weights = torch.cat([model.fc1.weight[unit], model.fc2.weight[:, unit]]).detach()
            assert float(scores[unit]) == pytest.approx(float(weights.norm(p)), rel=1e-5)


def test_magnitude_of_a_head_by_hand() -> None:
    subject = subject_named("vit")
    attention = subject.model.blocks[1].attn
    scores = SCORERS.build("magnitude")(subject.model, subject.groups, [])["blocks.1.attn"]
    for head in range(4):
        own = slice(6 * head, 6 * head + 6)
        parts = [part[own] for part in attention.qkv.weight.detach().chunk(3)]
        weights = torch.cat([*(part.flatten() for part in parts), attention.proj.weight.detach()[:, own].flatten()])
        assert float(scores[head]) == pytest.approx(float(weights.norm()), rel=1e-5)


def test_random_draws_in_the_unit_interval_and_follows_the_seed() -> None:
    subject = subject_named("vit")
    random = SCORERS.build("random")
    with seeded(1):
        first = random(subject.model, subject.groups, [])
    with seeded(2):
        second = random(subject.model, subject.groups, [])
    for name, values in first.items():
        assert ((values >= 0) & (values < 1)).all()
        assert not torch.equal(values, second[name])
