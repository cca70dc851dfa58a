"""TensorRT engines for the NVIDIA GPU of this machine, built from the ONNX file by NVIDIA's package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from pxcompress.deploy.converters import CONVERTERS, Predict, Source, as_arrays, explain_missing
from pxcompress.deploy.hardware import explain_missing_gpu
from pxcompress.deploy.session import Array
from pxcompress.errors import ModelError


@CONVERTERS.register("tensorrt")
@dataclass(frozen=True)
class TensorRt:
    """A TensorRT engine in the types of the ONNX file.

    It runs only on this kind of GPU and this version of TensorRT.
    """

    title: ClassVar[str] = "TensorRT"
    package: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".engine"
    round_to: ClassVar[int] = 8  # float16 widths that are no multiple of 8 are reformatted; int8 ones go by 16
    reads_onnx: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-2  # TF32

    def explain_failure(self) -> str:
        """Why the package tensorrt or a GPU is missing; "" if both work."""
        return explain_missing("tensorrt", self.package) or explain_missing_gpu()

    def convert(self, source: Source, path: Path) -> None:
        """Build an engine for inputs of this batch size, and write it to `path`.

        Raises `ModelError` if TensorRT does not take the file.
        """
        import tensorrt

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(source.onnx)):
            raise ModelError(f"TensorRT cannot read {source.onnx.name}: {parser.get_error(0).desc()}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for name, value in source.inputs.items():
            profile.set_shape(name, *[tuple(value.shape)] * 3)
        config.add_optimization_profile(profile)
        if (engine := builder.build_serialized_network(network, config)) is None:
            raise ModelError(f"TensorRT builds no engine of {source.onnx.name} on this GPU; its log says why")
        path.write_bytes(bytes(engine))

    def open(self, path: Path) -> Predict:
        """The engine as a function that predicts on this machine's GPU.

        Raises `ModelError` if it was built elsewhere.
        """
        import tensorrt

        engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ModelError(
                f"{path.name} was built for another GPU or another version of TensorRT than {tensorrt.__version__}; "
                "convert on the machine that it is for"
            )
        return _make_predictor(engine, engine.create_execution_context(), tensorrt.TensorIOMode.INPUT)


def _make_predictor(engine: Any, context: Any, is_input: Any) -> Predict:
    """A function that runs an engine on a batch of inputs."""
    names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    made = [name for name in names if engine.get_tensor_mode(name) != is_input]

    def predict(inputs: Mapping[str, Array]) -> list[Array]:
        batch = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
        for name, value in batch.items():
            context.set_input_shape(name, tuple(value.shape))
        outputs = {name: torch.empty(tuple(context.get_tensor_shape(name)), device="cuda") for name in made}
        for name, tensor in {**batch, **outputs}.items():
            context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return as_arrays(tuple(outputs.values()))

    return predict
