from __future__ import annotations

import pytest
import torch
from torch import nn

from pxcompress.models.training import (
    CLIP,
    LEAST_AREA,
    SHIFT,
    STRETCH,
    adamw,
    crop_images,
    deterministic,
    flushed_denormals,
    move_images,
    update,
    zero_denormals,
)
from pxcompress.state import seeded


def small_net() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).eval()


def test_moved_images_are_near_the_originals() -> None:
    ramp = torch.linspace(0.0, 1.0, 32).expand(2000, 1, 32, 32)
    with seeded(0):
        images = move_images(ramp)
    assert images.shape == ramp.shape
    middle = images[:, 0, 16, 16] - ramp[0, 0, 16, 16]
    assert float(middle.abs().max()) <= SHIFT * 1.1  # a pixel in the middle only shifts
    assert abs(float(middle.mean())) < 0.005
    assert float(middle.std()) == pytest.approx(SHIFT / 3**0.5, rel=0.1)  # uniform
    assert float(images.min()) >= 0.0
    assert float(images.max()) <= 1.0
    assert len(torch.unique(images[:, 0, 16, 16])) > 1900  # each on its own


def test_parts_of_images_lie_within_them() -> None:
    ramp = torch.linspace(0.5 / 32, 31.5 / 32, 32)
    images = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32)]).expand(2000, 2, 32, 32)
    with seeded(0):
        parts = crop_images(images)
    assert parts.shape == images.shape
    width, height = (
        (parts[:, 0, 16, 24] - parts[:, 0, 16, 8]) * 2,
        (parts[:, 1, 24, 16] - parts[:, 1, 8, 16]) * 2,
    )
    area, stretch = width * height, width / height
    assert float(area.min()) == pytest.approx(LEAST_AREA, abs=0.02)
    assert float(area.max()) == pytest.approx(1.0, abs=0.02)
    assert float(area.mean()) == pytest.approx((1 + LEAST_AREA) / 2, abs=0.02)  # nearly uniform
    assert float(stretch.max()) == pytest.approx(STRETCH, rel=0.02)
    assert float(stretch.min()) == pytest.approx(1 / STRETCH, rel=0.02)
    for place, size in ((0, width), (1, height)):
        middle = parts[:, place, 15:17, 15:17].mean((1, 2))
        assert float((middle - size / 2).min()) >= -1e-3
        assert float((middle + size / 2).max()) <= 1 + 1e-3
        assert float((middle - size / 2)[size < 0.8].max()) > 0.2, "not all of them in a corner"


@pytest.mark.parametrize("before", [False, True])
def test_denormals_are_flushed_only_inside(before: bool) -> None:
    def flushing() -> bool:
        return float(torch.tensor([1e-40]).mul(1.0)) == 0.0

    torch.set_flush_denormal(before)
    try:
        with flushed_denormals():
            assert flushing()
        assert flushing() is before
        with pytest.raises(KeyError), flushed_denormals():
            raise KeyError
        assert flushing() is before
    finally:
        torch.set_flush_denormal(False)


def test_sums_are_in_a_fixed_order_only_inside() -> None:
    before = torch.backends.cudnn.deterministic
    with deterministic():
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic is before


def test_weights_have_no_denormals() -> None:
    model = small_net()
    with torch.no_grad():
        model[0].weight[0] = 1e-40
        model[1].running_var[0] = -1e-39
        model[0].weight[1] = 1e-30
    zero_denormals(model)
    assert not model[0].weight[0].any()
    assert float(model[1].running_var[0]) == 0.0
    assert model[0].weight[1].eq(1e-30).all()
    assert int(model[1].num_batches_tracked) == 0


def test_only_matrices_that_are_trained_decay() -> None:
    """Without a gradient, a step of AdamW multiplies by 1 - learning rate x decay."""
    model = small_net()
    model[3].weight.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = adamw(model, 0.1, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update(model, optimizer)
    for name, value in model.named_parameters():
        factor = 0.95 if name == "0.weight" else 1.0
        assert torch.allclose(value, before[name] * factor, rtol=1e-6, atol=0)
        assert value.grad is None or not value.requires_grad


def test_gradients_are_clipped_together() -> None:
    model = nn.Linear(3, 2)
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    for size, expected in ((100.0, CLIP), (0.01, 0.01 * 8**0.5)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, size)
        norm = float(update(model, optimizer))
        assert norm == pytest.approx(size * 8**0.5, rel=1e-4)
        clipped = sum(float(gradient.square().sum()) for gradient in seen[-2:]) ** 0.5
        assert clipped == pytest.approx(expected, rel=1e-4)
