"""How near a pruned model is to the dense one, and what is chosen by that."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from models import batches_of
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress import agreement, compress_module
from pxcompress.agreement import DenseOutputs
from pxcompress.passes.parts import HELD_OUT_EVERY, RUN_LENGTH, HeldOut
from pxcompress.repair.fold import Fold
from pxcompress.repair.least_squares import LeastSquares
from pxcompress.state import seeded
from pxcompress.types import Batches, Pruned


class _Table(nn.Module):
    """Looks logits up: the input is the number of a row."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[x[:, 0].long()]


@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
def test_logits_are_compared_by_class_and_by_divergence(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "KEPT_BYTES", kept_bytes)
    dense, pruned = _Table([[0.0, 0.0], [2.0, 0.0]]), _Table([[0.0, math.log(3)], [5.0, 3.0]])
    batches = batches_of(torch.tensor([[0.0], [1.0], [0.0]]), 2)
    outputs = DenseOutputs(dense, batches)
    once, again = outputs.compare(pruned), outputs.compare(pruned)
    assert once == again
    # row 0: half against a quarter and three quarters, another class; row 1: the same distribution
    divergence = 2 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 3
    assert (once.samples, once.share) == (3, pytest.approx(1 / 3))
    assert once.divergence == pytest.approx(divergence, rel=1e-5)
    assert outputs.compare(dense).divergence == pytest.approx(0, abs=1e-12)


class _Watched(nn.Module):
    """Counts, at every call, how many of its earlier outputs somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[weakref.ref[Tensor]] = []
        self.most_held = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most_held = max(self.most_held, sum(output() is not None for output in self.outputs))
        result = x.repeat(1, 3)
        self.outputs.append(weakref.ref(result))
        return result


def test_outputs_that_take_too_much_memory_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of 24 bytes fit; a third one shows that all will not, and no further one is held."""
    monkeypatch.setattr(agreement, "KEPT_BYTES", 48)
    dense = _Watched()
    DenseOutputs(dense, batches_of(torch.arange(20.0)[:, None], 2)).compare(nn.Linear(1, 3))
    assert dense.most_held <= 3


def test_held_out_samples_are_a_sixth_and_no_others() -> None:
    inputs = torch.arange(100.0)[:, None]
    batches = batches_of(inputs, 7)
    held, fit = (torch.cat([part for part, _ in HeldOut(batches, others)]).flatten() for others in (False, True))
    assert sorted([*held.tolist(), *fit.tolist()]) == list(range(100))
    assert len(held) == RUN_LENGTH * (100 // (RUN_LENGTH * HELD_OUT_EVERY))
    assert all(int(number) // RUN_LENGTH % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for number in held)


def _spoilt(repair: type) -> object:
    """A call of `repair` that makes outputs worse."""
    original = repair.__call__

    def call(self: object, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        pruned = original(self, pruned, batches, held_out)
        with torch.no_grad():
            next(pruned.model.parameters()).mul_(-3)
        return pruned

    return call


@pytest.mark.parametrize("repair", [Fold, LeastSquares])
def test_a_repair_that_does_harm_is_not_kept(repair: type, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_named("resnet_basic")
    with seeded(0):
        batches = batches_of(torch.randn(96, *subject.inputs.shape[1:]), 16)
    name = {Fold: "fold", LeastSquares: "least-squares"}[repair]
    options = {"ratio": 0.3, "budget": "macs", "round_to": 1, "scorer": "magnitude", "repair": (name,)}
    bare = compress_module(subject.model, subject.example, batches, **{**options, "repair": ()})
    monkeypatch.setattr(repair, "__call__", _spoilt(repair))
    told: list[str] = []
    slim = compress_module(subject.model, subject.example, batches, note=told.append, **options)
    assert any(f"repair {name}" in message and "not kept" in message for message in told)
    assert slim.agreements is not None
    assert slim.agreements.held_out == bare.agreements.held_out
    with torch.no_grad():
        torch.testing.assert_close(slim.pruned.model(subject.inputs), bare.pruned.model(subject.inputs))


def test_repairs_that_help_bring_outputs_nearer() -> None:
    subject = subject_named("resnet_basic")
    with seeded(0):
        batches = batches_of(torch.randn(96, *subject.inputs.shape[1:]), 16)
    divergences = []
    options = {"ratio": 0.3, "budget": "macs", "round_to": 1, "scorer": "magnitude"}
    for repair in ((), ("fold",), ("fold", "batchnorm")):
        slim = compress_module(subject.model, subject.example, batches, **options, repair=repair)
        assert slim.agreements is not None
        divergences.append(slim.agreements.held_out.divergence)
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < divergences[0]


def test_too_few_samples_are_all_fitted_to() -> None:
    subject = subject_named("flatten_cnn")
    slim = compress_module(subject.model, subject.example, [subject.inputs], 0.3, round_to=1, repair=("closed-form",))
    assert slim.agreements is None


def test_layers_with_more_features_than_samples_are_named() -> None:
    """A layer on single vectors: positions of an image are not independent, but they are more than samples."""
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)
        ).eval()
        batches = batches_of(torch.randn(48, 3, 6, 6), 16)
    told: list[str] = []
    compress_module(net, batches[0][0][:1], batches, 0.3, note=told.append, repair=())
    assert [message for message in told if message.startswith("few samples: 4 reads 64 features of 40 samples")]
    told.clear()
    compress_module(net, batches[0][0][:1], 2 * batches, 0.3, note=told.append, repair=())
    assert not [message for message in told if message.startswith("few samples")]
