"""Small networks that learn `glyphs` in minutes: `--model benchmarks.models:vgg_small` from the repository's root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torchvision
from timm.layers import HybridEmbed
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pxcompress.recipe import ModelAndData
from pxcompress.workload import Workload, load_workload, with_baseline

GLYPH_MODELS: Mapping[str, str] = {
    "VGG": "benchmarks.models:vgg_small",
    "ResNet": "resnet10t",
    "bottleneck": "benchmarks.models:resnet_bottleneck",
    "MobileNet": "benchmarks.models:mobilenet_small",
    "ViT": "benchmarks.models:vit_hybrid",
}
"""Label in a table -> what `--model` takes."""

WIDTHS = (32, "M", 64, "M", 96, 96, "M", 128, 128, "M")
INVERTED = [["ds_r1_k3_s1_c16"], ["ir_r2_k3_s2_e6_c24"], ["ir_r2_k3_s1_e6_c40"], ["ir_r2_k3_s2_e6_c80"]]
STEM = (24, "M", 48, "M", 64, 64)


def subject_of(label: str, seed: int = 0) -> Workload:
    """The model with weights for `glyphs`, or the net for `dna`, trained here or read from the cache; and the data."""
    model, data = ("pxcompress.demo.nets:dna_cnn", "dna") if label == "DNA" else (GLYPH_MODELS[label], "glyphs")
    return with_baseline(load_workload(ModelAndData(model, data=data, seed=seed)), seed, print)


def convolutions(widths: Sequence[int | str], *, bias: bool) -> nn.Sequential:
    """A 3 x 3 convolution, BatchNorm and ReLU for every width; "M" halves the image."""
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


class SmallVGG(nn.Module):
    """Convolution, BatchNorm, ReLU, as VGG has them, without its 4096 wide dense layers; 32 pixels."""

    def __init__(self, num_classes: int = 40) -> None:
        super().__init__()
        self.features = convolutions(WIDTHS, bias=True)
        self.pre_logits = nn.Sequential(nn.Linear(4 * 128, 256), nn.ReLU(inplace=True))
        self.head = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pre_logits(torch.flatten(self.features(x), 1)))


def vgg_small(num_classes: int = 40) -> nn.Module:
    """Six convolutions and two dense layers, 0.6 million parameters."""
    return SmallVGG(num_classes)


def resnet_bottleneck(num_classes: int = 40) -> nn.Module:
    """timm's ResNet of eight bottleneck blocks, 1.6 million parameters."""
    return ResNet(
        Bottleneck,
        (2, 2, 2, 2),
        num_classes=num_classes,
        stem_width=24,
        stem_type="deep_tiered",
        avg_down=True,
        channels=(24, 48, 96, 160),
    )


def mobilenet_small(num_classes: int = 40) -> nn.Module:
    """Seven inverted bottlenecks with depthwise convolutions, as MobileNetV2 has them, 0.3 million parameters."""
    return EfficientNet(
        decode_arch_def([*INVERTED, ["ir_r1_k3_s1_e6_c112"]]),
        num_classes=num_classes,
        num_features=384,
        stem_size=24,
        fix_stem=True,
        act_layer=nn.ReLU6,
    )


def vit_hybrid(num_classes: int = 40) -> nn.Module:
    """timm's ViT of 64 tokens, 4 blocks, 4 heads, width 96, behind four convolutions; 0.5 million parameters.

    With patches instead of convolutions it stays at chance on `glyphs` for as long as this takes to reach 95 %; with
    LayerScale its MLPs stay near nothing.
    """
    return VisionTransformer(
        img_size=32,
        patch_size=1,
        embed_dim=96,
        depth=4,
        num_heads=4,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
        embed_layer=partial(HybridEmbed, convolutions(STEM, bias=False)),
    )


def vit_deep(num_classes: int = 40) -> nn.Module:
    """timm's ViT of 16 tokens, 6 blocks, 4 heads, width 128, behind two convolutions; 1.2 million parameters.

    With so little in front of it its MLPs matter: they have to make the features that `vit_hybrid` gets.
    """
    return VisionTransformer(
        img_size=32,
        patch_size=2,
        embed_dim=128,
        depth=6,
        num_heads=4,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
        embed_layer=partial(HybridEmbed, convolutions((24, "M", 48, "M"), bias=False)),
    )


class CSP(nn.Module):
    """Half of the channels run through bottlenecks, and every step of the way is read at the end, as in YOLO's C2f."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.enter, self.leave = unit(inputs, outputs, 1), unit(half * (2 + depth), outputs, 1)
        self.steps = nn.ModuleList(nn.Sequential(unit(half, half, 3), unit(half, half, 3)) for _ in range(depth))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(step(parts[-1]) + parts[-1] if self.shortcut else step(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Detector(nn.Module):
    """A detector in the shape of a YOLO: CSP backbone, a neck that goes down and up again, heads at three strides.

    Returns (n, 4 * 16 + classes, positions): distributions over box sides and class logits at every position.
    """

    def __init__(self, num_classes: int = 80, width: int = 32, depth: int = 1) -> None:
        super().__init__()
        a, b, c, d = (width * factor for factor in (2, 4, 8, 16))
        self.stem = nn.Sequential(unit(3, width, 3, 2), unit(width, a, 3, 2), CSP(a, a, depth, shortcut=True))
        self.low = nn.Sequential(unit(a, b, 3, 2), CSP(b, b, 2 * depth, shortcut=True))
        self.middle = nn.Sequential(unit(b, c, 3, 2), CSP(c, c, 2 * depth, shortcut=True))
        self.high = nn.Sequential(unit(c, d, 3, 2), CSP(d, d, depth, shortcut=True))
        self.down = nn.ModuleList([CSP(d + c, c, depth, shortcut=False), CSP(c + b, b, depth, shortcut=False)])
        self.strided = nn.ModuleList([unit(b, b, 3, 2), unit(c, c, 3, 2)])
        self.up = nn.ModuleList([CSP(b + c, c, depth, shortcut=False), CSP(c + d, d, depth, shortcut=False)])
        self.boxes = nn.ModuleList(detecting(inputs, max(16, b // 4), 4 * 16) for inputs in (b, c, d))
        self.classes = nn.ModuleList(detecting(inputs, max(b, num_classes), num_classes) for inputs in (b, c, d))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(self.stem(x))
        middle = self.middle(low)
        high = self.high(middle)
        first = self.down[0](torch.cat([nn.functional.interpolate(high, scale_factor=2.0), middle], 1))
        fine = self.down[1](torch.cat([nn.functional.interpolate(first, scale_factor=2.0), low], 1))
        medium = self.up[0](torch.cat([self.strided[0](fine), first], 1))
        coarse = self.up[1](torch.cat([self.strided[1](medium), high], 1))
        levels = zip((fine, medium, coarse), self.boxes, self.classes, strict=True)
        return torch.cat([torch.cat([boxes(of), classes(of)], 1).flatten(2) for of, boxes, classes in levels], 2)


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    """Convolution, BatchNorm, SiLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


def detecting(inputs: int, width: int, outputs: int) -> nn.Module:
    """A head of a detector at one stride."""
    return nn.Sequential(unit(inputs, width, 3), unit(width, width, 3), nn.Conv2d(width, outputs, 1))


def torchvision_vit(num_classes: int = 40) -> nn.Module:
    """torchvision's Vision Transformer, whose attention is nn.MultiheadAttention, for inputs of 64 pixels."""
    return torchvision.models.VisionTransformer(64, 16, 12, 3, 192, 768, num_classes=num_classes)
