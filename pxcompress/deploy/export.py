"""Writes a PyTorch model as an ONNX file."""

from __future__ import annotations

import builtins
import hashlib
import inspect
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from pxcompress.deploy.quiet import capture_output
from pxcompress.errors import InputError, ModelError, describe
from pxcompress.models.adapter import Adapter, named_outputs
from pxcompress.models.outputs import by_name
from pxcompress.models.signature import PACKING, Signature
from pxcompress.onnx_in import OnnxModule
from pxcompress.proof import Artifact
from pxcompress.state import device_of, evaluating
from pxcompress.types import OpenAxes

OPSET = 20
"""Version of the ONNX operators that exported files use.

It has Gelu as one operator; attention is MatMul and Softmax, which all providers run. From opset 23 on attention is one
`Attention` node, which some GPU builds of ONNX Runtime leave to the CPU.
"""

INPUT, OUTPUT = "input", "logits"

ANY_BATCH = OpenAxes()

_NOT_MODELS = ("torch.", "builtins", "abc")
"""Beginnings of the names of Python modules that contain no model code."""


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    metadata: Mapping[str, str],
    *,
    axes: OpenAxes = ANY_BATCH,
    output_name: str = OUTPUT,
) -> Artifact:
    """Write `model` in eval mode, float32, as ONNX whose `axes` are open; returns what was written.

    `example` is one input or more, shape (n, ...). The file's input is "input", or those that are packed there by
    name, texts of any length; a single output is `output_name`, several have the names of `models.outputs.by_name`.
    Its metadata_props are `metadata`, and how inputs are packed; source paths and stack traces that the exporter
    leaves in the nodes are removed. Weights above 1.5 GiB go to `<path>.data` beside it. The file appears whole or
    not at all. The exporter has folded constants, and every BatchNorm that follows a convolution into it; a BatchNorm
    elsewhere stays a node. What onnxslim 0.1 still finds is nothing in CNNs, and in a ViT 36 of 455 nodes, for 1 to 2
    % of p50.
    A model that was read from an ONNX file is written back into that file's graph, with its names and opset instead.
    `model` is left as it was. Raises `ModelError` when it cannot be exported.
    """
    if isinstance(model, OnnxModule):
        with on_cpu(model):
            model.write_onnx(path, {**metadata, **describe_packing(model)}, axes.batch)
        return _check_size_is_open(artifact_of(path), axes, channels_last=model.channels_last)
    inputs = torch.cat([example[:1]] * (axes.batch or 2)).detach().cpu()  # batch 1 would be taken for a constant
    with on_cpu(model):
        names = list(check_outputs(model, inputs, output_name))
        program = _export(ExportableModule.of(model, inputs, names, output_name), names, axes)
    if axes.batch is None:
        _check_batch_is_dynamic(program.model)
    _free_names(program.model)
    _strip(program.model)
    program.model.metadata_props.update({**metadata, **describe_packing(model)})
    _write(program, path)
    return _check_size_is_open(artifact_of(path), axes)


def onnx_files(path: Path) -> tuple[Path, ...]:
    """Paths of the ONNX file and of the files beside it with its weights, if any."""
    return _files(path, onnx.load(path, load_external_data=False))


def file_bytes(path: Path) -> int:
    """Size in bytes of an ONNX file and the weights beside it."""
    return sum(file.stat().st_size for file in onnx_files(path))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata_props of an ONNX file, by key."""
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def artifact_of(path: Path) -> Artifact:
    """Describe an exported file as an `Artifact`; size and hash include the weights beside it."""
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
    """A context in which `model` is on the CPU, in eval mode and without gradients; it is put back at the end."""
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        try:
            if device.type != "cpu":
                model.cpu()
            yield
        finally:
            if device.type != "cpu":
                model.to(device)


class _FlatOutputs(nn.Module):
    """Wraps a model so that it takes `inputs` one by one and returns a tuple, whose parts the exporter can name.

    A model that was read from an ONNX file returns the outputs of that file.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str | int], names: Sequence[str], only: str) -> None:
        super().__init__()
        self.model, self._inputs, self._names, self._only = model, tuple(inputs), tuple(names), only

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of their names."""
        values = dict(zip(self._inputs, inputs, strict=True))
        places = [value for name, value in values.items() if isinstance(name, int)]
        named = {name: value for name, value in values.items() if isinstance(name, str)}
        outputs = by_name(self._call(*places, **named), self._only)
        return tuple(outputs[name] for name in self._names)

    def _call(self, *places: Tensor, **named: Tensor) -> Any:
        if isinstance(self.model, OnnxModule):
            return self.model.file_outputs(*places, **named)
        return self.model.original_(*places, **named) if isinstance(self.model, Adapter) else self.model(*places)


@dataclass(frozen=True, eq=False)
class ExportableModule:
    """A module in the form that exporters take, with an example of every input by its name in the file.

    `is_open` says that the inputs share one length, which may vary. `nesting` is how many tuples the module's inputs
    are wrapped in.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    nesting: int = 1
    is_open: bool = False

    @classmethod
    def of(cls, model: nn.Module, inputs: Tensor, outputs: Sequence[str], only: str) -> ExportableModule:
        """Prepare `model` for export; it is taken as it is if it takes and returns a single tensor."""
        named = named_inputs(model, inputs)
        signature = model.signature_ if isinstance(model, Adapter) else Signature()
        if not isinstance(model, Adapter | OnnxModule) and list(outputs) == [only]:
            return cls(model, named, 2 if _takes_tuple(model) else 1)
        places = [each.name for each in signature.inputs] or [0]
        return cls(_FlatOutputs(model, places, outputs, only), named, 2, signature.is_open)

    def dynamic_shapes(self, axes: OpenAxes) -> tuple[Any, ...] | None:
        """The axes of all inputs that stay open, in the exporter's form.

        None if all sizes are fixed to the examples'.
        """
        sizes = {} if axes.batch else {0: torch.export.Dim("batch")}
        if self.is_open and not axes.batch:
            sizes[1] = torch.export.Dim("length", min=1)
        if axes.size:
            sizes |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
        shapes: tuple[Any, ...] = tuple([sizes] * len(self.inputs))
        return (shapes if self.nesting == 1 else (shapes,)) if sizes else None


def named_inputs(model: nn.Module, packed: Tensor) -> dict[str, Tensor]:
    """Unpack inputs that are packed in one tensor: input name in the model's file -> tensor (n, ...)."""
    signature = model.signature_ if isinstance(model, Adapter) else Signature()
    if signature.inputs:
        return {argument_name(model, name): value for name, value in signature.unpack(packed).items()}
    return {model.input_names[0] if isinstance(model, OnnxModule) else INPUT: packed}


def describe_packing(model: nn.Module) -> dict[str, str]:
    """Metadata on how several inputs are packed in one tensor, for sessions; empty for models with one input."""
    signature = model.signature_ if isinstance(model, Adapter) else Signature()
    return {PACKING: signature.to_json()} if signature.inputs else {}


def argument_name(model: nn.Module, name: str | int) -> str:
    """The name of an input in the file, which is that of the model's argument."""
    if isinstance(name, str):
        return name
    kind = model.original_class_ if isinstance(model, Adapter) else type(model)
    parameters = list(inspect.signature(kind.forward).parameters)[1:]
    return parameters[name] if name < len(parameters) else f"{INPUT}_{name}"


def check_outputs(model: nn.Module, inputs: Tensor, only: str) -> Mapping[str, Tensor]:
    """Run the model; returns its outputs by name. Raises `ModelError` if it fails or none has a batch axis."""
    try:
        outputs = named_outputs(model, inputs, only)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        shape = tuple(inputs.shape)
        raise ModelError(f"model does not run on an input of shape {shape}: {describe(error)}") from error
    if not outputs:
        raise ModelError(
            f"model returns no tensor ({len(inputs)}, ...) for {len(inputs)} inputs; expected at least one"
        )
    return outputs


@contextmanager
def _flat_attention() -> Iterator[None]:
    """A context in which attention of any number of leading axes runs as (n, heads, ...), all that the exporter
    supports.
    """
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


@contextmanager
def _open_lengths(model: nn.Module) -> Iterator[None]:
    """A context in which `len(tensor)` in the code of a model's modules gives a size that may stay open.

    Python makes a plain number of it, so that a model that asks for its batch in that way would get a file for a batch
    of the example's size alone. The name is put into the files that define the modules, PyTorch's own left out.
    """
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules and not name.startswith(_NOT_MODELS)]
    shadowed = [file for file in files if "len" not in file]
    for file in shadowed:
        file["len"] = lambda value: value.shape[0] if isinstance(value, Tensor) and value.dim() else builtins.len(value)
    try:
        yield
    finally:
        for file in shadowed:
            del file["len"]


def _export(exported: ExportableModule, names: Sequence[str], axes: OpenAxes) -> Any:
    """The exporter's program (its `.model` is an `onnx_ir.Model`). Raises `ModelError`."""
    try:
        with capture_output(), _flat_attention(), _open_lengths(exported.model):
            return torch.onnx.export(
                exported.model,
                tuple(exported.inputs.values()),
                dynamo=True,
                input_names=list(exported.inputs),
                output_names=list(names),
                dynamic_shapes=exported.dynamic_shapes(axes),
                opset_version=OPSET,
                verbose=False,
            )
    except RuntimeError as error:  # the exporter's own errors are RuntimeErrors
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"model cannot be exported: {describe(cause)}") from error


def _takes_tuple(model: nn.Module) -> bool:
    """Whether the exporter sees the inputs as one tuple, as for a forward(*args)."""
    parameter = next(iter(inspect.signature(model.forward).parameters.values()))
    return parameter.kind is parameter.VAR_POSITIONAL


def _check_size_is_open(artifact: Artifact, axes: OpenAxes, *, channels_last: bool = False) -> Artifact:
    """Return `artifact`. Raises `ModelError` if images of any size are asked for but the file has one fixed size."""
    sides = artifact.input_shape[1:3] if channels_last else artifact.input_shape[2:]
    if axes.size and any(side is not None for side in sides):
        raise ModelError(
            f"model cannot be exported for images of any size: its file takes {'x'.join(map(str, sides))} only, since "
            "its forward uses numbers where it should use the height and width of the input"
        )
    return artifact


def _check_batch_is_dynamic(model: onnx_ir.Model) -> None:
    for output in model.graph.outputs:
        if output.shape is not None and isinstance(output.shape[0], int):
            raise ModelError(
                f"model cannot be exported: its output {output.name!r} has a fixed batch of {output.shape[0]}; "
                "its forward uses a number where it should use the input's batch size, such as reshape(2, -1)"
            )


def _free_names(model: onnx_ir.Model) -> None:
    """Rename values inside the graph that have the name of an input or output, in place; the exporter may make such."""
    ports = [*model.graph.inputs, *model.graph.outputs]
    names = {port.name for port in ports}
    for node in model.graph:
        for value in node.outputs:
            if value.name in names and not any(value is port for port in ports):
                value.name = f"{value.name}_inside"


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
            raise ModelError(f"model cannot be exported: the result is not valid ONNX: {describe(error)}") from error
        onnx_file, *weights = onnx_files(Path(folder) / path.name)
        for file in (*weights, onnx_file):  # the file that names the others comes last
            os.replace(file, path.parent / file.name)
