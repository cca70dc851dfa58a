"""Nets as ONNX files of the older exporter, and graphs by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune
from pxcompress.models.loading import classifier_names
from pxcompress.onnx_in import OnnxModule
from pxcompress.types import Plan, Pruned


class Plain(nn.Module):
    """Convolutions with a residual, BatchNorm left as it is behind an activation, a flatten, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.out = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 16, 1)
        self.norm, self.first, self.head = nn.BatchNorm2d(24), nn.Linear(16 * 16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = x + F.pad(self.out(self.norm(F.relu(self.inner(x)))), (1, 1, 1, 1))
        x = F.avg_pool2d(x, 4)
        return self.head(F.gelu(self.first(x.flatten(1)))).softmax(-1)


class Attending(nn.Module):
    """Tokens, an attention of four heads with one layer for queries, keys and values, and a chunked gate."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.qkv, self.proj = (
            nn.Conv2d(3, 32, 8, 8),
            nn.LayerNorm(32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
        )
        self.gate, self.back, self.head = nn.Linear(32, 48), nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        weights = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        a, b = self.gate(x).chunk(2, -1)
        return self.head((x + self.back(a * torch.sigmoid(b))).mean(1))


class Dense(nn.Module):
    """Two outputs, the first an image as large as the input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, 2, 1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.inner, self.outer = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1)
        self.map, self.count = nn.Conv2d(8, 2, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.down(x))
        return torch.sigmoid(self.map(F.relu(self.outer(F.relu(self.inner(self.up(x))))))), self.count(x.mean((2, 3)))


def export(kind: Callable[[], nn.Module], path: Path, opset: int = 17, **options: Any) -> Path:
    """A net with random weights as a file of the older exporter, with odd names and any batch."""
    torch.manual_seed(0)
    net = kind().eval()
    outputs = ["score/1:0", "second"][: 2 if kind is Dense else 1]
    names = {"pixels:0": {0: "N"}, **{name: {0: "N"} for name in outputs}}
    arguments = {"dynamic_axes": names, "input_names": ["pixels:0"], "output_names": outputs, **options}
    inputs = arguments.pop("inputs", torch.randn(2, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (inputs,), path, dynamo=False, opset_version=opset, **arguments)
    proto = onnx.load(path)
    proto.metadata_props.add(key="author", value="someone")
    onnx.save(proto, path)
    return path


def halved(module: OnnxModule) -> Pruned:
    """The module without the first half of every group."""
    example = next(iter(module.source.example.values()))[:1]
    groups = find_groups(module, example, classifier_names(module, example)).groups
    removed = {group.name: tuple(range(group.units // 2)) for group in groups}
    return prune(module, groups, Plan(removed, "macs", "MACs", 1.0, 1.0, 1.0))


def make_proto(*nodes: Any, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = {node.domain for node in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def make_node(kind: str, *inputs: str, **options: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs) or ["x"], ["y"], **options)
