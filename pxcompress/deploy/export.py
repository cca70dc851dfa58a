"""A PyTorch model written as an ONNX file."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from pxcompress.errors import InputError, ModelError
from pxcompress.models.adapter import Adapter, named_outputs
from pxcompress.models.outputs import by_name
from pxcompress.onnx_in import OnnxModule
from pxcompress.proof import Artifact
from pxcompress.state import device_of, evaluating

OPSET = 20
"""Version of ONNX's operators. Gelu is one operator; attention is MatMul and Softmax, which all providers run. From
opset 23 on attention is one `Attention` node, which some GPU builds of ONNX Runtime leave to the CPU."""

INPUT, OUTPUT = "input", "logits"


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    metadata: Mapping[str, str],
    *,
    batch: int | None = None,
    output_name: str = OUTPUT,
) -> Artifact:
    """Write `model` in eval mode, float32, as ONNX for any batch, or for one of `batch`; returns what was written.

    `example` is one input or several, shape (n, ...). The file's input is "input"; a single output is `output_name`,
    several have the names of `models.outputs.by_name`. Its metadata_props are `metadata` and nothing else; source paths
    and stack traces that the exporter leaves in the nodes are removed. Weights above 1.5 GiB go to `<path>.data` beside
    it. The file appears whole or not at all. The exporter has folded constants, and every BatchNorm that follows a
    convolution into it; a BatchNorm elsewhere stays a node. What onnxslim 0.1 still finds is nothing in CNNs, and in a
    ViT 36 of 455 nodes, for 1 to 2 % of p50.
    A model that was read from an ONNX file is written back into that file's graph, with its names and opset instead.
    `model` is left as it was. Raises `ModelError` when it cannot be exported.
    """
    if isinstance(model, OnnxModule):
        with on_cpu(model):
            model.write_onnx(path, metadata, batch)
        return artifact_of(path)
    inputs = torch.cat([example[:1]] * (batch or 2)).detach().cpu()  # batch 1 would be taken for a constant
    with on_cpu(model):
        names = list(_check_outputs(model, inputs, output_name))
        program = _export(FlatOutputs.of(model, names, output_name), inputs, names, dynamic=batch is None)
    if batch is None:
        _check_batch_is_dynamic(program.model)
    _strip(program.model)
    program.model.metadata_props.update(metadata)
    _write(program, path)
    return artifact_of(path)


def onnx_files(path: Path) -> tuple[Path, ...]:
    """The ONNX file and the files beside it that hold its weights, if any."""
    return _files(path, onnx.load(path, load_external_data=False))


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file and the weights beside it."""
    return sum(file.stat().st_size for file in onnx_files(path))


def read_metadata(path: Path) -> dict[str, str]:
    """What an ONNX file says about itself."""
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def artifact_of(path: Path) -> Artifact:
    """The `Artifact` that describes an exported file; size and hash cover the weights beside it."""
    proto = onnx.load(path, load_external_data=False)
    files = _files(path, proto)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    return Artifact(
        path=path,
        opset=next(entry.version for entry in proto.opset_import if entry.domain == ""),
        input_shape=tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims),
        bytes=sum(file.stat().st_size for file in files),
        sha256=digest.hexdigest(),
    )


def _files(path: Path, proto: onnx.ModelProto) -> tuple[Path, ...]:
    entries = chain.from_iterable(tensor.external_data for tensor in proto.graph.initializer)
    locations = {entry.value for entry in entries if entry.key == "location"}
    for location in locations:
        if Path(location).name != location:  # it may come from elsewhere, and is read and copied
            raise InputError(f"{str(path)!r} keeps weights in {location!r}, which is not beside it; give another file")
    return (path, *(path.parent / location for location in sorted(locations)))


@contextmanager
def on_cpu(model: nn.Module) -> Iterator[None]:
    """`model` on the CPU in eval mode without gradients; put back on exit."""
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        try:
            if device.type != "cpu":
                model.cpu()
            yield
        finally:
            if device.type != "cpu":
                model.to(device)


class FlatOutputs(nn.Module):
    """A model whose outputs are a tuple of tensors, which is what the exporter can name."""

    def __init__(self, model: nn.Module, names: Sequence[str], only: str) -> None:
        super().__init__()
        self.model, self._names, self._only = model, tuple(names), only

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], only: str) -> nn.Module:
        """`model`, wrapped where it returns more than one plain tensor."""
        return model if list(names) == [only] and not isinstance(model, Adapter) else cls(model, names, only)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of their names."""
        outputs = self.model.outputs_(inputs) if isinstance(self.model, Adapter) else self.model(inputs)
        outputs_by_name = by_name(outputs, self._only)
        return tuple(outputs_by_name[name] for name in self._names)


def _check_outputs(model: nn.Module, inputs: Tensor, only: str) -> Mapping[str, Tensor]:
    """The outputs by name. Raises `ModelError` where there are none with a batch."""
    try:
        outputs = named_outputs(model, inputs, only)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        shape = tuple(inputs.shape)
        raise ModelError(f"model does not run on an input of shape {shape}: {_get_first_line(error)}") from error
    if not outputs:
        raise ModelError(
            f"model returns no tensor ({len(inputs)}, ...) for {len(inputs)} inputs; expected at least one"
        )
    return outputs


@contextmanager
def _silence() -> Iterator[None]:
    """No prints, log lines and warnings of the exporter; what goes wrong is raised as an exception anyway."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(level)


@contextmanager
def _flat_attention() -> Iterator[None]:
    """`F.scaled_dot_product_attention` with all leading axes as one: the exporter has it for (n, heads, ...) only."""
    attention = F.scaled_dot_product_attention

    def flat(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
    ) -> Any:
        if query.dim() <= 4:
            return attention(query, key, value, attn_mask, *args, **options)
        lead = query.shape[:-3]
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-3:]).flatten(0, -4)
        q, k, v = (part.expand(*lead, *part.shape[-3:]).flatten(0, -4) for part in (query, key, value))
        return attention(q, k, v, attn_mask, *args, **options).unflatten(0, lead)

    F.scaled_dot_product_attention = flat
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def _export(model: nn.Module, inputs: Tensor, names: Sequence[str], *, dynamic: bool) -> Any:
    """The exporter's program (its `.model` is an `onnx_ir.Model`)."""
    try:
        with _silence(), _flat_attention():
            return torch.onnx.export(
                model,
                (inputs,),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(names),
                dynamic_shapes=_any_batch(model) if dynamic else None,
                opset_version=OPSET,
                verbose=False,
            )
    except RuntimeError as error:  # the exporter's own errors are RuntimeErrors
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"model cannot be exported: {type(cause).__name__}: {_get_first_line(cause)}") from error


def _any_batch(model: nn.Module) -> tuple[Any, ...]:
    """The input's sizes for the exporter: any batch. A forward(*args) has its input in a tuple."""
    sizes = {0: torch.export.Dim("batch")}
    parameter = next(iter(inspect.signature(model.forward).parameters.values()))
    return ((sizes,),) if parameter.kind is parameter.VAR_POSITIONAL else (sizes,)


def _check_batch_is_dynamic(model: onnx_ir.Model) -> None:
    for output in model.graph.outputs:
        if output.shape is not None and isinstance(output.shape[0], int):
            raise ModelError(
                f"model cannot be exported: its output {output.name!r} has a fixed batch of {output.shape[0]}; "
                "its forward uses a number where it should use the input's batch size, such as reshape(2, -1)"
            )


def _strip(model: onnx_ir.Model) -> None:
    """Remove metadata and doc strings everywhere, in place."""
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def _write(program: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        program.save(Path(folder) / path.name)  # external data by itself where the weights need it
        try:
            onnx.checker.check_model(str(Path(folder) / path.name))
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"model cannot be exported: the result is not valid ONNX: {_get_first_line(error)}"
            ) from error
        onnx_file, *weights = onnx_files(Path(folder) / path.name)
        for file in (*weights, onnx_file):  # the file that names the others comes last
            os.replace(file, path.parent / file.name)


def _get_first_line(error: BaseException) -> str:
    """The first line of the message, without terminal colours."""
    lines: Sequence[str] = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
