"""Nets that run out of memory, or answer with nothing or the same."""

from __future__ import annotations

import torch
from models import CLASSES, FlattenCNN
from torch import Tensor, nn

SIZE = 16
MARKUP = '<img src=x onerror=alert(1)>&"'
TOO_MUCH = 1 << 55
"""Bytes that no machine has."""


class Hungry(FlattenCNN):
    """Takes more memory than there is for more than five samples."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 5:
            torch.empty(TOO_MUCH)
        return super().forward(x)


class Insatiable(FlattenCNN):
    """Takes more memory than there is for every image."""

    def forward(self, x: Tensor) -> Tensor:
        if x.any():
            torch.empty(TOO_MUCH)
        return super().forward(x)


class Late(FlattenCNN):
    """Memory is short for batches of more than five, from the second call with them on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x) > 5
        if self.calls > 1 and len(x) > 5:
            torch.empty(TOO_MUCH)
        return super().forward(x)


class Nan(FlattenCNN):
    """Zeros in, numbers out; anything else in, NaN out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum() * torch.inf * 0 if x.any() else super().forward(x)


class Constant(FlattenCNN):
    """Says the same of every input."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.fc2.weight)


class Nothing(FlattenCNN):
    """All weights are zero."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Channels(nn.Module):
    """A network on images of one channel, or more."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (channels, SIZE, SIZE),
            "mean": (0.5,) * channels,
            "std": (0.5,) * channels,
        }
        self.conv1, self.conv2 = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


def four_channels() -> nn.Module:
    return Channels(4)


def five_channels() -> nn.Module:
    return Channels(5)
