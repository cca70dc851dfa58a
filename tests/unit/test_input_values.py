"""Numbers that are no measurements are refused by place; batches that are all alike are said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pxcompress import compress_module
from pxcompress.errors import DataError
from pxcompress.models.input_values import check_batches


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def with_value(value: float) -> list[tuple[Tensor, None]]:
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    batches[1][2, 0, 3, 3] = value
    return [(inputs, None) for inputs in batches]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -3.4e38, 1e20, -9999.0])
@pytest.mark.parametrize("packed", [False, True])
def test_no_measurement_is_refused_by_place(value: float, packed: bool) -> None:
    batches = [((inputs,) if packed else inputs, labels) for inputs, labels in with_value(value)]
    with pytest.raises(
        DataError, match=r"sample 2 of batch 1 (holds NaN|goes from).*; expected finite numbers"
    ) as caught:
        compress_module(net(), batches[0][0][:1] if not packed else (batches[0][0][0][:1],), batches, 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-9998.5, 255.0, 65535.0, -1e6])
def test_large_numbers_are_numbers(value: float) -> None:
    assert len(list(check_batches((inputs, torch.zeros(4)) for inputs, _ in with_value(value)))) == 3


def test_samples_that_are_all_alike_are_said_once_they_were_all_seen() -> None:
    alike = [(torch.ones(4, 3, 8, 8), torch.zeros(4))] * 2
    with pytest.warns(UserWarning, match="all 8 samples of the batches are alike"):
        assert len(list(check_batches(alike))) == 2
    list(check_batches([*alike, (torch.zeros(1, 3, 8, 8), torch.zeros(1))]))
    list(check_batches([(torch.ones(1, 3, 8, 8), torch.zeros(1))]))
