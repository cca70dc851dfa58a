"""Nets for embedded data that are no images: `--model pxcompress.demo.nets:dna_cnn --data dna`."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; `widths` are those of the input, the hidden layers and the output."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for place, (inputs, outputs) in enumerate(pairwise(widths), 1):
            layers[f"fc{place}"] = nn.Linear(inputs, outputs)
            layers[f"act{place}"] = nn.ReLU()
        layers.popitem()
        super().__init__(layers)
        self.default_cfg = {"input_size": widths[:1]}


def spiral_mlp(num_classes: int = 2) -> nn.Module:
    """Three hidden layers of 64 for points in the plane; a logit for each class, where the paper has one for both."""
    return MLP((2, 64, 64, 64, num_classes))


class DNAConvNet(nn.Module):
    """Two 1-D convolutions of a motif's length with BatchNorm, the largest of each feature, two dense layers."""

    def __init__(self, num_classes: int = 6) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (4, 200)}
        self.conv1 = nn.Conv1d(4, 48, 11, padding=5, bias=False)
        self.bn1 = nn.BatchNorm1d(48)
        self.act1 = nn.ReLU()
        self.pool1 = nn.MaxPool1d(4)
        self.conv2 = nn.Conv1d(48, 64, 5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm1d(64)
        self.act2 = nn.ReLU()
        self.pool2 = nn.AdaptiveMaxPool1d(1)
        self.fc = nn.Linear(64, 64)
        self.act3 = nn.ReLU()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.act1(self.bn1(self.conv1(x))))
        x = self.pool2(self.act2(self.bn2(self.conv2(x))))
        return self.head(self.act3(self.fc(x.flatten(1))))


def dna_cnn(num_classes: int = 6) -> nn.Module:
    """A convolutional net for sequences of 200 letters, one-hot (4, 200)."""
    return DNAConvNet(num_classes)
