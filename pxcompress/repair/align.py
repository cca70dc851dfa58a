"""A few hundred steps towards what the dense model computes at every layer, where least squares has seen one at a time.

The loss is the mean, over all layers that lost inputs, of the squared error of their outputs over the variance that
these have in the dense model, and the divergence of the predictions beside it: no labels. Errors that have added up
over the layers are undone by all of them together (as block-wise alignment does, https://arxiv.org/abs/2606.01126).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.layout.consumers import consumers
from pxcompress.layout.rows import rows_first
from pxcompress.registry import option
from pxcompress.repair import REPAIRS
from pxcompress.repair.finetune import FineTune, Followed
from pxcompress.types import Pruned


@REPAIRS.register("align")
@dataclass(frozen=True)
class Align(FineTune):
    """AdamW towards the dense model's outputs of all layers that lost inputs; what does best held out is kept."""

    temperature: float = option(1.0, "what both models' logits are divided by", low=0.1, high=100.0, log=True)
    steps: int = option(200, "steps of the optimiser", low=1, high=1_000_000, log=True)
    features: float = option(
        1.0, "weight of the layers' squared error, over their variance, beside the divergence", low=0.0, high=1000.0
    )

    def _followed(self, pruned: Pruned, example: Tensor) -> Followed:
        return LayerOutputs(pruned)


class LayerOutputs(Followed):
    """What the layers of a slim model that lost inputs give, and what the same layers of the dense one do."""

    def __init__(self, pruned: Pruned) -> None:
        self._dense: dict[str, Tensor] = {}
        self._slim: dict[str, Tensor] = {}
        for layer in consumers(pruned):
            layer.slim.register_forward_hook(_keep(self._slim, layer.name))
            layer.dense.register_forward_hook(_keep(self._dense, layer.name, layer.outputs))

    def error(self) -> Tensor:
        """Mean over layers of the mean squared difference of their outputs, over its mean in the dense model."""
        errors = []
        for name, dense in self._dense.items():
            spread = (dense - dense.mean((0, 2), keepdim=True)).square().mean()
            errors.append((self._slim[name] - dense).square().mean() / spread.clamp_min(1e-12))
        return torch.stack(errors).mean()


def _keep(values: dict[str, Tensor], name: str, rows: Tensor | None = None) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that keeps what a layer gives, as (n, rows, positions)."""

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        value = rows_first(output, module).float()
        values[name] = value if rows is None else value[:, rows.to(value.device)]

    return keep
