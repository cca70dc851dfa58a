"""A sample of `benchmarks/zoo.txt`, cut down in depth and width; the whole list is in benchmarks/results/zoo.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
from models import CLASSES, extreme_plan, random_plan, randomised

from pxcompress.cost.count import macs_meter
from pxcompress.graph import find_groups, prune, removal_error
from pxcompress.models.loading import classifier_names
from pxcompress.models.rewrite import rewrite_plain
from pxcompress.state import seeded

ROOT = Path(__file__).parents[2]

SAMPLE: Mapping[str, Mapping[str, object]] = {
    "swin_tiny_patch4_window7_224": {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "edgenext_xx_small": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "heads": (2, 2, 2, 2)},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 1},
    "cait_xxs24_224": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 4},
    "tnt_s_legacy_patch16_224": {"img_size": 32, "embed_dim": 24, "inner_dim": 12, "depth": 2, "num_heads_outer": 4},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "mambaout_femto": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 16)},
    "efficientvit_m0": {
        "img_size": 64,
        "embed_dim": (8, 8, 16),
        "depth": (1, 1, 1),
        "num_heads": (2, 2, 2),
        "key_dim": (4, 4, 4),
    },
}


@pytest.mark.parametrize("name", SAMPLE)
def test_most_of_the_model_can_go_exactly(name: str) -> None:
    with seeded(0):
        model = rewrite_plain(randomised(timm.create_model(name, num_classes=CLASSES, **SAMPLE[name])).eval())
        inputs = torch.randn(2, 3, *([SAMPLE[name].get("img_size", 32)] * 2))
    groups = find_groups(model, inputs[:1], classifier_names(model, inputs[:1])).groups
    macs = macs_meter(model, groups, inputs[:1])
    assert macs({group.name: 1 for group in groups}) < 0.75 * macs({})
    for plan in (random_plan(groups, 0), extreme_plan(groups)):
        assert removal_error(prune(model, groups, plan), inputs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "edgenext_xx_small",
        "pvt_v2_b0",
        "cs3darknet_s",
        "maxvit_pico_rw_256",
        "convnextv2_atto",
        "mambaout_femto",
        "skresnet18",
    ],
)
def test_models_of_the_zoo_go_the_whole_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    zoo = __import__("zoo")
    try:
        row = zoo.examine(name, zoo.listed()[name], False)
    finally:
        sys.modules.pop("zoo")
    assert row["failure"] == ""
    assert row["removable_macs"] > 0.5


def test_the_list_names_models_that_exist() -> None:
    lines = [line.split() for line in (ROOT / "benchmarks" / "zoo.txt").read_text().splitlines() if line[:1] != "#"]
    names = [name for name, _ in lines]
    assert len(names) == len(set(names)) >= 70
    assert all(":" in name or timm.is_model(name) for name in names)
    assert all(size == "-" or int(size) >= 28 for _, size in lines)
