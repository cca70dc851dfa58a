"""What runs with a certificate have in common, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from pxcompress.data import load_splits, open_source
from pxcompress.types import Batches, Preprocessing

SIZE = 16
PREPROCESSING = Preprocessing((3, SIZE, SIZE), (0.5,) * 3, (0.5,) * 3)


def train(model: nn.Module, batches: Batches) -> nn.Module:
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    for _ in range(60):
        for inputs, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model


def read_certificate(folder: Path) -> dict[str, object]:
    return json.loads((folder / "certificate.json").read_text())


def draw_roles(data: Path) -> dict[str, tuple[str, ...]]:
    """The ids of every role, as a run draws them."""
    return load_splits(open_source(str(data)), PREPROCESSING).ids
