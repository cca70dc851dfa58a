"""Architectures that pruning gets wrong easily: what they share is that zeroing a channel is not removing it, or that a
layer's width is also written down somewhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import timm
import torch
from models import CLASSES
from torch import Tensor, nn


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line")


class Uncopyable(nn.Module):
    """Holds a tensor that is not a leaf of the autograd graph: `copy.deepcopy` refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.cache = self.fc.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x))


class SeparateAttention(nn.Module):
    """Attention whose q, k and v are three layers: their rows are heads x dims, which a view fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.proj = nn.Linear(12, 12)
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        n, tokens, dim = x.shape
        q, k, v = (layer(x).reshape(n, tokens, 3, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim)
        x = x + self.proj(y)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(x.mean(1))


class Multihead(nn.Module):
    """nn.MultiheadAttention between linear layers, without a norm that would fix its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))).mean(1))


class Transposed(nn.Module):
    """A transposed convolution reads one group of channels and writes another."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.last = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.down(x))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Split(nn.Module):
    """Half of the channels goes through a further layer, then both halves are joined (as in CSPNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.branch = nn.Conv2d(4, 4, 1)
        self.join = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([left, torch.relu(self.branch(right))], dim=1)
        return self.head(torch.relu(self.join(x)).mean((2, 3)))


class PartialGate(nn.Module):
    """A gate over values of which a convolution reads a part: sizes that do not follow from any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (6, 4, 2)
        self.embed, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.fc1, self.conv, self.fc2 = nn.Linear(8, 12), nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Linear(6, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x)).permute(0, 2, 3, 1)
        gate, same, part = torch.split(self.fc1(x), self.sizes, -1)
        part = self.conv(part.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.fc2(torch.relu(gate) * torch.cat((same, part), -1))
        return self.head(x.mean((1, 2)))


class Shared(nn.Module):
    """One convolution used twice: its inputs and outputs are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))).mean((2, 3)))


class ChannelSoftmax(nn.Module):
    """A softmax over channels: each output depends on every channel, zero or gone is not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.mix = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.stem(x).softmax(1))).mean((2, 3)))


class ChannelMean(nn.Module):
    """A gate from the mean over channels (spatial attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.mix = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.mix(x * x.mean(1, keepdim=True))).mean((2, 3)))


class PReLUNet(nn.Module):
    """A learnt slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act, self.conv2 = nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.act(self.conv1(x))).mean((2, 3)))


class Shuffle(nn.Module):
    """Channel shuffle between grouped convolutions (ShuffleNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.first, self.second = nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 12, 1, groups=3)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        n, _, height, width = x.shape
        x = x.view(n, 3, 4, height, width).transpose(1, 2).reshape(n, 12, height, width)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


ODD: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "separate q, k, v": (SeparateAttention, (5, 6)),
    "nn.MultiheadAttention": (Multihead, (5, 6)),
    "transposed convolution": (Transposed, (3, 12, 12)),
    "chunk and concat": (Split, (3, 12, 12)),
    "split into the sizes of an attribute": (PartialGate, (3, 12, 12)),
    "shared layer": (Shared, (3, 12, 12)),
    "softmax over channels": (ChannelSoftmax, (3, 12, 12)),
    "mean over channels": (ChannelMean, (3, 12, 12)),
    "PReLU": (PReLUNet, (3, 12, 12)),
    "channel shuffle": (Shuffle, (3, 12, 12)),
    "attention pooling": (lambda: timm.create_model("test_vit3", img_size=32, num_classes=CLASSES), (3, 32, 32)),
    "weight standardisation": (lambda: timm.create_model("test_nfnet", num_classes=CLASSES), (3, 32, 32)),
    "talking heads": (
        lambda: timm.create_model(
            "cait_xxs24_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=CLASSES
        ),
        (3, 32, 32),
    ),
    "selective kernels": (
        lambda: timm.create_model("skresnet18", layers=(1, 1, 1, 1), num_classes=CLASSES),
        (3, 32, 32),
    ),
}
"""Builder and shape of one input."""
