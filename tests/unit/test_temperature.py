"""Temperature scaling of a pruned model: inside its last layer, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FlattenCNN
from torch import Tensor, nn

from pxcompress import InputError, Recipe, compress_module
from pxcompress.errors import ResultError
from pxcompress.run import Run
from pxcompress.stages import prune_and_repair
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Batch

OPTIONS: dict[str, Any] = {
    "ratio": 0.3,
    "scorer": "magnitude",
    "round_to": 1,
    "repair": ("fold",),
    "budget": "channels",
}


class Ended(nn.Module):
    """A classifier whose logits go through `end`."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.net, self.end = FlattenCNN(), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.net(x))  # type: ignore[no-any-return]


def _sharp(logits: Tensor) -> Tensor:
    return 8 * logits


def _softmax(logits: Tensor) -> Tensor:
    return (8 * logits).softmax(1)


def _normalised(logits: Tensor) -> Tensor:
    return 8 * F.normalize(logits, dim=1)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    with seeded(0):
        return [(torch.randn(16, 3, 12, 12), torch.randint(CLASSES, (16,))) for _ in range(4)]


@pytest.mark.parametrize("end", [_sharp, _softmax])
def test_the_last_layer_is_divided(batches: list[Batch], end: Any) -> None:
    with seeded(3):
        model = Ended(end).eval()
    plain = compress_module(model, batches[0][0][:1], batches, held_out=batches, **OPTIONS)
    scaled = compress_module(model, batches[0][0][:1], batches, held_out=batches, temperature_scaling=True, **OPTIONS)
    assert plain.temperature == 1 < scaled.temperature  # labels are drawn at random: nothing can be too unsure of them
    assert scaled.pruned.plan == plain.pruned.plan
    inputs, _ = batches[0]
    with torch.no_grad():
        before, after = (each.pruned.model(inputs) for each in (plain, scaled))
    if end is _softmax:
        before, after = before.log(), after.log()
    expected = (before / scaled.temperature).log_softmax(1)
    torch.testing.assert_close(after.log_softmax(1), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert scaled.pruned.model.state_dict().keys() == plain.pruned.model.state_dict().keys()


def test_logits_that_are_not_the_last_layers_are_refused(batches: list[Batch]) -> None:
    with seeded(3):
        model = Ended(_normalised).eval()
    with pytest.raises(ResultError, match="something else stands between"):
        compress_module(model, batches[0][0][:1], batches, held_out=batches, temperature_scaling=True, **OPTIONS)


def test_labels_are_needed_and_held_out_samples(batches: list[Batch]) -> None:
    with pytest.raises(InputError, match="temperature scaling need labels"):
        compress_module(
            FlattenCNN().eval(), batches[0][0][:1], [x for x, _ in batches], temperature_scaling=True, **OPTIONS
        )
    recipe = Recipe("mine", temperature_scaling=True, **OPTIONS)
    run = Run(recipe, {"score": batches, "repair": batches}, task=Classification())
    with pytest.raises(InputError, match="held out"):
        prune_and_repair(FlattenCNN().eval(), batches[0][0][:1], run)
