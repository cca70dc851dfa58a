"""Converters of slim models for other ecosystems. One file an ecosystem, which registers itself.

    @CONVERTERS.register("my-target")
    @dataclass(frozen=True)
    class MyTarget:
        title, package, suffix, round_to = "My Target", "my-target", ".mine", 8
        reads_onnx, tolerance = False, 1e-3
        def explain_failure(self): ...           # why it does not work on this machine; "" where it does
        def convert(self, model, path): ...      # write the file
        def open(self, path): ...                # a function that predicts with it; None where its runtime is not here

A file in this folder is found by itself, and `pxcompress convert FOLDER --to my-target` chooses it. A converter is that
of the ecosystem: nothing is translated by hand here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor, nn

from pxcompress.deploy.quiet import capture_output, shorten_message
from pxcompress.deploy.session import Array
from pxcompress.registry import Registry

Predict = Callable[[Mapping[str, Array]], list[Array]]
"""A function from a batch of inputs by name, (n, ...) each, to the outputs in the order of the exported file."""


@dataclass(frozen=True, eq=False)
class Source:
    """A slim model to convert: a PyTorch module on the CPU in eval mode, its ONNX file, and `inputs`, one batch (n,
    ...).

    `module` takes the inputs by position, in the order of their names, and returns a tensor or a tuple of them, in the
    order of the file's outputs. For a converter that reads an ONNX file, `inputs` have the layout and types of that
    file.
    """

    module: nn.Module
    onnx: Path
    inputs: Mapping[str, Tensor]


class Converter(Protocol):
    """Converts a model to the file format of another ecosystem, such as TensorRT."""

    title: ClassVar[str]
    """Name of the ecosystem in messages."""

    package: ClassVar[str]
    """The argument of `pip install` for the converter's package."""

    suffix: ClassVar[str]
    """Ending of the name of the file, or for some converters the folder, that is written."""

    round_to: ClassVar[int]
    """Widths of layers run best there if they are multiples of this."""

    reads_onnx: ClassVar[bool]
    """Whether it converts the ONNX file, in any precision, instead of the PyTorch module."""

    tolerance: ClassVar[float]
    """Largest difference from PyTorch that the format's arithmetic explains, as a share of the outputs' scale."""

    def explain_failure(self) -> str:
        """Why it does not work on this machine, in one line with advice; "" if it works."""

    def convert(self, source: Source, path: Path) -> None:
        """Write the model to `path`, for batches of the size of its `inputs`. Raises whatever the converter raises."""

    def open(self, path: Path) -> Predict | None:
        """The written model as a function that predicts; None if its runtime does not run on this machine."""


CONVERTERS: Registry[Converter] = Registry("ecosystem", "pxcompress.deploy.converters", Converter)
"""Converters by the names of their ecosystems."""


def explain_missing(module: str, package: str) -> str:
    """Why `module` of the package cannot be imported, and how to install it; "" if it can."""
    try:
        with capture_output():
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        is_own = error.name is None or f"{module}.".startswith(f"{error.name}.")
        missing = "" if is_own else f", which needs {error.name},"
        return f"the package {package}{missing} is not installed (pip install {package})"
    except (ImportError, OSError, AttributeError) as error:
        return f"the package {package} does not work: {shorten_message(str(error))}; pip install -U {package}"
    return ""


def as_arrays(outputs: object) -> list[Array]:
    """The output of a PyTorch module, one tensor or several, as a list of arrays."""
    parts = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [part.detach().cpu().numpy() for part in parts if isinstance(part, Tensor)]
