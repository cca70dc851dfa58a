from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from pxcompress.cost import latency
from pxcompress.cost.count import Widths
from pxcompress.cost.latency import Conditions, OperatorTimes, measure_best_step
from pxcompress.cost.operators import Operator, find_operators
from pxcompress.deploy.runtime import time_graph
from pxcompress.errors import BudgetError
from pxcompress.graph import find_groups
from pxcompress.planning.fit import fit_to_file
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import make_plan
from pxcompress.types import Plan, Price, ScoredModel, Structure

CONDITIONS = Conditions(provider="cpu", threads=1)


class Mixed(nn.Module):
    """One of each: a strided convolution, a depthwise one, a grouped one, and dense layers on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding="valid")
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.SiLU()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.depthwise(self.act(self.norm(self.first(x)))))
        return self.head(x.flatten(2).transpose(1, 2)).mean(1)


def test_operators_are_read_from_one_pass() -> None:
    operators = find_operators(Mixed().eval(), (), torch.randn(1, 3, 12, 12))
    assert list(operators) == ["first", "depthwise", "grouped", "head"]
    assert operators["first"].activation == ("Sigmoid", "Mul")
    assert operators["first"].positions == 5 * 5
    assert (operators["grouped"].rows, operators["grouped"].padding, operators["grouped"].groups) == ((5, 5), (2, 2), 4)
    assert operators["head"].rows == (25,)
    assert operators["depthwise"].depthwise
    assert operators["depthwise"].at(8, 8).groups == 8


@pytest.mark.parametrize("batch", [1, 3])
def test_every_operator_is_a_graph_that_runs_at_any_width(batch: int) -> None:
    operators = find_operators(Mixed().eval(), (), torch.randn(1, 3, 12, 12))
    for operator in operators.values():
        for narrower in (operator, operator.at(operator.inputs // 2 or 1, operator.outputs // 2)):
            if operator.inputs > 3:
                assert time_graph(narrower.graph(batch), narrower.input_shape(batch), "cpu", 1) > 0


def test_attention_is_an_operator_of_its_heads() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    example = torch.randn(1, 3, 32, 32)
    groups = find_groups(model, example, ["head"]).groups
    attention = find_operators(model, groups, example)["blocks.0.attn"]
    assert (attention.rows, attention.inputs, attention.kernel) == ((5,), 3, (64,))
    assert time_graph(attention.at(2, 2).graph(1), attention.at(2, 2).input_shape(1), "cpu", 1) > 0


def test_windows_of_a_sample_are_counted() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,)
    ).eval()
    example = torch.randn(1, 3, 32, 32)
    operators = find_operators(model, find_groups(model, example, ["head.fc"]).groups, example)
    attention, linear = operators["layers.0.blocks.0.attn"], operators["layers.0.blocks.0.attn.qkv"]
    assert (attention.rows, attention.positions, linear.rows) == ((4, 16), 4 * 16 * 8, (4, 16))
    assert time_graph(attention.at(1, 1).graph(2), attention.at(1, 1).input_shape(2), "cpu", 1) > 0


def test_a_table_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    table, (operator, *_) = (
        OperatorTimes(CONDITIONS),
        find_operators(nn.Linear(64, 64), (), torch.randn(1, 64)).values(),
    )
    first = table.milliseconds(operator)
    table.save()
    assert OperatorTimes(CONDITIONS).milliseconds(operator) == first > 0


def test_a_step_is_free_where_the_next_width_costs_as_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    for step in (32, 8, 1):
        monkeypatch.setattr(OperatorTimes, "milliseconds", lambda self, operator: float(-(-operator.outputs // step)))  # noqa: B023
        assert measure_best_step(CONDITIONS) == step


@pytest.mark.parametrize(("precision", "unit"), [("fp32", 8), ("fp16", 8), ("int8", 16)])
def test_on_a_gpu_widths_are_what_its_tensor_cores_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, unit: int
) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "get_device", lambda provider: "cuda")
    for step in (32, 1):
        monkeypatch.setattr(OperatorTimes, "milliseconds", lambda self, operator: float(-(-operator.outputs // step)))  # noqa: B023
        assert measure_best_step(CONDITIONS, precision) == max(step, unit)


def test_on_a_gpu_an_operator_is_timed_in_steps_of_both_widths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "_make_copies", lambda operator: (latency.EMPTY_OPERATOR, latency.EMPTY_OPERATOR))
    timed = []

    def call(self: OperatorTimes, operator: Operator) -> float:
        timed.append(operator)
        return 1e-9 if operator.kind == "copy" else float(-(-operator.inputs // 64) * -(-operator.outputs // 128))

    monkeypatch.setattr(OperatorTimes, "_call", call)
    table = OperatorTimes(CONDITIONS)
    convolution = Operator("conv", (8, 8), 256, 512, (3, 3), (1, 1), (1, 1), (1, 1), positions=64)
    steps = latency._time_in_steps(convolution, table, 8)
    assert steps.at(250, 500) == pytest.approx(16)
    assert steps.at(65, 128) == steps.at(128, 1) == pytest.approx(2)
    depthwise = Operator("conv", (8, 8), 128, 128, (3, 3), (1, 1), (1, 1), (1, 1), groups=128, positions=64)
    assert latency._time_in_steps(depthwise, table, 8).at(3, 70) == pytest.approx(2)
    assert {operator.groups for operator in timed if operator.kind == "conv"} >= {1, 128}


LAYOUT = 1e-4
"""Milliseconds that the fake machine below takes to bring one element into another layout."""


def _fake_call(table: OperatorTimes, operator: Operator) -> float:
    """A call that takes 10 ns a product, and changes layouts around convolutions of more than a few channels."""
    products = operator.positions * operator.weights(operator.inputs, operator.outputs)
    reads, writes = math.prod(operator.rows) * operator.inputs, operator.positions * operator.outputs
    if operator.kind == "copy":
        return 0.01 + 2e-5 * operator.kernel[0] * reads + 2 * LAYOUT * reads
    if operator.kind == "conv":
        return 0.01 + 1e-5 * products + LAYOUT * (reads * (operator.inputs >= 16) + writes)
    return 0.01 + 1e-5 * products + LAYOUT * 2 * 16


def test_an_operator_alone_is_timed_without_what_the_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OperatorTimes, "_call", _fake_call)
    operators = find_operators(Mixed().eval(), (), torch.randn(1, 3, 12, 12))
    for name in ("depthwise", "grouped", "head"):
        operator = operators[name]
        products = operator.positions * operator.weights(operator.inputs, operator.outputs)
        assert OperatorTimes(CONDITIONS).milliseconds(operator) == pytest.approx(1e-5 * products)


class Blocks(nn.Module):
    """A depthwise convolution between two others: 40 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 40, 1),
            nn.ReLU(),
            nn.Conv2d(40, 40, 3, padding=1, groups=40),
            nn.Conv2d(40, 16, 1),
            nn.Flatten(),
        )
        self.head = nn.Linear(16 * 64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


def test_a_wider_operator_never_costs_less_whatever_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise must not make a wide layer look cheaper than a narrow one: a time is raised to the largest before it."""
    measured = {(16, 16): 3.0, (16, 32): 1.0, (16, 64): 2.0, (32, 16): 2.0, (32, 32): 4.0, (64, 64): 1.0}
    times = {(i, o): measured.get((i, o), 0.5) for i in (8, 16, 32, 64) for o in (8, 16, 32, 64)}
    monkeypatch.setattr(OperatorTimes, "milliseconds", lambda self, operator: times[operator.inputs, operator.outputs])
    net, example = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval(), torch.randn(1, 64)
    groups = find_groups(net, example, ["3"]).groups
    operator = find_operators(net, groups, example)["1"]
    surface = latency._measure_surface(operator, "1", Widths(net, groups), OperatorTimes(CONDITIONS))
    assert surface.times.shape[0] > 1 < surface.times.shape[1]
    for row, inputs in enumerate(surface.inputs):
        for column, outputs in enumerate(surface.outputs):
            before = [time for (i, o), time in times.items() if i <= inputs and o <= outputs and min(i, o) >= 16]
            assert surface.times[row, column] == max(before)


def test_a_width_costs_what_the_next_whole_step_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither less than at the step below nor more than whole; a depthwise convolution gets cheaper with its width."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(OperatorTimes, "_call", _fake_call)
    monkeypatch.setattr(latency, "measure_best_step", lambda conditions: 16)
    model, example = Blocks().eval(), torch.randn(1, 3, 8, 8)
    groups = find_groups(model, example, ["head"]).groups
    assert "layers.0" in {group.name for group in groups}

    def alone(*args: object) -> float:
        """The whole model as the sum of its depthwise convolution alone, in ms."""
        return 1.0 + args[-1].get("layers.0", 40) / 40  # type: ignore[attr-defined]

    monkeypatch.setattr(latency, "measure_whole_model", alone)
    meter = latency.latency_meter(model, groups, example, CONDITIONS)
    costs = [meter({"layers.0": width}) for width in range(1, 41)]
    assert costs == sorted(costs)
    assert len({round(cost, 9) for cost in costs}) == 3
    assert costs[0] == costs[15] < costs[16] == costs[31] < costs[32] == costs[39] == meter({})


def test_weights_cost_the_time_in_which_they_come_from_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Operators that take the same at every width, so that all that gets cheaper is to fetch their weights."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(OperatorTimes, "milliseconds", lambda table, operator: 1.0)
    monkeypatch.setattr(OperatorTimes, "measure_memory_read", lambda table: 1e-3)
    monkeypatch.setattr(latency, "measure_best_step", lambda conditions: 16)
    net, example = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).eval(), torch.randn(1, 64)
    groups = find_groups(net, example, ["2"]).groups

    def expected(widths: Mapping[str, int]) -> float:
        first, second = (widths.get(name, 64) for name in ("0", "1"))
        return 3 + 1e-3 * (64 * first + first * second + second * 64)

    monkeypatch.setattr(latency, "measure_whole_model", lambda *args: expected(args[-1]))
    meter = latency.latency_meter(net, groups, example, CONDITIONS)
    for widths in ({}, {"0": 48}, {"0": 16, "1": 48}):
        assert meter(widths) == pytest.approx(expected(widths), rel=1e-3)


class Scripted:
    """A budget whose files cost a fixed factor more than planned."""

    unit = "ms"
    tolerance = 0.0

    def __init__(self, plans: list[Plan], factor: float) -> None:
        self.plans, self.factor = plans, factor

    def measure_files(self, files: list[Path], example: torch.Tensor) -> list[float]:
        assert all(path.stat().st_size for path in files)
        return [100.0, self.plans[-1].cost_planned * self.factor]


@pytest.fixture(scope="module")
def scored() -> ScoredModel:
    model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 3)).eval()
    example = torch.randn(1, 8)
    structure: Structure = find_groups(model, example, ["2"])
    scores = {group.name: torch.arange(group.units).float() for group in structure.groups}
    price = Price("toy", "ms", lambda widths: float(widths.get("0", 100)))
    return ScoredModel(model, example, structure, scores, price, 0.5)


@pytest.mark.parametrize(("factor", "limit"), [(1.2, None), (0.6, None), (1.7, 60.0)])
def test_a_loop_ends_just_below_what_is_allowed(scored: ScoredModel, factor: float, limit: float | None) -> None:
    plans: list[Plan] = []

    def plan_of(ratio: float) -> Plan:
        groups = scored.structure.groups
        plans.append(make_plan(groups, scored.scores, scored.price, ratio, Limits("none", 1, 0.0)))
        return plans[-1]

    plan, attempts = fit_to_file(scored, plan_of, Scripted(plans, factor), limit)
    allowed = 50.0 if limit is None else limit
    assert 0.9 * allowed <= plan.cost_planned * factor <= allowed
    corrected = [plan.cost_planned * (1.0 if place == 0 else factor) for place, plan in enumerate(plans)]
    assert [attempt.planned for attempt in attempts] == pytest.approx(corrected)
    assert [attempt.planned for attempt in attempts[1:]] == pytest.approx([each.measured for each in attempts[1:]])
    assert {attempt.allowed for attempt in attempts} == {allowed}


def test_a_loop_that_never_fits_says_so(scored: ScoredModel) -> None:
    plans: list[Plan] = []

    def plan_of(ratio: float) -> Plan:
        plans.append(Plan({"0": (0,)}, "toy", "ms", 100.0, 99.0, 50.0))
        return plans[-1]

    with pytest.raises(BudgetError, match="no file fits: 50 ms are allowed, measured were 198"):
        fit_to_file(scored, plan_of, Scripted(plans, 2.0))
    assert np.isfinite([plan.cost_planned for plan in plans]).all()
