"""Imports point one way: a module may use what stands before it in the line, never what comes after."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pxcompress

ROOT = Path(pxcompress.__file__).parent

LINE = (
    ("errors", "types", "state", "interrupts", "elimination", "notes"),
    ("registry", "checks", "guard", "cache", "proof", "layout", "processes"),
    ("choices",),
    ("passes", "certify", "model_and_data", "onnx_in"),
    ("models",),
    ("tasks",),
    ("deploy",),
    ("data", "graph", "attribution"),
    ("demo", "agreement"),
    ("scorers", "cost", "repair", "clock"),
    ("budgets", "planning", "inspection", "exchange_rates"),
    ("recipe",),
    ("workload", "report", "run", "recipe_file"),
    ("run_folder", "temperature"),
    ("stages", "explain"),
    ("pipeline",),
    ("sweep", "search"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
PLACE = {name: place for place, names in enumerate(LINE) for name in names}
DOORS = {
    "torch_pruning": {"graph"},
    "onnxruntime": {"deploy"},
    "openvino": {"deploy"},
    "zennit": {"attribution"},
    "optuna": {"search"},
}


def _room(path: Path) -> str:
    """The part of the package a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in ROOT.rglob("*.py") if _room(path) != "__init__")


def test_every_room_has_its_place() -> None:
    assert {_room(path) for path in FILES} == set(PLACE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    here = _room(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "pxcompress" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] == here or PLACE[parts[1]] < PLACE[here], f"{here} imports {name}"
        if parts[0] in DOORS:
            assert here in DOORS[parts[0]], f"{here} imports {name}; its door is {DOORS[parts[0]]}"


def test_the_product_reaches_demo_by_name_alone() -> None:
    outside = [path for path in FILES if _room(path) != "demo"]
    assert not [path for path in outside if any(name.startswith("pxcompress.demo") for name in _imports(path))]


def test_public_names_resolve() -> None:
    for name in pxcompress.__all__:
        assert getattr(pxcompress, name) is not None
    with pytest.raises(AttributeError):
        pxcompress.nothing  # noqa: B018
