"""Nets for embedded data: `--model pxcompress.demo.nets:dna_cnn --data dna`, `...:unet --data glyph-masks`."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise

import torch
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pxcompress.demo.notes import TOKENIZER


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; `widths` are those of the input, the hidden layers and the output."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for place, (inputs, outputs) in enumerate(pairwise(widths), 1):
            layers[f"fc{place}"] = nn.Linear(inputs, outputs)
            layers[f"act{place}"] = nn.ReLU()
        layers.popitem()
        super().__init__(layers)
        self.default_cfg = {"input_size": widths[:1]}


def spiral_mlp(num_classes: int = 2) -> nn.Module:
    """A net for points in the plane with three hidden layers of 64.

    One logit for each class (in the paper one for both).
    """
    return MLP((2, 64, 64, 64, num_classes))


class DNAConvNet(nn.Module):
    """Two 1-D convolutions as wide as a motif, with BatchNorm, max-pooling over the sequence, two dense layers."""

    def __init__(self, num_classes: int = 6) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (4, 200)}
        self.conv1 = nn.Conv1d(4, 48, 11, padding=5, bias=False)
        self.bn1 = nn.BatchNorm1d(48)
        self.act1 = nn.ReLU()
        self.pool1 = nn.MaxPool1d(4)
        self.conv2 = nn.Conv1d(48, 64, 5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm1d(64)
        self.act2 = nn.ReLU()
        self.pool2 = nn.AdaptiveMaxPool1d(1)
        self.fc = nn.Linear(64, 64)
        self.act3 = nn.ReLU()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.act1(self.bn1(self.conv1(x))))
        x = self.pool2(self.act2(self.bn2(self.conv2(x))))
        return self.head(self.act3(self.fc(x.flatten(1))))


def dna_cnn(num_classes: int = 6) -> nn.Module:
    """A convolutional net for sequences of 200 letters, one-hot (4, 200)."""
    return DNAConvNet(num_classes)


def _convolutions(channels: int, width: int) -> nn.Sequential:
    """Two 3 x 3 convolutions with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """A U-Net of four levels with BatchNorm, for images whose sides are multiples of 8.

    Ronneberger et al., https://arxiv.org/abs/1505.04597; upsampled by transposed convolutions.
    """

    def __init__(self, num_classes: int = 5, widths: tuple[int, ...] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 40, 40)}
        self.down = nn.ModuleList(_convolutions(*pair) for pair in pairwise((3, *widths)))
        self.pool = nn.MaxPool2d(2)
        upwards = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, width, 2, stride=2) for below, width in upwards)
        self.merge = nn.ModuleList(_convolutions(2 * width, width) for _, width in upwards)
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            maps.append(x)
        for up, merge, skipped in zip(self.up, self.merge, reversed(maps[:-1]), strict=True):
            x = merge(torch.cat([skipped, up(x)], 1))
        return self.head(x)


def unet(num_classes: int = 5) -> nn.Module:
    """A U-Net for images of 40 x 40 pixels that predicts a class for every pixel."""
    return UNet(num_classes)


def scene_cnn(num_classes: int = 10) -> nn.Module:
    """Six convolutions with BatchNorm and a linear layer, for images of 40 x 40 pixels."""
    return nn.Sequential(
        _make_strided((3, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2), (64, 96, 1), (96, 128, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, num_classes),
    )


def _make_strided(*steps: tuple[int, int, int]) -> nn.Sequential:
    """3 x 3 convolutions with BatchNorm and ReLU; each step is channels in, channels out and stride."""
    layers: list[nn.Module] = []
    for channels, width, stride in steps:
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def scene_vit(num_classes: int = 10) -> nn.Module:
    """timm's ViT of 100 tokens, 4 blocks, 4 heads, width 96, behind four convolutions, for images of 40 x 40 pixels."""
    stem = _make_strided((3, 24, 2), (24, 48, 1), (48, 64, 2), (64, 64, 1))
    return VisionTransformer(
        img_size=40,
        patch_size=1,
        embed_dim=96,
        depth=4,
        num_heads=4,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
        embed_layer=partial(HybridEmbed, stem),
    )


class NoteReader(nn.Module):
    """A small BERT: `depth` attention blocks with post-norm, a mean over tokens, and a linear layer."""

    def __init__(self, num_classes: int = 6, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.tokenizer = TOKENIZER
        self.words = nn.Embedding(TOKENIZER.vocabulary, width)
        self.places = nn.Embedding(TOKENIZER.longest, width)
        self.norm = nn.LayerNorm(width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (n, classes) for token ids (n, length); tokens whose mask is 0 are padding and do not count."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.places(places))
        x = self.blocks(x, src_key_padding_mask=attention_mask == 0)
        counts = attention_mask[..., None].to(x)
        return self.head((x * counts).sum(1) / counts.sum(1))


def note_reader(num_classes: int = 6) -> nn.Module:
    """A transformer of 3 blocks, 4 heads and width 64 for the data set `notes`."""
    return NoteReader(num_classes)
