"""Little memory: smaller batches, then one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CLASSES, FlattenCNN
from odd_nets import SIZE, TOO_MUCH, Hungry, Late
from torch import Tensor

from pxcompress import Recipe, compress_module
from pxcompress.clock import Clock
from pxcompress.errors import OutOfMemoryError
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.repair.batchnorm import BatchNormStatistics
from pxcompress.run import Run
from pxcompress.stages import prune_and_repair
from pxcompress.state import seeded
from pxcompress.types import Batches


def test_scoring_goes_on_in_smaller_batches() -> None:
    with seeded(0):
        hungry, inputs, labels = Hungry().eval(), torch.randn(24, 3, SIZE, SIZE), torch.randint(CLASSES, (24,))
    modest = FlattenCNN().eval()
    modest.load_state_dict(hungry.state_dict())
    options = {"ratio": 0.5, "round_to": 1, "scorer": "taylor", "repair": ()}
    slims = [compress_module(model, inputs[:1], [(inputs, labels)], **options) for model in (hungry, modest)]
    assert slims[0].pruned.plan.removed == slims[1].pruned.plan.removed
    for name, values in slims[1].scores.items():
        torch.testing.assert_close(slims[0].scores[name], values)


REPAIR = ("fold", "least-squares", "finetune:steps=3,batch_size=24,augment=false")


@pytest.mark.parametrize("kind", [Hungry, Late])
def test_repairs_go_on_in_smaller_batches_and_a_failed_one_leaves_nothing(kind: type[FlattenCNN]) -> None:
    """The same weights come out as where batches were that small from the start."""
    with seeded(0):
        hungry, inputs, labels = kind().eval(), torch.randn(48, 3, SIZE, SIZE), torch.randint(CLASSES, (48,))
    modest = FlattenCNN().eval()
    modest.load_state_dict(hungry.state_dict())
    parts = {1: [(inputs[:24], labels[:24]), (inputs[24:], labels[24:])]}
    parts[8] = list(zip(inputs.split(3), labels.split(3), strict=True))
    small = (*REPAIR[:2], "finetune:steps=3,batch_size=3,accumulate=8,augment=false")
    options: dict[str, Any] = {"ratio": 0.5, "round_to": 1, "scorer": "magnitude"}
    told: list[str] = []
    slims = []
    for model, count, repair in ((hungry, 1, REPAIR), (modest, 8, small)):
        batches = dict.fromkeys(("score", "repair", "select"), parts[count])
        recipe = Recipe("mine", repair=repair, **options)
        with seeded(0):
            slims.append(prune_and_repair(model, inputs[:1], Run(recipe, batches, Clock(told.append, measures=False))))
    assert sum("trying again with batches of 3" in line for line in told) == len(REPAIR)
    first, second = (slim.pruned.model.state_dict() for slim in slims)
    assert first.keys() == second.keys()
    for name, values in second.items():
        torch.testing.assert_close(first[name], values, rtol=1e-4, atol=1e-5)


def test_a_repair_that_does_not_fit_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        model, inputs, labels = FlattenCNN().eval(), torch.randn(24, 3, SIZE, SIZE), torch.randint(CLASSES, (24,))
    monkeypatch.setattr(BatchNormStatistics, "__call__", lambda *args: torch.empty(TOO_MUCH))
    options = {"ratio": 0.5, "round_to": 1, "scorer": "magnitude", "repair": ("batchnorm",)}
    with pytest.raises(OutOfMemoryError, match="stage 'batchnorm' ran out of memory") as caught:
        compress_module(model, inputs[:1], [(inputs, labels)], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fits", [1, 3, 8])
def test_batches_are_halved_until_they_fit(fits: int) -> None:
    batches = [(torch.arange(start, start + 8.0), torch.arange(start, start + 8)) for start in (0, 8)]
    notes: list[str] = []

    def work(parts: Batches) -> list[tuple[Tensor, Tensor]]:
        seen = []
        for inputs, labels in parts:
            if len(inputs) > fits:
                torch.empty(TOO_MUCH)
            seen.append((inputs, labels))
        return seen

    parts = in_smaller_batches(work, batches, notes.append)
    assert max(len(inputs) for inputs, _ in parts) == {1: 1, 3: 2, 8: 8}[fits]
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), torch.arange(16.0))
    assert torch.equal(torch.cat([labels for _, labels in parts]), torch.arange(16))
    assert len(notes) == {1: 3, 3: 2, 8: 0}[fits]


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def work(parts: Batches) -> None:
        calls.append(parts)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        in_smaller_batches(work, [(torch.zeros(8), torch.zeros(8))], print)
    assert len(calls) == 1
