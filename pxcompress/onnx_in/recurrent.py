"""ONNX's LSTM and GRU by PyTorch's layers; no unit of them is removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.onnx_in.operators.table import Settings, Unsupported

GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
"""Position, in ONNX, of each of PyTorch's gates: ONNX has i o f c and z r h, PyTorch i f g o and r z n."""


class Recurrent(nn.Module):
    """An LSTM or GRU as in ONNX: (time, n, features) -> Y (time, directions, n, hidden) and the last states."""

    def __init__(self, kind: str, node: Settings, weights: Sequence[Tensor | None]) -> None:
        super().__init__()
        _, inner, own, bias, _ = (*weights, *[None] * 5)[:5]
        self.directions = 2 if node.get("direction", "forward") == "bidirectional" else 1
        _check(kind, node, inner is not None and own is not None)
        assert inner is not None
        assert own is not None
        layer = nn.LSTM if kind == "LSTM" else nn.GRU
        self.layer = layer(
            inner.shape[-1], node["hidden_size"], bias=bias is not None, bidirectional=self.directions == 2
        )
        with torch.no_grad():
            for direction in range(self.directions):
                ending = "_l0_reverse" if direction else "_l0"
                parts = {"weight_ih": inner[direction], "weight_hh": own[direction]}
                if bias is not None:
                    parts |= dict(zip(("bias_ih", "bias_hh"), bias[direction].chunk(2), strict=True))
                for name, value in parts.items():
                    gates = value.chunk(len(GATES[kind]))
                    getattr(self.layer, f"{name}{ending}").copy_(torch.cat([gates[place] for place in GATES[kind]]))

    def weights_in_file(self) -> list[Tensor]:
        """The weights as ONNX's inputs W, R, and B if there is a bias, (directions, gates x hidden, ...)."""
        kinds = [("weight_ih",), ("weight_hh",), ("bias_ih", "bias_hh")][: 3 if self.layer.bias else 2]
        endings = ("_l0", "_l0_reverse")[: self.directions]
        return [
            torch.stack([torch.cat([self._in_file_order(f"{part}{ending}") for part in parts]) for ending in endings])
            for parts in kinds
        ]

    def _in_file_order(self, name: str) -> Tensor:
        """A weight of the layer, with its gates reordered as in ONNX."""
        order = GATES["LSTM" if isinstance(self.layer, nn.LSTM) else "GRU"]
        gates = getattr(self.layer, name).detach().cpu().chunk(len(order))
        return torch.cat([gates[order.index(place)] for place in range(len(order))])

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, ...]:
        if h is not None and not h.requires_grad and not bool(h.any()) and (c is None or not bool(c.any())):
            h = None  # zeros, of whatever batch the file was made for
        state: Any = None
        if h is not None:
            state = (h, torch.zeros_like(h) if c is None else c) if isinstance(self.layer, nn.LSTM) else h
        y, last = self.layer(x, state)
        y = y.unflatten(-1, (self.directions, -1)).transpose(1, 2)
        return (y, *last) if isinstance(last, tuple) else (y, last)


def _check(kind: str, node: Settings, has_weights: bool) -> None:
    """Raise `Unsupported` for options that PyTorch's layer does not have."""
    odd = [name for name in ("activations", "clip", "input_forget", "layout") if node.get(name)]
    if node.get("direction") == "reverse":
        odd.append("direction=reverse")
    if kind == "GRU" and not node.get("linear_before_reset"):
        odd.append("linear_before_reset=0")
    if not has_weights:
        odd.append("computed weights")
    if odd:
        raise Unsupported(f"{kind} with {', '.join(odd)}")
