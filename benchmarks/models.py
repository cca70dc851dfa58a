"""Small networks for benchmarks on `glyphs`, as `--model benchmarks.models:vgg_small` from the repository's root."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

WIDTHS = (32, "M", 64, "M", 96, 96, "M", 128, 128, "M")


class SmallVGG(nn.Module):
    """Convolution, BatchNorm, ReLU, as VGG has them, without its 4096 wide dense layers; 32 pixels."""

    def __init__(self, num_classes: int = 36) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pre_logits = nn.Sequential(nn.Linear(4 * channels, 256), nn.ReLU(inplace=True))
        self.head = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pre_logits(torch.flatten(self.features(x), 1)))


def vgg_small(num_classes: int = 36) -> nn.Module:
    """Six convolutions and two dense layers, 0.6 million parameters."""
    return SmallVGG(num_classes)


def vit_small(num_classes: int = 36) -> nn.Module:
    """timm's ViT with patches of 4 x 4: 64 tokens, 4 blocks, 4 heads, width 64, 0.2 million parameters."""
    return VisionTransformer(
        img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, mlp_ratio=4, num_classes=num_classes
    )
