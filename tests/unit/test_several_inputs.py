"""Models of several inputs: from factories to files by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from command import Px
from torch import Tensor, nn

import pxcompress
from pxcompress.data.factory import open_factory
from pxcompress.errors import DataError
from pxcompress.models.signature import MASK
from pxcompress.models.tokens import IDS


class TwoInputs(nn.Module):
    """An image and the number of its place, looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.place = nn.Conv2d(3, 16, 3, padding=1), nn.Embedding(5, 16)
        self.hidden, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, picture: Tensor, place: Tensor) -> Tensor:
        return self.head(self.hidden(self.image(picture).relu().mean((2, 3)) + self.place(place)).relu())


def two_inputs() -> nn.Module:
    torch.manual_seed(0)
    return TwoInputs()


def _pictures() -> list[tuple[object, int]]:
    rng = np.random.default_rng(0)
    return [
        ({"picture": rng.standard_normal((3, 6, 6), np.float32), "place": np.int64(n % 5)}, n % 3) for n in range(120)
    ]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module of a user's, `mine`, with factories."""
    mine = SimpleNamespace(two_inputs=two_inputs, by_name=_pictures)
    mine.by_place = lambda: [(tuple(inputs.values()), label) for inputs, label in _pictures()]
    mine.ragged = lambda: [({IDS: np.arange(1, 3 + n % 4), MASK: np.ones(2 + n % 4, int)}, n % 2) for n in range(40)]
    mine.uneven = lambda: [({IDS: np.arange(4), MASK: np.ones(3, int)}, 0)] * 4
    mine.other_names = lambda: [({"a": np.ones(3)}, 0), ({"b": np.ones(3)}, 1)]
    mine.huge = lambda: [({"ids": np.full(3, 2**25)}, 0), ({"ids": np.ones(3, int)}, 1)]
    monkeypatch.setitem(sys.modules, "mine", mine)  # type: ignore[arg-type]
    return mine


def test_factories_may_give_several_inputs(module: SimpleNamespace) -> None:
    data = open_factory("mine:by_name")
    assert data.native_size == (3 * 36 + 1,)
    assert [(each.name, each.shape, each.dtype) for each in data.inputs] == [
        ("picture", (3, 6, 6), torch.float32),
        ("place", (), torch.int64),
    ]
    assert [each.name for each in open_factory("mine:by_place").inputs] == [0, 1]
    ragged = open_factory("mine:ragged")
    assert ragged.native_size == (2, 5)
    assert ragged.train.read.values[0].tolist() == [[1, 2, 0, 0, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("uneven", "its inputs have lengths input_ids: 4, attention_mask: 3"),
        ("other_names", "item 1: its inputs are b; expected a"),
        ("huge", "whole numbers from 1 to 33554432"),
    ],
)
def test_inputs_that_do_not_fit_each_other_are_named(name: str, told: str, module: SimpleNamespace) -> None:
    with pytest.raises(DataError, match=told):
        open_factory(f"mine:{name}")


@pytest.mark.slow
def test_several_inputs_go_the_whole_way(module: SimpleNamespace, tmp_path: Path, px: Px) -> None:
    out = tmp_path / "run"
    run = px("run", "--model", "mine:two_inputs", "--data", "mine:by_place", "--ratio", 0.5, "--out", out, "--json")
    assert run.code == 0, run.err
    session = ort.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(port.name, port.type) for port in session.get_inputs()] == [
        ("picture", "tensor(float)"),
        ("place", "tensor(int64)"),
    ]
    picture, place = torch.randn(4, 3, 6, 6), torch.arange(4)
    (output,) = session.run(None, {"picture": picture.numpy(), "place": place.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(output, pxcompress.load(out)(picture, place), atol=1e-4)
