"""Make trained vision models physically smaller, and prove it.

    from pxcompress import Recipe, compress
    report = compress(Recipe(model="resnet50", ratio=0.5))

Names are resolved on first use: importing the package loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pxcompress.errors import InputError, PxError, ResultError
    from pxcompress.own_module import compress_module
    from pxcompress.pipeline import compress
    from pxcompress.recipe import Recipe
    from pxcompress.report.record import Report
    from pxcompress.run_folder.saved import load

_HOMES = {
    "InputError": "errors",
    "PxError": "errors",
    "Recipe": "recipe",
    "Report": "report.record",
    "ResultError": "errors",
    "compress": "pipeline",
    "compress_module": "own_module",
    "load": "run_folder.saved",
}

__all__ = [
    "InputError",
    "PxError",
    "Recipe",
    "Report",
    "ResultError",
    "__version__",
    "compress",
    "compress_module",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"pxcompress.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pxcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
