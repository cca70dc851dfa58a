"""No bare traceback: whatever fails is one line that says in which stage, at which layer, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import Px, one_line
from models import FlattenCNN, batches_of
from torch import Tensor, nn

from pxcompress import compress_module
from pxcompress.clock import Clock
from pxcompress.deploy.predictions import torch_quality
from pxcompress.errors import DataError, InputError, OutOfMemoryError, StageError
from pxcompress.guard import describe, name_failures
from pxcompress.notes import silent
from pxcompress.tasks.regression import Regression
from pxcompress.tasks.task import Outputs, Task

BATCHES = batches_of(torch.randn(8, 3, 32, 32), 4)


class Picky(nn.Conv2d):
    """Works for one or two samples at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise KeyError("no such\nkernel")
        return super().forward(x)


class PickyCNN(FlattenCNN):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Identity(), Picky(6, 6, 1))
        self.fc2 = nn.Linear(10, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.relu(self.block(self.conv2(x))))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


class _Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, m: Tensor) -> Tensor:
        raise NotImplementedError("no gradient of this kernel")


class NoBackward(FlattenCNN):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if len(x) <= 2 else _Breaks.apply(x))


@pytest.mark.parametrize("scorer", ["lrp-residual", "lrp", "taylor", "activation", "integrated-gradients"])
def test_a_layer_that_fails_is_named(scorer: str) -> None:
    with pytest.raises(StageError) as caught:
        compress_module(PickyCNN(), BATCHES[0][0][:1], BATCHES, 0.3, scorer=scorer)
    assert str(caught.value) == f"stage 'score ({scorer})' failed at layer 'block.1': KeyError: 'no such\\nkernel'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_fails_in_no_layer_has_a_stage() -> None:
    with pytest.raises(StageError, match=r"^stage 'score \(taylor\)' failed: NotImplementedError: no gradient of this"):
        compress_module(NoBackward(), BATCHES[0][0][:1], BATCHES, 0.3, scorer="taylor")


class _Broken:
    """Batches that fail after the first one."""

    def __iter__(self):
        yield BATCHES[0]
        raise ValueError("sample 7 has no label")


def test_batches_that_fail_are_no_traceback_either() -> None:
    with pytest.raises(StageError, match=r"^(stage '.*'|compress_module) failed: ValueError: sample 7 has no label$"):
        compress_module(FlattenCNN(), BATCHES[0][0][:1], _Broken(), 0.3, scorer="activation")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(""), "ValueError"),
        (ValueError("\n  first \nsecond"), "ValueError: first"),
        (ZeroDivisionError("x" * 500), "ZeroDivisionError: " + "x" * 197 + "..."),
    ],
)
def test_one_line_of_an_exception(error: Exception, line: str) -> None:
    assert describe(error) == line


@pytest.mark.parametrize("error", [DataError("no images"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_what_is_understood_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, name_failures("stage 'x'"):
        raise error
    assert caught.value is error


def test_stages_within_stages_are_named_once() -> None:
    clock = Clock(silent)
    with pytest.raises(StageError, match=r"^stage 'inner' failed: TypeError: no$"):  # noqa: SIM117
        with clock.stage("outer"), clock.stage("inner"):
            raise TypeError("no")
    with pytest.raises(OutOfMemoryError, match="stage 'inner' ran out of memory"), clock.stage("inner"):
        raise MemoryError
    assert clock.stages == ()


@pytest.mark.parametrize("place", ["", "before", "after"])
def test_the_command_line_prints_one_line_and_writes_nothing(px: Px, tmp_path: Path, place: str) -> None:
    out = tmp_path / "runs" / "slim"
    args: list[object] = ["run", "--model", "test_guard:PickyCNN", "--ratio", "0.3", "--out", out, "--quiet"]
    args = ["--debug", *args] if place == "before" else [*args, "--debug"] if place == "after" else args
    outcome = px(*args)
    line = outcome.err.strip().splitlines()[-1]
    assert line.startswith("pxcompress: stage 'weights' failed at layer 'block.1': KeyError: ")
    if place:
        assert "Traceback" in outcome.err
        assert "test_guard.py" in outcome.err
        assert "--debug" not in line
    else:
        assert one_line(outcome, 3) == line
        assert line.endswith("(--debug shows where)")
    assert list(out.parent.iterdir()) == []


class Raising(Regression):
    """A user's own task whose method fails."""

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        return super().statistics(outputs, targets, {})["no such"]  # type: ignore[index]


class Undefined(Regression):
    """A user's own task whose metric is no number."""

    def quality(self, statistics: Tensor) -> float:
        return super().quality(statistics) * float("nan")


class Flat(Regression):
    """A user's own task whose statistics have no second axis."""

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        return super().statistics(outputs, targets, dense)[:, 0]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Raising(), r"test_guard:Raising.statistics raises \w+Error: .*; mend it"),
        (Undefined(), "Undefined.quality is nan for 8 samples"),
        (Flat(), r"Flat.statistics returns \(4,\) for 4 samples; expected \(n, s\)"),
    ],
)
def test_a_task_of_ones_own_that_fails_is_named(task: Task, message: str) -> None:
    batches = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(2)]
    with pytest.raises(InputError, match=message) as caught, name_failures("stage 'weights'"):
        torch_quality(nn.Linear(3, 2), batches, task)
    assert "\n" not in str(caught.value)


def test_what_fails_in_a_task_of_this_package_is_no_fault_of_the_user() -> None:
    with pytest.raises(StageError, match="stage failed"), name_failures("stage"):
        Regression().statistics({}, torch.zeros(2, 1), {})
