"""Exports shared by the tests: each costs a second or more, so each is made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from command import Px, caller
from torch import nn

from pxcompress.deploy.export import export_onnx
from pxcompress.proof import Artifact
from pxcompress.state import seeded


@pytest.fixture
def px(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Px:
    """Run the command line in this process."""
    return caller(monkeypatch, capfd)


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


def _exported(model: nn.Module, size: int, folder: Path, name: str) -> Exported:
    with seeded(0):
        example = torch.randn(1, 3, size, size)
    return Exported(model, export_onnx(model, example, folder / f"{name}.onnx", METADATA), example)


@pytest.fixture(scope="session")
def wide_cnn(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported(make_cnn(48), 16, tmp_path_factory.mktemp("wide"), "dense")


@pytest.fixture(scope="session")
def slim_cnn(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported(make_cnn(8), 16, tmp_path_factory.mktemp("slim"), "model")


@pytest.fixture(scope="session")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with seeded(0):
        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=5).eval()
    return _exported(model, 16, tmp_path_factory.mktemp("vit"), "vit")
