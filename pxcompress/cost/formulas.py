"""Multiply-accumulates of operators that PyTorch's counter leaves out, and the names of those that nothing counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]

COMPARISON_OPERATORS = ("nms",)
"""Operators of other libraries that only compare and sort, so that no multiplications are missed."""

MULTIPLYING_PREFIXES = (
    "_fft",
    "linalg_",
    "cholesky",
    "lu_",
    "triangular_solve",
    "_cudnn_",
    "miopen_",
    "mkldnn_",
    "_thnn_fused",
)
"""Beginnings of the names of PyTorch operators that multiply a lot and have no formula here."""

ELEMENTWISE_OPERATORS = ("linalg_vector_norm", "linalg_cross")
"""Operators whose names match `MULTIPLYING_PREFIXES`, but which multiply no more than an element-wise operator."""


def _recurrent_layer(inputs: Shape, weight: Shape, recurrent: Shape, *args: Any, **kwargs: Any) -> int:
    """Operations of one LSTM layer as oneDNN runs it: both weights, once for every step of every sequence."""
    return 2 * prod(inputs[:-1]) * (prod(weight) + prod(recurrent))


def _recurrent(inputs: Shape, weights: list[Shape], *args: Any, **kwargs: Any) -> int:
    """Operations of all layers of a recurrent net, as a GPU library runs it."""
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) > 1)


def _trilinear(
    a: Shape, b: Shape, c: Shape, expand_a: list[int], expand_b: list[int], expand_c: list[int], *args: Any, **rest: Any
) -> int:
    """Operations of nn.Bilinear, a product of three tensors that are broadcast along each other's axes."""
    broadcast_shapes = []
    for shape, axes in ((a, expand_a), (b, expand_b), (c, expand_c)):
        sizes = list(shape)
        for axis in sorted(axes):
            sizes.insert(axis, 1)
        broadcast_shapes.append(sizes)
    return 2 * prod(max(sizes) for sizes in zip(*broadcast_shapes, strict=True))


def formulas() -> dict[Any, Callable[..., int]]:
    """Operator -> function from the shapes of its arguments to floating-point operations, two for a
    multiply-accumulate.
    """
    aten = torch.ops.aten
    table: dict[Any, Callable[..., int]] = {
        aten.mkldnn_rnn_layer: _recurrent_layer,
        aten._cudnn_rnn: _recurrent,
        aten.miopen_rnn: _recurrent,
        aten.mv: lambda matrix, vector, **kwargs: 2 * prod(matrix),
        aten.addmv: lambda bias, matrix, vector, **kwargs: 2 * prod(matrix),
        aten.dot: lambda a, b, **kwargs: 2 * prod(a),
        aten.vdot: lambda a, b, **kwargs: 2 * prod(a),
        aten._trilinear: _trilinear,
        aten._cdist_forward: lambda a, b, *args, **kwargs: 2 * prod(a) * b[-2],
    }
    if deformable := getattr(torch.ops.torchvision, "deform_conv2d", None):  # there where torchvision was imported
        table[deformable] = lambda x, weight, *args, out_shape, **kwargs: 2 * prod(out_shape) * prod(weight[1:])
    return table


class Uncounted(TorchDispatchMode):
    """Records operators that multiply but for which `counter`, which must be active around it, has no formula."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self.modules: dict[str, dict[str, None]] = {}  # operator -> paths of the modules that ran it, in order

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packet = func._overloadpacket
        if packet not in self._counter.flop_registry and self._multiplies(func):
            path = max(self._counter.mod_tracker.parents, key=lambda name: (name != "Global", len(name)))
            self.modules.setdefault(str(packet).removeprefix("aten."), {})[path] = None
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _multiplies(func: Any) -> bool:
        """Whether an operator may multiply: by its name, or since it is another library's and so unknown."""
        if func.namespace != "aten":
            return func.namespace not in ("prim", "prims", "profiler") and func._opname not in COMPARISON_OPERATORS
        return func._opname.startswith(MULTIPLYING_PREFIXES) and func._opname not in ELEMENTWISE_OPERATORS
