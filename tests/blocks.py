"""Building blocks of random networks: each takes and returns feature maps (n, channels, height, width)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import EcaModule, SqueezeExcite, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

Step = Callable[[nn.Module, Tensor], Tensor]


def conv(before: int, after: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


class Block(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, step: Step, **layers: nn.Module) -> None:
        super().__init__()
        self.step = step
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def maps(t: Tensor, like: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(len(t), -1, *like.shape[2:])


def _self_attention(s: Any, x: Tensor) -> Tensor:
    t = tokens(x)
    return maps(t + s.attention(t, t, t)[0], x)


def _fused_attention(s: Any, x: Tensor) -> Tensor:
    t = s.norm(tokens(x))
    q, k, v = s.qkv(t).reshape(*t.shape[:2], 3, s.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
    return x + maps(s.proj(out), x)


class FusedAttention(Block):
    num_heads = 2
    scale = 0.5


def _set_border(s: Any, x: Tensor) -> Tensor:
    y = s.a(x).clone()
    y[:, :, 0] = 0
    return y


def _shuffled(s: Any, x: Tensor) -> Tensor:
    y = F.relu(s.a(x))
    return s.b(y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def _highway(s: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(s.gate(x))
    return gate * F.relu(s.a(x)) + (1 - gate) * x


def _size_switch(s: Any, x: Tensor) -> Tensor:
    return s.a(x) if x.shape[-1] < 100 else s.b(x)


def _partial(s: Any, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([F.relu(s.a(x[:, :half])), x[:, half:]], 1)


def _chunked(s: Any, x: Tensor) -> Tensor:
    left, right = s.a(x).chunk(2, 1)
    return s.b(torch.cat([left, F.relu(right)], 1))


def _gated_pairs(s: Any, x: Tensor) -> Tensor:
    value, gate = s.a(x).chunk(2, 1)
    return s.b(value * torch.sigmoid(gate))


def _cbam(s: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(s.a(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


def _coordinates(s: Any, x: Tensor) -> Tensor:
    place = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand(len(x), 1, *x.shape[2:])
    return s.a(torch.cat([place, x], 1))


def _recurrent(s: Any, x: Tensor) -> Tensor:
    return maps(s.lstm(tokens(x))[0], x)


def _reshuffled_pixels(s: Any, x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pixel_shuffle(s.a(x), 2), 2)


def _checkpointed(s: Any, x: Tensor) -> Tensor:
    return x + checkpoint(s.body, x, use_reentrant=False)


BLOCKS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "convolution": lambda a, b: nn.Sequential(conv(a, b), nn.ReLU()),
    "batch norm": lambda a, b: nn.Sequential(conv(a, b, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)),
    "instance norm": lambda a, b: nn.Sequential(conv(a, b), nn.InstanceNorm2d(b, affine=True), nn.GELU()),
    "group norm": lambda a, b: nn.Sequential(conv(a, b), nn.GroupNorm(2, b), nn.SiLU()),
    "prelu": lambda a, b: nn.Sequential(conv(a, b), nn.PReLU(b)),
    "depthwise": lambda a, b: nn.Sequential(conv(a, a, groups=a), nn.ReLU(), conv(a, b, 1)),
    "multiplier": lambda a, b: nn.Sequential(conv(a, 2 * a, groups=a), nn.BatchNorm2d(2 * a), conv(2 * a, b, 1)),
    "grouped": lambda a, b: nn.Sequential(conv(a, b, groups=2), nn.ReLU(), conv(b, b, groups=2)),
    "residual": lambda a, b: Block(lambda s, x: x + s.b(F.relu(s.a(x))), a=conv(a, b), b=conv(b, a)),
    "in place": lambda a, b: Block(lambda s, x: s.b(s.a(x).relu_()).add_(x), a=conv(a, b), b=conv(b, a)),
    "dense": lambda a, b: Block(lambda s, x: torch.cat([x, F.relu(s.a(x))], 1), a=conv(a, b)),
    "two branches": lambda a, b: Block(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), a=conv(a, b, 1), b=conv(a, b)),
    "squeeze": lambda a, b: nn.Sequential(conv(a, b), SqueezeExcite(b, rd_channels=4)),
    "gate": lambda a, b: Block(lambda s, x: s.a(x) * torch.sigmoid(s.g(x)), a=conv(a, b), g=conv(a, 1)),
    "highway": lambda a, b: Block(_highway, a=conv(a, a), gate=conv(a, a, 1)),
    "narrow highway": lambda a, b: Block(_highway, a=conv(a, a), gate=conv(a, 1, 1)),
    "cbam": lambda a, b: Block(_cbam, a=conv(2, 1)),
    "gate along channels": lambda a, b: nn.Sequential(conv(a, b), EcaModule(kernel_size=3)),
    "chunk": lambda a, b: Block(_chunked, a=conv(a, 2 * b), b=conv(2 * b, b, 1)),
    "gated pairs": lambda a, b: Block(_gated_pairs, a=conv(a, 2 * b), b=conv(b, b, 1)),
    "partial": lambda a, b: Block(_partial, a=conv(a // 2, a // 2)),
    "shuffle": lambda a, b: Block(_shuffled, a=conv(a, 12, 1, groups=2), b=conv(12, b, 1, groups=2)),
    "softmax": lambda a, b: Block(lambda s, x: s.b(s.a(x).softmax(1)), a=conv(a, b), b=conv(b, b, 1)),
    "shared": lambda a, b: Block(lambda s, x: F.relu(s.a(F.relu(s.a(x)))), a=conv(a, a)),
    "scale": lambda a, b: Scaled(a, b),
    "coordinates": lambda a, b: Block(_coordinates, a=conv(a + 1, b)),
    "transposed": lambda a, b: nn.Sequential(nn.ConvTranspose2d(a, b, 2, 2), nn.ReLU(), nn.AvgPool2d(2)),
    "resampled": lambda a, b: nn.Sequential(nn.MaxPool2d(2), conv(a, b), nn.Upsample(scale_factor=2)),
    "pixel shuffle": lambda a, b: Block(_reshuffled_pixels, a=conv(a, 4 * b)),
    "channels last": lambda a, b: Block(
        lambda s, x: x + s.b(F.gelu(s.a(s.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
        norm=nn.LayerNorm(a),
        a=nn.Linear(a, 2 * b),
        b=nn.Linear(2 * b, a),
    ),
    "attention": lambda a, b: Block(_self_attention, attention=nn.MultiheadAttention(a, 2, batch_first=True)),
    "fused attention": lambda a, b: FusedAttention(
        _fused_attention, norm=nn.LayerNorm(a), qkv=nn.Linear(a, 3 * a), proj=nn.Linear(a, a)
    ),
    "encoder": lambda a, b: Block(
        lambda s, x: maps(s.e(tokens(x)), x), e=nn.TransformerEncoderLayer(a, 2, 2 * b, batch_first=True)
    ),
    "recurrent": lambda a, b: Block(_recurrent, lstm=nn.LSTM(a, b, batch_first=True)),
    "weight norm": lambda a, b: nn.Sequential(parametrizations.weight_norm(conv(a, b)), nn.ReLU()),
    "spectral norm": lambda a, b: nn.Sequential(parametrizations.spectral_norm(conv(a, b)), nn.ReLU()),
    "hooked": lambda a, b: nn.Sequential(weight_norm(conv(a, b)), nn.ReLU(), spectral_norm(conv(b, b))),
    "standardised": lambda a, b: nn.Sequential(StdConv2d(a, b, 3, padding=1), nn.ReLU()),
    "checkpointed": lambda a, b: Block(_checkpointed, body=nn.Sequential(conv(a, b), nn.ReLU(), conv(b, a))),
    "border": lambda a, b: Block(_set_border, a=conv(a, b)),
    "size switch": lambda a, b: Block(_size_switch, a=conv(a, b), b=conv(a, b, 5)),
    "dropout": lambda a, b: nn.Sequential(conv(a, b), nn.Dropout(0.5), nn.ReLU()),
    "auxiliary": lambda a, b: Auxiliary(a, b),
}


class Scaled(nn.Module):
    """A scale for every channel that belongs to no layer."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.a, self.scale = conv(before, after), nn.Parameter(torch.rand(1, after, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x)) * self.scale


class Auxiliary(nn.Module):
    """A layer that runs in training mode only."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.a, self.extra, self.unused = conv(before, after), conv(before, after), nn.Linear(after, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.extra(x) if self.training else self.a(x)


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Opaque:
    def __init__(self, value: Tensor) -> None:
        self.value = value


OUTPUTS: Mapping[str, Callable[[Tensor, Tensor], Any]] = {
    "logits": lambda x, logits: logits,
    "features": lambda x, logits: (logits, x),
    "a mask": lambda x, logits: {"logits": logits, "mask": x > 0},
    "whole numbers": lambda x, logits: [logits, logits.argmax(1), x.mean((2, 3)).argmax(1)],
    "complex numbers": lambda x, logits: (logits, torch.fft.fft(logits)),
    "a record": lambda x, logits: Answer(logits, x.mean((2, 3))),
    "an object": lambda x, logits: (logits, Opaque(x)),
}


class Network(nn.Module):
    """A stem, blocks, and a classifier; what comes out is wrapped as `output` says."""

    def __init__(self, names: list[str], output: str, draw: random.Random) -> None:
        super().__init__()
        width = 8
        self.stem, steps = conv(3, width), []
        for name in names:
            after = draw.choice([8, 12, 16])
            step = BLOCKS[name](width, after)
            with torch.no_grad():
                width = step.eval()(torch.zeros(1, width, 8, 8)).shape[1]
            steps.append(step)
        self.blocks, self.head, self.output = nn.ModuleList(steps), nn.Linear(width, 5), output

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return OUTPUTS[self.output](x, self.head(F.relu(x).mean((2, 3))))
