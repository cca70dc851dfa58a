"""OpenVINO on the CPU: from the package openvino, which need not be installed; int8 by the package nncf."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from pxcompress.deploy.backends import BACKENDS, Backend, CannotOpen
from pxcompress.deploy.quiet import capture_output, shorten_message
from pxcompress.deploy.session import Array, Port, Session
from pxcompress.proof import Placement
from pxcompress.types import Batches

if TYPE_CHECKING:
    from pxcompress.deploy.int8 import Judge, QuantisedFile


@BACKENDS.register("openvino")
@dataclass(frozen=True)
class OpenVino(Backend):
    """OpenVINO on the CPU; it computes float32 models in float32, also on processors with bfloat16."""

    title: ClassVar[str] = "OpenVINO"

    @property
    def version(self) -> str:
        """Name and version of the package openvino."""
        try:
            return f"openvino-{importlib.metadata.version('openvino')}"
        except importlib.metadata.PackageNotFoundError:
            return "openvino, not installed"

    def get_device(self, provider: str) -> str:
        """ "cpu", for every provider of OpenVINO."""
        return "cpu"

    def explain_failure(self, provider: str) -> str:
        """Why the package openvino cannot be imported; "" if it can."""
        try:
            import openvino  # noqa: F401
        except ModuleNotFoundError:
            return "the package openvino is not installed (pip install openvino)"
        except ImportError as error:
            return f"the package openvino does not work: {shorten_message(str(error))}"
        return ""

    def quantise(self, source: Path, path: Path, batches: Batches, judge: Judge) -> QuantisedFile:
        """Write an int8 file in QDQ form, quantised by NNCF, which suits OpenVINO best."""
        from pxcompress.deploy.nncf_int8 import quantise_by_nncf

        return quantise_by_nncf(source, path, batches, judge)

    def open(self, source: Path | bytes, provider: str, threads: int) -> OpenVinoSession:
        """The model of an ONNX file, compiled for one call at a time."""
        import openvino

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": "1",
            "ENABLE_CPU_PINNING": "NO",  # beside other work a call waits for its core: 6 times as long by p50
        }
        try:
            with capture_output():
                core = openvino.Core()
                model = core.read_model(source if isinstance(source, bytes) else str(source))
                compiled_model = core.compile_model(model, "CPU", {**options, "INFERENCE_NUM_THREADS": threads})
            proto = (
                onnx.load_from_string(source)
                if isinstance(source, bytes)
                else onnx.load(source, load_external_data=False)
            )
            inputs, outputs = (
                tuple(_make_port(port) for port in of) for of in (compiled_model.inputs, compiled_model.outputs)
            )
        except (RuntimeError, ValueError, TypeError, DecodeError) as error:
            raise CannotOpen(shorten_message(str(error))) from error
        nodes = len(proto.graph.node)  # it has kernels for all of them, or refuses the file
        return OpenVinoSession(
            path=Path("model") if isinstance(source, bytes) else source,
            placement=Placement(provider, "OpenVINO-CPU", nodes, nodes, options={"version": self.version, **options}),
            inputs=inputs,
            outputs=outputs,
            threads=threads,
            metadata={entry.key: entry.value for entry in proto.metadata_props},
            _compiled=compiled_model,
        )


@dataclass(frozen=True, eq=False)
class OpenVinoSession(Session):
    """A compiled model of OpenVINO."""

    _compiled: Any

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """The outputs for one batch."""
        results = self._compiled.create_infer_request().infer(dict(feed))
        return [np.array(results[place]) for place in range(len(self.outputs))]

    def bind_feed(self, feed: Mapping[str, Array]) -> Callable[[], None]:
        """A function that runs the model once on `feed`, which is read without a copy."""
        import openvino

        request = self._compiled.create_infer_request()
        for name, array in feed.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def call() -> None:
            request.infer(share_outputs=True)

        call()
        return call


def _make_port(port: Any) -> Port:
    """Name, shape and type of an input or output of an OpenVINO model."""
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    return Port(port.get_any_name(), shape, np.dtype(port.get_element_type().to_dtype()))
