"""A user's own data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_layouts import COUNT, batches_by_id, error_of

from pxcompress.data import open_source
from pxcompress.types import Preprocessing

FACTORIES = """
import numpy as np, torch
from torch.utils.data import Dataset

X = np.arange(30 * 12, dtype=np.float32).reshape(30, 3, 2, 2)

class Own(Dataset):
    def __len__(self): return 30
    def __getitem__(self, index): return torch.from_numpy(X[index % 30]), index % 3

def classes(): return Own()
def masks(): return [(x, np.full((2, 2), i % 4)) for i, x in enumerate(X)]
def numbers(): return ((x, float(i)) for i, x in enumerate(X))
def labels(): return [(x, [i % 2, 1, 0]) for i, x in enumerate(X)]
def unlabelled(): return iter(X)
def halves(): return {"val": [(x, 0) for x in X[20:]], "train": [(x, 1) for x in X[:20]]}

def broken(): raise KeyError("no such file")
def ending(): raise SystemExit(0)
def ending_late(): return (exit(1) for _ in range(3))
def nothing(): return None
def empty(): return []
def ragged(): return [X[0], X[0][:2]]
def ragged_targets(): return [(X[0], [1.0]), (X[0], [1.0, 2.0])]
def texts(): return [("a", 1)]
def text_targets(): return [(X[0], "cat")]
def holes(): return [(X[0], 1.0), (X[0], float("nan"))]
def other_size(): return [(X[0], np.zeros((3, 2), int))]
def some_targets(): return [(X[0], 1), X[0]]
def strange_keys(): return {"trian": []}
def negative(): return [(X[0], -1), (X[1], 1)]
not_callable = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """Name of a module of factories in the current folder, another one for each test."""
    monkeypatch.chdir(tmp_path)
    name = f"factories_{abs(hash(tmp_path))}"
    Path(f"{name}.py").write_text(FACTORIES)
    return name


@pytest.mark.parametrize(
    ("layout", "classes", "target_of"),
    [
        ("classes", ("0", "1", "2"), lambda i: i % 3),
        ("masks", ("0", "1", "2", "3"), lambda i: [[i % 4] * 2] * 2),
        ("numbers", ("0",), lambda i: [float(i)]),
        ("labels", ("0", "1", "2"), lambda i: [float(i % 2), 1.0, 0.0]),
        ("unlabelled", (), lambda i: 0),
    ],
)
def test_factories(factories, layout, classes, target_of):
    source = open_source(f"{factories}:{layout}")
    assert (source.layout, source.classes, source.outputs) == (layout, classes, len(classes) or None)
    assert source.native_size == (3, 2, 2)
    targets = batches_by_id(source, Preprocessing((3, 2, 2)))
    assert len(targets) == COUNT
    for name, target in targets.items():
        assert target.tolist() == target_of(int(name.partition("/")[2]))
        assert target.dtype == (torch.float32 if layout in ("numbers", "labels") else torch.int64)


def test_factory_with_halves(factories):
    source = open_source(f"{factories}:halves")
    assert set(source.train.labels) == {1}
    assert set(source.held_out.labels) == {0}
    assert all(name.startswith("val/") for name in source.held_out.ids)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("broken", "calling it failed: KeyError"),
        ("ending", "calling it failed: RuntimeError: it ends the process with exit code 0"),
        ("ending_late", "item 0 of all: reading it failed: RuntimeError: it ends the process with exit code 1"),
        ("nothing", "returned a NoneType; expected an iterable"),
        ("empty", "returned no items"),
        ("ragged", "item 1: inputs have shapes (3, 2, 2) and (2, 2, 2)"),
        ("ragged_targets", "item 1: targets have shapes (1,) and (2,)"),
        ("texts", "a str holds no numbers"),
        ("text_targets", "a str holds no numbers"),
        ("holes", "item 1: its target holds NaN"),
        ("other_size", "masks are 3x2, their inputs 2x2"),
        ("some_targets", "only 1 of 2 items have targets"),
        ("strange_keys", "'trian'"),
        ("negative", "class -1"),
        ("not_callable", "is a int; expected a callable"),
        ("classses", "did you mean classes"),
    ],
)
def test_bad_factories(factories, factory, expected):
    assert expected in error_of(f"{factories}:{factory}")


def test_factory_without_a_module(factories):
    assert "importing 'no_such_module' failed" in error_of("no_such_module:data")
