"""What other ecosystems make of a slim model, each by its own converter. One file an ecosystem, which registers itself.

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
"""A batch of every input by its name, (n, ...) -> the outputs, in the order of the exported file's."""


@dataclass(frozen=True, eq=False)
class Source:
    """A slim model: as PyTorch module on the CPU in eval mode, and as ONNX file; `inputs` are one batch, (n, ...).

    `module` takes the inputs by place, in the order of their names, and returns a tensor or a tuple of them, in the
    order of the file's outputs. What an ONNX file takes in another layout or type is as the file has it for a
    converter that reads it.
    """

    module: nn.Module
    onnx: Path
    inputs: Mapping[str, Tensor]


class Converter(Protocol):
    """The way into another ecosystem."""

    title: ClassVar[str]
    """Name of the ecosystem in messages."""

    package: ClassVar[str]
    """What `pip install` takes to make the converter work."""

    suffix: ClassVar[str]
    """End of the name of what is written: a file or, for some, a folder."""

    round_to: ClassVar[int]
    """Widths are best multiples of this there."""

    reads_onnx: ClassVar[bool]
    """Whether it starts from the ONNX file, in whatever precision, and not from the module."""

    tolerance: ClassVar[float]
    """Largest difference to PyTorch that its arithmetic explains, as a share of the outputs' scale."""

    def explain_failure(self) -> str:
        """Why it does not work on this machine, in one line, with what to install; "" where it works."""

    def convert(self, source: Source, path: Path) -> None:
        """Write the model to `path`, for batches of the size of its `inputs`. Raises whatever the converter raises."""

    def open(self, path: Path) -> Predict | None:
        """The written model, ready to run here; None where its runtime does not run on this machine."""


CONVERTERS: Registry[Converter] = Registry("ecosystem", "pxcompress.deploy.converters")
"""Converters by the names of their ecosystems."""


def explain_missing(module: str, package: str) -> str:
    """Why `module` of `package` cannot be imported, with what installs it; "" where it can."""
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
    """What a PyTorch module returns, one tensor or several, as a list of arrays."""
    parts = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [part.detach().cpu().numpy() for part in parts if isinstance(part, Tensor)]
