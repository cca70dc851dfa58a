"""compress_module on modules that do not take one image and return its class scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from models import CLASSES, FlattenCNN, snapshot
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from user_modules import USER_MODULES, Segmentation, Sequences, Several, Text, TwoInputs

from pxcompress import InputError, compress_module
from pxcompress.cost import count_params
from pxcompress.errors import ModelError
from pxcompress.graph import masked
from pxcompress.state import seeded
from pxcompress.types import Slim


def _called(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _same(found: Any, expected: Any, tolerance: float) -> None:
    """The same structure, shapes and types, and values within a share of each tensor's scale."""
    leaves, structure = tree_flatten(found)
    others, other_structure = tree_flatten(expected)
    assert structure == other_structure
    for leaf, other in zip(leaves, others, strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        if leaf.is_floating_point():
            assert (leaf - other).abs().max() <= tolerance * other.abs().max()


@pytest.fixture(params=list(USER_MODULES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, list[Any]]:
    """A module in eval mode, one input, and batches without labels."""
    build, draw = USER_MODULES[request.param]
    with seeded(4):
        model = build().eval()
        return model, draw(1), [(draw(8), None) for _ in range(3)]


def test_removal_is_zeroing_on_all_outputs(case: tuple[nn.Module, Any, list[Any]]) -> None:
    model, example, batches = case
    before = snapshot(model)
    slim = compress_module(model, example, batches, 0.4, round_to=1, scorer="random", repair=())
    assert snapshot(model) == before
    assert type(slim.pruned.model) is type(slim.pruned.dense) is type(model)
    assert set(slim.pruned.plan.removed) <= {name for name, _ in model.named_modules()}
    assert count_params(slim.pruned.model) < count_params(model)
    expected = _called(masked(model, slim.pruned.groups, slim.pruned.plan), batches[0][0])
    _same(_called(slim.pruned.model, batches[0][0]), expected, 1e-5)


def test_scores_and_repairs_work_on_what_the_module_returns(case: tuple[nn.Module, Any, list[Any]]) -> None:
    model, example, batches = case
    repaired = compress_module(model, example, batches, 0.3, round_to=1, budget="params")
    bare = compress_module(model, example, batches, 0.3, round_to=1, budget="params", repair=())
    assert all(torch.isfinite(values).all() and values.any() for values in repaired.scores.values())
    whole = _called(model, batches[0][0])
    _same(_called(repaired.pruned.model, batches[0][0]), whole, torch.inf)
    assert _distance(repaired, whole, batches[0][0]) < _distance(bare, whole, batches[0][0])


def _distance(slim: Slim, whole: Any, inputs: Any) -> float:
    """Squared error of all outputs, as shares of their power."""
    pairs = zip(tree_flatten(_called(slim.pruned.model, inputs))[0], tree_flatten(whole)[0], strict=True)
    shares = [(a - b).square().sum() / b.square().sum() for a, b in pairs if b.is_floating_point()]
    return float(torch.stack(shares).mean())
