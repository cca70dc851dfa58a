"""A search for the smallest MLPs that fit the cubist spiral: many tiny nets trained at once, from random weights.

All hidden widths up to 8 each would be 512 nets; the search takes those with at most `MOST` hidden units in all, with
several initialisations each. Nets are masked copies of one of width 8: one batched matrix product a layer.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pxcompress.demo.spiral import spiral_arrays

LEVELS = (0.95, 0.995)
KNOWN = {0.95: (3, 3, 3), 0.995: (7, 3, 3)}
"""Level -> smallest hidden widths known to reach it from random initialisation, METHODS of the paper."""

WIDEST = 8
MOST, FEWEST = 12, 7
"""Hidden units in all."""

BATCH, LEARNING_RATE = 128, 0.02
KEPT = 4
"""One net in so many is trained to the end, for as many times the first steps."""

Widths = tuple[int, ...]


def search(quick: bool = False) -> dict[str, Any]:
    """The smallest widths that reached each level, and what was tried."""
    start = time.perf_counter()
    inits, steps = (2, 400) if quick else (3, 600)
    sizes = [
        widths
        for widths in itertools.product(range(2, WIDEST + 1), repeat=3)
        if FEWEST <= sum(widths) <= (8 if quick else MOST)
    ]
    widths_of_nets = [widths for widths in sizes for _ in range(inits)]
    points, labels = (torch.from_numpy(array) for array in spiral_arrays())
    best = _train(widths_of_nets, (points, labels), steps)
    smallest: dict[str, Any] = {}
    for level in LEVELS:
        reached = [widths for widths, value in best.items() if value >= level]
        least = min(reached, key=sum, default=None)
        smallest[str(level)] = least and {"widths": least, "units": sum(least), "accuracy": best[least]}
    return {
        **smallest,
        "nets": len(widths_of_nets),
        "sizes": len(sizes),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _train(widths_of_nets: list[Widths], data: tuple[Tensor, Tensor], steps: int) -> dict[Widths, float]:
    """Widths -> accuracy of their best net. After a first part the better quarter of each total goes on."""
    generator = torch.Generator().manual_seed(0)
    nets = _Nets([_drawn(widths, generator) for widths in widths_of_nets])
    losses = nets.fit(data, steps, generator)
    going = []
    for total in sorted({sum(widths) for widths in widths_of_nets}):
        here = [place for place, widths in enumerate(widths_of_nets) if sum(widths) == total]
        going += sorted(here, key=lambda place: float(losses[place]))[: max(1, len(here) // KEPT)]
    nets = nets.taken(going)
    nets.fit(data, KEPT * steps, generator)
    best: dict[Widths, float] = {}
    for place, value in zip(going, nets.accuracy(data).tolist(), strict=True):
        best[widths_of_nets[place]] = max(value, best.get(widths_of_nets[place], 0.0))
    return best


def _drawn(widths: Widths, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of one net, PyTorch's usual draw; units beyond its widths are zero, and stay so."""
    ends = (2, *widths, 1)
    full = (2, WIDEST, WIDEST, WIDEST, 1)
    drawn = []
    for inputs, outputs, rows, columns in zip(ends[:-1], ends[1:], full[:-1], full[1:], strict=True):
        for shape, used in (((rows, columns), (inputs, outputs)), ((1, columns), (1, outputs))):
            values = torch.zeros(shape)
            values[: used[0], : used[1]] = (2 * torch.rand(used, generator=generator) - 1) / math.sqrt(inputs)
            drawn.append(values)
    return drawn


class _Nets:
    """Many MLPs at once: parameters are stacked, (nets, inputs, outputs) and (nets, 1, outputs)."""

    def __init__(self, drawn: list[list[Tensor]]) -> None:
        self.parameters = [torch.stack(values).requires_grad_() for values in zip(*drawn, strict=True)]

    def taken(self, places: list[int]) -> _Nets:
        """Those at `places`."""
        return _Nets([[values[place].detach() for values in self.parameters] for place in places])

    def logits(self, points: Tensor) -> Tensor:
        """Of the second class, for points (n, 2): (nets, n)."""
        values = points.expand(len(self.parameters[0]), -1, -1)
        for place in range(0, len(self.parameters), 2):
            values = torch.baddbmm(self.parameters[place + 1], values, self.parameters[place])
            if place < len(self.parameters) - 2:
                values = values.relu()
        return values[..., 0]

    def fit(self, data: tuple[Tensor, Tensor], steps: int, generator: torch.Generator) -> Tensor:
        """Train all nets on the same batches; returns their mean losses over the last tenth of the steps, (nets,)."""
        points, labels = data
        optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE, fused=True)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, cycle_momentum=False)
        last = torch.zeros(len(self.parameters[0]))
        for step in range(steps):
            batch = torch.randint(len(points), (BATCH,), generator=generator)
            logits = self.logits(points[batch])
            target = labels[batch].float().expand_as(logits)
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            cycle.step()
            if step >= 0.9 * steps:
                last += losses.detach()
        return last

    def accuracy(self, data: tuple[Tensor, Tensor]) -> Tensor:
        """Share of the points on the right side, (nets,)."""
        points, labels = data
        right = torch.zeros(len(self.parameters[0]))
        with torch.no_grad():
            for part, truth in zip(points.split(5000), labels.split(5000), strict=True):
                right += ((self.logits(part) > 0) == truth.bool()).float().sum(1)
        return right / len(points)
