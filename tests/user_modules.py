"""Modules as people bring them: what they take and return is not one image and its class scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from models import CLASSES
from torch import Tensor, nn


class Sequences(nn.Module):
    """1-D convolutions with a score for every step: (n, classes, steps)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(4, 12, 5, padding=2), nn.BatchNorm1d(12)
        self.inner, self.outer = nn.Conv1d(12, 16, 3, padding=1), nn.Conv1d(16, 12, 3, padding=1)
        self.head = nn.Conv1d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.outer(torch.relu(self.inner(x)))))


class TwoInputs(nn.Module):
    """An image and a vector, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3)
        self.fc = nn.Linear(6, 12)
        self.join, self.head = nn.Linear(22, 14), nn.Linear(14, CLASSES)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        seen = torch.relu(self.conv2(torch.relu(self.conv1(image)))).mean((2, 3))
        return self.head(torch.relu(self.join(torch.cat([seen, torch.relu(self.fc(vector))], 1))))


class Several(nn.Module):
    """Two heads in a dict, and the features that they read, which are an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3)
        self.hidden = nn.Linear(10, 12)
        self.classes, self.box = nn.Linear(12, CLASSES), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        features = torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3))
        logits = self.classes(torch.relu(self.hidden(features)))
        return {"class": logits, "box": self.box(features), "inner": (features, logits.argmax(1))}


class Segmentation(nn.Module):
    """An encoder, a decoder with a skip, and a score for every pixel: (n, classes, height, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1, stride=2)
        self.norm, self.up = nn.BatchNorm2d(16), nn.Conv2d(28, 12, 3, padding=1)
        self.head = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.down1(x))
        second = torch.relu(self.norm(self.down2(first)))
        second = nn.functional.interpolate(second, scale_factor=2.0)
        return self.head(torch.relu(self.up(torch.cat([first, second], 1))))


class SharedTower(nn.Module):
    """One tower for two images (a Siamese network); what comes out is how far apart they are."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU())
        self.embed = nn.Linear(10, 8)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (self.embed(self.tower(image).mean((2, 3))) for image in (left, right))
        return a, b, (a - b).square().sum(1)


class Unwrapped(nn.Module):
    """Parameters of no layer: a scale for every channel, and a weight applied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3), nn.Conv2d(10, 8, 3)
        self.scale = nn.Parameter(torch.rand(1, 10, 1, 1) + 0.5)
        self.weight = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x)))) * self.scale
        return nn.functional.linear(torch.relu(self.conv3(x)).mean((2, 3)), self.weight)


class Text(nn.Module):
    """Whole numbers and a mask in, by name; a residual stream that an embedding feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv1, self.conv2 = nn.Conv1d(8, 12, 3, padding=1), nn.Conv1d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = x + self.conv2(torch.relu(self.conv1(x)) * mask[:, None])
        return self.head(x.mean(-1))


def _images(n: int) -> Tensor:
    return torch.randn(n, 3, 12, 12)


USER_MODULES: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int], object]]] = {
    "1-D convolutions": (Sequences, lambda n: torch.randn(n, 4, 20)),
    "two inputs": (TwoInputs, lambda n: (_images(n), torch.randn(n, 6))),
    "dict of outputs": (Several, _images),
    "segmentation": (Segmentation, _images),
    "shared module": (SharedTower, lambda n: {"left": _images(n), "right": _images(n)}),
    "unwrapped parameters": (Unwrapped, _images),
    "text": (Text, lambda n: {"ids": torch.randint(3, 20, (n, 16)), "mask": torch.rand(n, 16) > 0.3}),
}
"""Builder, and n samples of what the module takes."""
