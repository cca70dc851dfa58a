"""PyTorch models beside the ONNX files that they were exported to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pxcompress.deploy.export import export_onnx
from pxcompress.proof import Artifact
from pxcompress.state import seeded

METADATA = {"classes": '["cat", "dog"]', "version": "0"}


@dataclass(frozen=True)
class Exported:
    """A PyTorch model in eval mode, what it was exported to, and one input."""

    model: nn.Module
    artifact: Artifact
    example: torch.Tensor

    @property
    def path(self) -> Path:
        return self.artifact.path


def make_cnn(width: int) -> nn.Module:
    """Two convolutions with BatchNorm (statistics and affine parameters drawn), pooling, a classifier of 5 classes."""
    with seeded(width):
        model = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(width, 5),
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def export_model(model: nn.Module, size: int, folder: Path, name: str) -> Exported:
    with seeded(0):
        example = torch.randn(1, 3, size, size)
    return Exported(model, export_onnx(model, example, folder / f"{name}.onnx", METADATA), example)
