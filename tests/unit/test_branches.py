"""Whole branches go: only where the input still gets through, and what is left is what zeroing leaves."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from models import Subject, batches_of, kept_counts, plan_of
from models import subject as subject_named

from pxcompress.budgets import BUDGETS
from pxcompress.cost.count import count_macs, count_params
from pxcompress.deploy.export import export_onnx, verify_parity
from pxcompress.errors import InputError
from pxcompress.graph import find_branches, masked, prune, removal_error, without
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import make_plan
from pxcompress.planning.plan_file import plan_from_json, plan_to_json
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.types import Price, Pruned

RESIDUAL = ("resnet_bottleneck", "resnet_basic", "efficientnet", "vit", "convnext")
"""A bottleneck has two inner groups, some of them strided; EfficientNet's branches hold a gate."""

Branches = dict[str, tuple[str, ...]]


@pytest.fixture(scope="module", params=RESIDUAL)
def residual(request: pytest.FixtureRequest) -> tuple[Subject, Branches]:
    subject = subject_named(request.param)
    return subject, dict(find_branches(subject.model, subject.groups, subject.example))


def _dropped(subject: Subject, branches: Branches, names: list[str]) -> Pruned:
    kept = without(branches, dict.fromkeys(names, 0))
    removed = {group.name: range(group.units) for group in subject.groups if kept.get(group.name) == 0}
    return prune(subject.model, subject.groups, plan_of(removed), subject.example)


def test_a_chain_has_no_branches() -> None:
    chain = subject_named("vgg")
    assert not find_branches(chain.model, chain.groups, chain.example)


def test_a_branch_goes_with_all_that_only_it_reads() -> None:
    subject = subject_named("resnet_bottleneck")
    branches = find_branches(subject.model, subject.groups, subject.example)
    blocks = sorted({group.name.rsplit(".", 1)[0] for group in subject.groups if group.name.endswith("conv2")})
    assert branches == {f"{block}.conv2": (f"{block}.conv1",) for block in blocks}


def test_dropping_is_what_zeroing_is_and_costs_what_is_planned(residual: tuple[Subject, Branches]) -> None:
    subject, branches = residual
    assert branches
    for names in ([next(iter(branches))], list(branches)):
        pruned = _dropped(subject, branches, names)
        assert removal_error(pruned, subject.inputs) <= 1e-5
        with torch.no_grad():
            expected = masked(subject.model, subject.groups, pruned.plan)(subject.inputs)
            torch.testing.assert_close(pruned.model(subject.inputs), expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected[0], expected[1], rtol=1e-3)
        kept = kept_counts(subject.groups, pruned.plan)
        prices = {
            name: BUDGETS.build(name).meter(subject.model, subject.groups, subject.example)(kept)
            for name in ("macs", "params")
        }
        real = {"macs": count_macs(pruned.model, subject.example), "params": count_params(pruned.model)}
        assert prices == real


def test_repairs_take_a_branch_that_is_gone(residual: tuple[Subject, Branches]) -> None:
    subject, branches = residual
    pruned = _dropped(subject, branches, list(branches)[:1])
    for name in ("fold", "least-squares", "batchnorm", "mean-absorption", "variance-matching"):
        pruned = REPAIRS.build(name)(pruned, batches_of(subject.inputs, 3))
        assert bool(pruned.model(subject.inputs).isfinite().all()), name


def test_a_plan_without_a_branch_is_read_back(residual: tuple[Subject, Branches]) -> None:
    subject, branches = residual
    pruned = _dropped(subject, branches, list(branches))
    plan = plan_from_json(plan_to_json(pruned.plan, subject.groups), subject.groups)
    again = prune(subject.model, subject.groups, plan, subject.example).model
    assert not again.load_state_dict(pruned.model.state_dict()).missing_keys
    torch.testing.assert_close(again(subject.inputs), pruned.model(subject.inputs))


@pytest.mark.slow
def test_no_node_of_a_branch_is_exported(tmp_path: Path) -> None:
    subject = subject_named("resnet_bottleneck")
    branches = dict(find_branches(subject.model, subject.groups, subject.example))
    pruned = _dropped(subject, branches, list(branches))
    export_onnx(pruned.model, subject.example, tmp_path / "slim.onnx", {})
    assert verify_parity(pruned.model, tmp_path / "slim.onnx", [subject.inputs]).passed
    gone = sum(isinstance(layer, torch.nn.Conv2d) for layer in subject.model.modules()) - 3 * len(branches)
    nodes = [node.op_type for node in onnx.load(tmp_path / "slim.onnx").graph.node]
    assert nodes.count("Conv") == gone


def test_a_plan_drops_what_matters_nothing_and_keeps_to_floors() -> None:
    subject = subject_named("resnet_bottleneck")
    branches = find_branches(subject.model, subject.groups, subject.example)
    last, (first,) = next(iter(branches.items()))
    scores = {
        group.name: torch.full((group.units,), 1e-6 if group.name in (last, first) else 1.0) for group in subject.groups
    }
    price = Price("macs", "MACs", BUDGETS.build("macs").meter(subject.model, subject.groups, subject.example))
    ratio = 0.99 * (1 - price({last: 0, first: 0}) / price({}))

    def widths(**options: object) -> dict[str, int]:
        limits = Limits("knapsack", 1, 0.1, **options)  # type: ignore[arg-type]
        return kept_counts(subject.groups, make_plan(subject.groups, scores, price, ratio, limits))

    dropped = widths(branches=branches)
    assert dropped[last] == dropped[first] == 0
    assert all(width for name, width in dropped.items() if name not in (last, first))
    for held in (widths(), widths(branches=branches, floors={first: 0.1})):
        assert all(held.values())


def test_branches_need_a_knapsack_and_one_round() -> None:
    for wrong in ({"normalise": "mean"}, {"rounds": 2}):
        with pytest.raises(InputError, match="drop-branches"):
            Recipe("resnet18", ratio=0.5, budget="macs", drop_branches=True, **wrong)  # type: ignore[arg-type]
