from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exports import Exported
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pxcompress.checks import read_record
from pxcompress.cost import count as cost
from pxcompress.deploy import measure, runtime, stopwatch
from pxcompress.deploy.comparison import Candidate, Comparison, compare, ratios, verdict
from pxcompress.deploy.environment import environment as environment_of
from pxcompress.deploy.intervals import estimate_speedup, is_chance_level, measure_noise, newcombe_interval
from pxcompress.deploy.predictions import predictions, torch_quality
from pxcompress.deploy.profile import operator_shares
from pxcompress.errors import DataError, InputError, ResultError
from pxcompress.proof import ClassChange, Environment, Estimate, Measurement, Placement, Speedup
from pxcompress.recipe import Goal
from pxcompress.run_folder import results
from pxcompress.tasks.classification import Classification
from pxcompress.types import Attempt, Batch, Plan, Pruned, PruneResult, Structure


class _Apply(nn.Module):
    def __init__(self, function: object, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def _attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def _self_attention(x: Tensor, attention: nn.Module) -> Tensor:
    return attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Conv2d(8, 16, 3, padding=1), (8, 10, 10), 8 * 16 * 9 * 100),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), (8, 10, 10), 2 * 16 * 9 * 100),
        (nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8), (8, 10, 10), 8 * 9 * 25),
        (nn.Linear(8, 5), (7, 8), 7 * 8 * 5),
        (nn.Linear(8, 5, bias=False), (8,), 8 * 5),
        (_Apply(lambda x: x @ x.mT), (3, 4), 3 * 4 * 3),
        (_Apply(lambda x: torch.einsum("bij,bkj->bik", x, x)), (3, 4), 3 * 4 * 3),
        (_Apply(_attend), (2, 7, 4), 2 * 2 * 7 * 7 * 4),
        (_Apply(_self_attention, nn.MultiheadAttention(8, 2, batch_first=True)), (7, 8), 7 * 8 * 32 + 2 * 7 * 7 * 8),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (3, 4, 4), 0),
    ],
)
@pytest.mark.parametrize("samples", [1, 3])
def test_count_macs_is_arithmetic_for_one_sample(
    model: nn.Module, shape: tuple[int, ...], macs: int, samples: int
) -> None:
    assert cost.count_macs(model, torch.randn(samples, *shape)) == macs


def test_counting_leaves_everything_as_it_was() -> None:
    model = _Apply(_self_attention, nn.MultiheadAttention(8, 2, batch_first=True)).train()
    before = copy.deepcopy(model.state_dict())
    cost.count_macs(model, torch.randn(1, 7, 8))
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_count_params_counts_shared_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert cost.count_params(model) == (4 * 3 + 3) + (3 + 3) + (3 * 3 + 3)
    shared = nn.Linear(3, 3)
    assert cost.count_params(nn.Sequential(shared, shared)) == 12


def _batches(exported: Exported, wrong: int) -> list[Batch]:
    """Ten samples in batches of 4, 4, 2, labelled by the model except for the first `wrong`."""
    inputs = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = exported.model(inputs).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 5
    return list(zip(inputs.split(4), labels.split(4), strict=True))


@pytest.mark.parametrize("wrong", [0, 3, 10])
def test_accuracy_of_file_and_model(wide_cnn: Exported, wrong: int) -> None:
    batches = _batches(wide_cnn, wrong)
    sessions = {"it": runtime.open_session(wide_cnn.path, "cpu")}
    result = predictions(sessions, "it", "it", batches, Classification())["it"]
    assert (result.quality.value, result.samples, result.max_abs) == ((10 - wrong) / 10, 10, 0.0)
    assert result.agreement.tolist() == [1] * 10
    model = copy.deepcopy(wide_cnn.model).train()
    assert torch_quality(model, batches, Classification()) == (10 - wrong) / 10
    assert all(module.training for module in model.modules())


def test_accuracy_needs_samples(wide_cnn: Exported) -> None:
    with pytest.raises(DataError, match="at least one"):
        torch_quality(wide_cnn.model, [], Classification())
    with pytest.raises(DataError, match="at least one"):
        predictions({"it": runtime.open_session(wide_cnn.path, "cpu")}, "it", "it", [], Classification())


def test_latency_is_in_milliseconds() -> None:
    result = measure.latency(np.arange(101) / 1000)
    assert (result.mean, result.p50, result.p90, result.p99) == pytest.approx((50, 50, 90, 99))
    assert result.runs == 101


def test_speedup_cancels_drift() -> None:
    drift = np.linspace(1, 3, 200) + np.repeat(np.random.default_rng(0).random(20), 10)
    assert estimate_speedup(2 * drift, drift) == Speedup(2.0, 2.0, 2.0)


def test_speedup_interval_covers_what_is_true() -> None:
    covered = {1.0: 0, 1.3: 0}
    for seed in range(60):
        noise = np.random.default_rng(seed).lognormal(0, 0.2, (2, 200))
        for true in covered:
            change = estimate_speedup(true * noise[0], noise[1])
            covered[true] += change.low <= true <= change.high
    assert min(covered.values()) >= 0.85 * 60
    assert estimate_speedup(1.3 * noise[0], noise[1]).low > 1.0


@pytest.mark.parametrize("runs", [6, 12, 30])
def test_few_runs_that_depend_on_each_other_do_not_make_a_narrow_interval(runs: int) -> None:
    """Both files are equally fast; every turn of runs has its own luck. 95 % are promised, 93 % of 200 asked."""
    rng, covered, turn = np.random.default_rng(runs), 0, runs // stopwatch.LEAST_TURNS
    for _ in range(200):
        luck = np.repeat(rng.lognormal(0, 0.05, (2, stopwatch.LEAST_TURNS)), turn, axis=1)
        change = estimate_speedup(*(luck * rng.lognormal(0, 0.1, (2, runs))))
        covered += change.low <= 1 <= change.high
    assert covered >= 0.93 * 200


def test_runs_too_few_for_an_interval_give_their_extremes() -> None:
    change = estimate_speedup(np.array([2.0, 3.0, 4.0]), np.array([1.0, 1.0, 2.0]))
    assert change == Speedup(3.0, 1.0, 4.0)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (1.9, 2.1, "1.90 to 2.10"),
        (2.001, 2.004, "2.00 to 2.01"),
        (0.999, 1.0001, "0.99 to 1.01"),
        (1.1, 1.1, "1.10 to 1.10"),
    ],
)
def test_intervals_are_not_shown_narrower_than_they_are(low: float, high: float, text: str) -> None:
    assert Speedup(low, low, high).interval == text


@pytest.mark.parametrize(
    ("right", "classes", "chance"), [(10, 10, True), (30, 10, False), (1, 40, True), (55, 2, True)]
)
def test_what_cannot_be_told_from_guessing(right: int, classes: int, chance: bool) -> None:
    assert is_chance_level(right / 100, 100, classes) is chance


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)), min_size=1, max_size=60))
def test_speedup_interval_holds_the_ratio(pairs: list[tuple[float, float]]) -> None:
    dense, pruned = np.array(pairs).T
    change = estimate_speedup(dense, pruned)
    assert 0 < change.low <= change.ratio <= change.high
    assert change == estimate_speedup(dense, pruned)


def test_speedup_wants_pairs() -> None:
    with pytest.raises(ValueError, match="3 dense and 2 pruned"):
        estimate_speedup(np.ones(3), np.ones(2))


def test_compare_measures_both_files(wide_cnn: Exported, slim_cnn: Exported) -> None:
    batches = _batches(wide_cnn, 2)
    candidates = [
        Candidate(e.path, cost.count_params(e.model), cost.count_macs(e.model, e.example)) for e in (wide_cnn, slim_cnn)
    ]
    trials = measure.time_and_predict(
        [e.path for e in candidates], batches, Classification(), batch_size=4, provider="cpu", threads=1
    )
    result = compare(*candidates, trials, ["a", "b", "c", "d", "e", "none"])
    dense, pruned = result.dense, result.pruned
    assert dense.quality.value == 0.8
    assert pruned.quality.value == torch_quality(slim_cnn.model, batches, Classification())
    assert (dense.samples, pruned.samples) == (10, 10)
    assert dense.onnx_bytes == wide_cnn.path.stat().st_size
    assert (dense.params, dense.macs) == (candidates[0].params, candidates[0].macs)
    assert dense.latency_ms.runs == pruned.latency_ms.runs >= 3
    assert dense.latency_ms.p50 <= dense.latency_ms.p90 <= dense.latency_ms.p99
    assert dense.throughput == pytest.approx(4 * 1e3 / dense.latency_ms.mean)
    assert (dense.provider, dense.precision, dense.batch_size) == ("CPUExecutionProvider", "fp32", 4)
    assert result.placement.nodes_on_provider == result.placement.nodes_total > 0
    assert result.threads == 1
    counts = [(each.samples, each.dense, each.pruned, each.both) for each in result.classes]
    sums = [sum(each) for each in zip(*counts, strict=True)]
    assert "none" not in [each.name for each in result.classes]
    by_model = (torch.cat([e.model(x).argmax(1) == y for x, y in batches]) for e in (wide_cnn, slim_cnn))
    assert sums == [10, 8, 10 * pruned.quality.value, int((next(by_model) & next(by_model)).sum())]
    assert dense.latency_ms.quantiles[10] == pytest.approx(dense.latency_ms.p50, abs=1e-5)
    assert list(dense.latency_ms.quantiles) == sorted(dense.latency_ms.quantiles)
    assert sum(of.dense for of in result.operators) == pytest.approx(1)
    assert sum(of.pruned for of in result.operators) == pytest.approx(1)
    assert {"Conv", "Gemm"} <= {of.name for of in result.operators}
    shares = ratios(dense, pruned)
    assert shares.speedup_p50 == pytest.approx(result.speedup.ratio)
    assert shares.macs == pruned.macs / dense.macs < 0.1
    assert result.change.value == pruned.quality.value - dense.quality.value
    assert result.change.low <= result.change.value <= result.change.high
    assert "(p50, batch 4, CPU 1 thread, 95 % interval" in verdict(result)


def test_a_profile_of_launches_is_none_of_operators(wide_cnn: Exported) -> None:
    session = runtime.open_session(wide_cnn.path, "cpu")
    inputs = {"input": np.zeros((2, 3, 16, 16), np.float32)}
    assert sum(operator_shares(session, inputs).values()) == pytest.approx(1)
    on_gpu = replace(session, placement=replace(session.placement, got="CUDAExecutionProvider", device="cuda"))
    assert operator_shares(on_gpu, inputs) == {}


@pytest.mark.parametrize(("milliseconds", "share"), [((9, 10, 10, 10, 10), 0.0), ((7, 9, 10, 16, 99), 0.6)])
def test_noise_reaches_to_the_farther_quartile(milliseconds: tuple[float, ...], share: float) -> None:
    assert measure_noise(np.array(milliseconds) / 1e3) == pytest.approx(share)


def test_what_cannot_be_measured_is_refused(
    wide_cnn: Exported, slim_cnn: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [wide_cnn.path, slim_cnn.path]
    with pytest.raises(InputError, match="batch size is 0"):
        measure.time_and_predict(files, _batches(wide_cnn, 0), Classification(), batch_size=0, provider="cpu")
    with pytest.raises(DataError, match="at least one"):
        measure.time_and_predict(files, [], Classification(), provider="cpu")
    session = runtime.open_session(wide_cnn.path, "cpu")
    other = replace(session, placement=replace(session.placement, got="CUDAExecutionProvider"))
    sessions = iter([session, other])
    monkeypatch.setattr(runtime, "open_session", lambda *_, **__: next(sessions))
    with pytest.raises(ResultError, match="cannot be compared"):
        measure.time_and_predict(files, _batches(wide_cnn, 0), Classification())


def _comparison(change: Speedup, *, macs: int = 287, size: int = 340) -> Comparison:
    dense = Measurement(
        quality=Estimate(0.99, 0.98, 1.0),
        samples=500,
        params=1000,
        macs=macs,
        onnx_bytes=size,
        latency_ms=measure.latency(np.full(5, 0.002)),
        throughput=500.0,
        batch_size=1,
        provider="CPUExecutionProvider",
    )
    changes = (ClassChange("a", 500, 495, 494, 492),)
    pruned = replace(dense, quality=Estimate(0.988, 0.97, 0.99), macs=100, onnx_bytes=100)
    lost = newcombe_interval(495, 494, 492, 500)
    return Comparison(
        dense,
        pruned,
        Placement("auto", "CPUExecutionProvider", 5, 5),
        change,
        metric=Classification.metric,
        change=Estimate(-0.002, -lost.high, -lost.low),
        threads=2,
        classes=changes,
    )


@pytest.mark.parametrize(
    ("comparison", "text"),
    [
        (
            _comparison(Speedup(2.1, 2.05, 2.2)),
            "2.87x fewer MACs, 2.1x faster (p50, batch 1, CPU 2 threads, 95 % interval 2.05 to 2.20), "
            "3.4x smaller file, no top-1 difference shown: 99.0% -> 98.8% (500 samples, "
            "95 % interval of the change -1.4 to +1.0 points)",
        ),
        (
            _comparison(Speedup(0.93, 0.91, 0.95)),
            "NOT FASTER at batch 1: 0.93x (p50, batch 1, CPU 2 threads, 95 % interval 0.91 to 0.95), "
            "2.87x fewer MACs, 3.4x smaller file, no top-1 difference shown: 99.0% -> 98.8% (500 samples, "
            "95 % interval of the change -1.4 to +1.0 points)",
        ),
        (
            _comparison(Speedup(1.01, 0.98, 1.04), macs=50, size=100),
            "no difference in speed shown at batch 1: 1.01x (p50, batch 1, CPU 2 threads, 95 % interval 0.98 to 1.04), "
            "2x more MACs, same file size, no top-1 difference shown: 99.0% -> 98.8% (500 samples, "
            "95 % interval of the change -1.4 to +1.0 points)",
        ),
    ],
)
def test_verdict(comparison: Comparison, text: str) -> None:
    assert verdict(comparison) == text


@pytest.mark.parametrize(
    ("goal", "ratio", "missed"),
    [
        (Goal(speedup=2.0), 2 * 0.951, ""),
        (Goal(speedup=2.0), 2 * 0.949, "1.9x faster, 2x was asked for"),
        (Goal(latency_ms=2 / 1.049), 1.0, ""),
        (Goal(latency_ms=2 / 1.051), 1.0, "2 ms, at most 1.90295 ms was asked for"),
        (Goal(0.5), 0.1, ""),
    ],
)
def test_a_goal_of_speed_may_be_missed_by_a_twentieth(goal: Goal, ratio: float, missed: str) -> None:
    """Which is what noise comes to; the pruned model of these takes 2 ms."""
    assert results._describe_missed_goal(goal, _comparison(Speedup(ratio, ratio, ratio))) == missed


@pytest.mark.parametrize(("planned_ms", "codes"), [(2 / 1.19, 1), (2 / 1.21, 2), (2 / 0.81, 1), (2 / 0.79, 2)])
def test_a_machine_that_changed_by_a_fifth_is_said(planned_ms: float, codes: int) -> None:
    """The dense model takes 2 ms in the end; what a plan for twice the speed allows is half of what it took then."""
    nothing = Plan({}, "latency", "ms", 1.0, 1.0, 1.0)
    model = nn.Identity()
    slim = PruneResult(Structure(()), {}, Pruned(model, model, (), nothing), attempts=(Attempt(1, 1, planned_ms / 2),))
    notes = list(results._describe_attempts(Goal(speedup=2.0), slim, _comparison(Speedup(2.0, 2.0, 2.0))))
    assert [note.code for note in notes] == ["closed-loop", "machine-changed"][:codes]


def test_environment_is_json_and_names_the_hardware() -> None:
    environment = environment_of()
    assert read_record(Environment, json.dumps(asdict(environment)), "it") == environment
    for key in ("python", "torch", "onnxruntime", "onnx", "timm", "torch_pruning", "zennit", "device_name", "platform"):
        assert getattr(environment, key)
    assert environment.threads == torch.get_num_threads()
    assert environment.torch.split("+")[0] == torch.__version__.split("+")[0]
