from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import Px
from torch import nn

from pxcompress.errors import InputError
from pxcompress.graph import find_groups
from pxcompress.planning.limits import Limits
from pxcompress.planning.selection import Selection
from pxcompress.types import Structure


class Residual(nn.Module):
    """A stream that two layers write, and one inner layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def structure_and_model() -> tuple[Structure, nn.Module]:
    model = Residual().eval()
    return find_groups(model, torch.randn(1, 3, 8, 8), ["head"]), model


@pytest.mark.parametrize(
    ("selection", "names", "reason"),
    [
        (Selection(), {"stem.0", "block.0"}, ""),
        (Selection(only=("block*",)), {"block.0"}, "not among --only"),
        (Selection(keep=("block*",)), {"stem.0"}, "among --keep"),
        (Selection(scope="inner"), {"block.0"}, "a residual stream, outside --scope inner"),
    ],
)
def test_what_is_left_out_is_fixed_with_the_reason(
    structure_and_model: tuple[Structure, nn.Module], selection: Selection, names: set[str], reason: str
) -> None:
    structure, model = structure_and_model
    left = selection.of(structure, model)
    assert {group.name for group in left.groups} == names
    added = left.fixed[len(structure.fixed) :]
    assert {layer.name for layer in added} == {group.name for group in structure.groups} - names
    assert {layer.reason for layer in added} <= {reason}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "outer"}, "unknown scope 'outer'"),
        ({"floors": ("block*",)}, "expected GLOB=SHARE"),
        ({"floors": ("block*=2",)}, "share from 0 to 1"),
    ],
)
def test_a_selection_that_is_none_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Selection(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["only", "keep", "floors"])
def test_a_glob_that_fits_nothing_is_refused(structure_and_model: tuple[Structure, nn.Module], option: str) -> None:
    glob = "layer9*=0.5" if option == "floors" else "layer9*"
    with pytest.raises(InputError, match=r"'layer9\*' fits no group; .* stem.0, block.0"):
        Selection(**{option: (glob,)}).of(*structure_and_model)  # type: ignore[arg-type]


def test_a_selection_that_leaves_nothing_says_what_holds_it(structure_and_model: tuple[Structure, nn.Module]) -> None:
    with pytest.raises(InputError, match=r"nothing may be removed: all 2 groups stay \(2 among --keep\)"):
        Selection(keep=("*",)).of(*structure_and_model)
    with pytest.raises(InputError, match=r"\(1 among --keep, 1 not among --only\)"):
        Selection(only=("block*",), keep=("block*",)).of(*structure_and_model)


@pytest.mark.parametrize("selection", [("--only", "layr*"), ("--keep", "*"), ("--floors", "layr*=0.5")])
def test_a_wrong_name_is_refused_before_anything_is_trained(px: Px, tmp_path: Path, selection: tuple[str, str]) -> None:
    command = ("run", "--model", "resnet10t", "--input-size", 32, "--ratio", 0.5, "--out", tmp_path / "run")
    outcome = px(*command, *selection)
    assert outcome.code == 2
    assert "weights" not in outcome.err
    assert not list(tmp_path.iterdir())


def test_floors_are_by_name(structure_and_model: tuple[Structure, nn.Module]) -> None:
    limits = Limits(min_keep=0.1, floors=Selection(floors=("block*=0.75",)).least)
    assert {group.name: limits.floor(group) for group in structure_and_model[0].groups} == {"stem.0": 2, "block.0": 24}
