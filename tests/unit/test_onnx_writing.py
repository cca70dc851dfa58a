"""Whatever changes in a module that was read from an ONNX file, its units or its weights, can be written back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pxcompress.deploy.all_outputs import run_graph
from pxcompress.deploy.onnx_modules import least_scales, read_onnx, relative_difference
from pxcompress.deploy.runtime import open_session
from pxcompress.graph import find_groups, prune
from pxcompress.models.loading import classifier_names
from pxcompress.models.onnx_file import read_ports
from pxcompress.onnx_in import OnnxModule, read_file
from pxcompress.onnx_in.channels import LAST, LAYOUT
from pxcompress.types import Plan


class Block(nn.Module):
    """A convolution of 24 channels, what is in between, and one that reads them; `beside` has as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.beside = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 1, 1), nn.Conv2d(16, 24, 1)
        self.outer, self.head = nn.Conv2d(24, 16, 1), nn.Linear(16, 5)
        self.extra = nn.Parameter(torch.rand(24, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(self.outer(self.between(F.relu(self.inner(x)), x)).mean((2, 3)))

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y


class Resized(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return F.interpolate(y, size=(12, 12), mode="bilinear")


class Viewed(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self.beside(x).flatten(2).view_as(y)


class Expanded(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return y * torch.sigmoid(self.beside(x).mean((2, 3), keepdim=True).expand_as(y))


class Shifted(Block):
    """A constant per channel that no layer can take in; what is trained may have to multiply there."""

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return F.relu(y + self.extra - 0.5)


class Scaled(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return F.relu(y * self.extra - 0.1)


class Split(Block):
    def between(self, y: Tensor, x: Tensor) -> Tensor:
        first, second = y.chunk(2, 1)
        return torch.cat([torch.tanh(second), first], 1)


class Recurrent(Block):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Identity()
        self.cell = nn.GRU(24, 8, bidirectional=True)

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        return self.cell(y.mean(3).permute(2, 0, 1))[0].permute(1, 2, 0)[..., None]


class Biased(Block):
    """Attention of four heads with a bias for each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(24, 24) for _ in range(4))
        self.table = nn.Parameter(torch.randn(4, 16, 16))

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        tokens = F.max_pool2d(y, 2).flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).reshape(-1, 16, 4, 6).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(2, 3) * 0.4 + self.table).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(-1, 16, 24)).transpose(1, 2)[..., None]


def export(kind: Callable[[], nn.Module], path: Path, example: Tensor, axes: dict[int, str]) -> Path:
    torch.manual_seed(0)
    names = {"input_names": ["image"], "output_names": ["score"]}
    dynamic = {"image": axes, "score": {0: "n"}} if axes else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            kind().eval(), (example,), path, dynamo=False, opset_version=17, dynamic_axes=dynamic, **names
        )
    return path


def assert_written(module: OnnxModule, path: Path, samples: int) -> None:
    """The file that the module writes computes what it does."""
    module.write_onnx(path, {})
    images = torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module.file_outputs(images)
    (written,) = run_graph(path, {"image": images.numpy()})
    assert relative_difference(expected, written) < 1e-4


@pytest.mark.parametrize("fixed", [False, True], ids=["any batch", "batch of one"])
@pytest.mark.parametrize("kind", [Resized, Viewed, Expanded, Shifted, Scaled, Split, Recurrent, Biased])
def test_every_change_can_be_written_back(kind: type[Block], fixed: bool, tmp_path: Path) -> None:
    axes = {} if fixed else {0: "n"}
    module = read_onnx(export(kind, tmp_path / "net.onnx", torch.randn(1 if fixed else 2, 3, 16, 16), axes))
    example = torch.randn(1, 3, 16, 16)
    groups = find_groups(module, example, classifier_names(module, example)).groups
    assert any("inner" in member.module for group in groups for member in group.members)
    assert any(group.kind == "head" for group in groups) == (kind is Biased)
    removed = {group.name: tuple(range(group.units // 2)) for group in groups}
    slim = prune(module, groups, Plan(removed, "macs", "MACs", 1.0, 1.0, 1.0)).model
    assert_written(slim, tmp_path / "slim.onnx", 1 if fixed else 3)
    for trained in (copy.deepcopy(module), slim):  # training changes every parameter
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=draw)).add_(0.01)
        assert_written(trained, tmp_path / "trained.onnx", 1 if fixed else 3)


class AsStrided(Block):
    """A lookup of all numbers in their order, as the newer exporter writes some views."""

    def between(self, y: Tensor, x: Tensor) -> Tensor:
        n, rest = y.shape[0], y[0].numel()
        places = torch.arange(n)[:, None] * rest + torch.arange(24 * 8 * 8)
        return y.reshape(-1)[places.reshape(-1, 24, 8, 8)]


def test_a_lookup_of_all_numbers_in_their_order_is_a_view(tmp_path: Path) -> None:
    module = read_onnx(export(AsStrided, tmp_path / "net.onnx", torch.randn(2, 3, 16, 16), {0: "n"}))
    assert not any(step.operator == "Gather" for step in module.steps)
    example = torch.randn(1, 3, 16, 16)
    names = [group.name for group in find_groups(module, example, classifier_names(module, example)).groups]
    assert any("inner" in name for name in names)


class Probable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(100 * super().forward(x) - 50)[:, None]


def test_outputs_of_a_sigmoid_are_held_against_one(tmp_path: Path) -> None:
    module = read_file(export(Probable, tmp_path / "net.onnx", torch.randn(2, 3, 16, 16), {0: "n"}))
    assert least_scales(module) == [1.0]
    small = torch.tensor([1e-5])
    assert relative_difference(small * 1.01, small.numpy()) > 1e-3
    assert relative_difference(small * 1.01, small.numpy(), 1.0) < 1e-6


class Last(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


def test_a_layout_that_no_size_tells_is_given(tmp_path: Path) -> None:
    axes = {0: "n", 1: "h", 2: "w", 3: "c"}
    path = export(Last, tmp_path / "net.onnx", torch.randn(2, 16, 16, 3), axes)
    name = str(path)
    assert not read_ports(name).channels_last
    assert read_ports(name, "nhwc").channels_last
    module = read_file(path, {"image": (16, 16, 3)}, channels_last=True)
    module.write_onnx(tmp_path / "same.onnx", {LAYOUT: LAST, "input_size": "[3, 16, 16]"})
    images = torch.randn(2, 3, 16, 16)
    session = open_session(tmp_path / "same.onnx", "cpu")
    with torch.no_grad():
        expected = module(images).numpy()
    for array in (images, images.permute(0, 2, 3, 1)):
        np.testing.assert_allclose(session.predict(array), expected, atol=1e-5)
