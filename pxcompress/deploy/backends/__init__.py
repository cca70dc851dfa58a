"""Runtimes that run exported models. One file a runtime; it registers itself under each of its providers.

    @BACKENDS.register("my-runtime")
    @dataclass(frozen=True)
    class MyRuntime(Backend):
        title, version = "My Runtime", "my-runtime-1.0"
        def get_device(self, provider): ...           # "cpu" or "cuda"
        def explain_failure(self, provider): ...      # why it cannot run on this machine; "" where it can
        def open(self, source, provider, threads): ...  # a `deploy.session.Session` with its `run` and `bind_feed`

A file in this folder is found by itself, and `--provider my-runtime` chooses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor, nn

from pxcompress.deploy.export import ANY_BATCH, OUTPUT, export_onnx, file_bytes
from pxcompress.deploy.session import Session
from pxcompress.errors import InputError
from pxcompress.proof import Artifact
from pxcompress.registry import Registry
from pxcompress.types import Batches, OpenAxes

if TYPE_CHECKING:
    from pxcompress.deploy.int8 import Judge, QuantisedFile


class Backend(Protocol):
    """A runtime: it writes a model as a file that it can run, opens such a file, and measures its size.

    Opening gives a `Session`, which predicts, and binds inputs for timed calls. Files are ONNX files, unless a backend
    that derives from this class says otherwise.
    """

    title: ClassVar[str]
    """Name of the runtime in messages."""

    @property
    def version(self) -> str:
        """Name and version of the runtime, which is part of the key of stored timings."""

    def get_device(self, provider: str) -> str:
        """Device that a provider runs on: "cpu" or "cuda"."""

    def explain_failure(self, provider: str) -> str:
        """Why `provider` does not work on this machine, in one line, with what to install; "" where it works."""

    def export(
        self,
        model: nn.Module,
        example: Tensor,
        path: Path,
        metadata: Mapping[str, str],
        *,
        axes: OpenAxes = ANY_BATCH,
        output_name: str = OUTPUT,
    ) -> Artifact:
        """Write `model` with open `axes`, as `export.export_onnx` does."""
        return export_onnx(model, example, path, metadata, axes=axes, output_name=output_name)

    def open(self, source: Path | bytes, provider: str, threads: int) -> Session:
        """Open a file, or its content, for runs on `provider` with this number of CPU threads.

        Raises `CannotOpen` with the runtime's reason in one line where it does not take the model.
        """

    def quantise(self, source: Path, path: Path, batches: Batches, judge: Judge) -> QuantisedFile:
        """Write the float32 file `source` as int8 to `path`, calibrated on `batches`, with no more loss than `judge`
        allows.

        The default is ONNX Runtime's quantisation, as a QDQ file.
        """
        from pxcompress.deploy.int8 import quantise

        return quantise(source, path, batches, judge)

    def size(self, path: Path) -> int:
        """Bytes of all files that have to be deployed, with the weights beside `path`."""
        return file_bytes(path)


class CannotOpen(InputError):
    """The runtime refuses a model; the message is its reason in one line."""


BACKENDS: Registry[Backend] = Registry("provider", "pxcompress.deploy.backends", Backend)
"""The registered backends; each is found by the names of its providers."""
