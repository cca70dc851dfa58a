"""Scores of tiny nets, worked out by hand."""

from __future__ import annotations

import torch
from models import batches_of
from torch import Tensor, nn

from pxcompress.graph import find_groups
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded


class CubedLogits(nn.Module):
    """Hidden units that are linear in the input, logits that are cubes of what is linear in them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)) ** 3


def test_integrated_gradients_are_means_over_midpoints() -> None:
    """One step: the gradient half-way, 3 (z / 2)^2 w, times the activation; the ends of the path do not count."""
    with seeded(0):
        net, inputs = CubedLogits().eval(), torch.randn(5, 4)
    (group,) = find_groups(net, inputs[:1], ["head"]).groups
    batches = batches_of(inputs, 2)
    labels = torch.cat([labels for _, labels in batches]) % 3
    scores = SCORERS.build("integrated-gradients:steps=1")(
        net, [group], [(part, part_labels % 3) for part, part_labels in batches]
    )
    with torch.no_grad():
        hidden = net.hidden(inputs)
        logits = net.head(hidden).gather(1, labels[:, None])
        expected = (hidden * 3 * (logits / 2).square() * net.head.weight[labels]).abs().mean(0)
    torch.testing.assert_close(scores[group.name], expected, rtol=1e-4, atol=1e-6)


def test_wifv_is_the_variance_times_the_squared_weights() -> None:
    """A unit that always says the same has none, however much it says."""
    with seeded(0):
        net, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(30, 4)
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 5
        hidden = net[:2](inputs).double()
    (group,) = find_groups(net, inputs[:1], ["2"]).groups
    scores = SCORERS.build("activation")(net, [group], batches_of(inputs, 7))[group.name].double()
    expected = hidden.var(0, correction=0) * net[2].weight.detach().double().square().sum(0)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)
    assert scores[2] < 1e-9
