"""The module that runs an ONNX file: real layers for weights, and steps over named values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.onnx_in.channels import to_channels_last
from pxcompress.onnx_in.operators.table import DTYPES
from pxcompress.onnx_in.origins import Origin, Source, digest_of
from pxcompress.onnx_in.regroup import Regroup


@dataclass
class Step:
    """One call in an ONNX module: of its layer named `run`, or of a function.

    `operator` is its kind, `node` its origin.
    """

    operator: str
    run: str | Callable[..., Any]
    inputs: list[str | None]
    outputs: list[str]
    node: str = ""
    freed: list[str] = field(default_factory=list)


@dataclass
class Trace:
    """Shapes of the inputs and outputs of a step in one call, and its values if these are kept."""

    step: Step
    inputs: list[tuple[int, ...] | None]
    outputs: list[tuple[int, ...]]
    values: list[Any]


class Runner(nn.Module):
    """Runs steps over named values. Constants are buffers; those that belong to heads are parameters.

    `constants` are the names of their attributes, `tables` the digests of the parameters as they were read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.constants: dict[str, str] = {}
        self.tables: dict[str, str] = {}
        self.input_names: list[str] = []
        self.made: list[str] = []
        self.traces: list[Trace] | None = None
        self.keeps_values = False

    def store_constant(self, name: str, value: Tensor, *, learned: bool = False) -> None:
        """Store a constant under an attribute of its own; `learned` makes it a parameter."""
        if name in self.constants:
            return
        attribute = f"{'table' if learned else 'constant'}_{len(self.constants)}"
        self.constants[name] = attribute
        if learned:
            self.tables[name] = digest_of(value)
            self.register_parameter(attribute, nn.Parameter(value.clone()))
        else:
            self.register_buffer(attribute, value, persistent=False)

    def get_constant(self, name: str) -> Tensor:
        """The stored constant with this name."""
        return getattr(self, self.constants[name])

    def remove_unused(self) -> None:
        """Remove steps and constants that no output needs, and plan when values can be freed."""
        needed, steps = set(self.made), []
        for step in reversed(self.steps):
            if needed & set(step.outputs):
                steps.append(step)
                needed |= {name for name in step.inputs if name}
        self.steps = steps[::-1]
        last: dict[str, int] = {}
        for place, step in enumerate(self.steps):
            last |= {name: place for name in (*step.inputs, *step.outputs) if name}
        for place, step in enumerate(self.steps):
            step.freed = [name for name, when in last.items() if when == place and name not in self.made]
        for name in [name for name in self.constants if name not in needed]:
            delattr(self, self.constants.pop(name))

    def run(self, values: dict[str, Any]) -> list[Any]:
        """Compute the outputs from the inputs in `values`, which is emptied on the way."""
        for step in self.steps:
            args: list[Any] = [None if name is None else self._value(name, values) for name in step.inputs]
            if isinstance(step.run, Regroup):
                made = step.run(args[0], getattr(self, "num_heads", 1))
            else:
                made = (self.get_submodule(step.run) if isinstance(step.run, str) else step.run)(*args)
            results = list(made) if isinstance(made, tuple | list) else [made]
            if self.traces is not None:
                input_shapes = [None if arg is None else tuple(arg.shape) for arg in args]
                values_kept = results if self.keeps_values else []
                self.traces.append(Trace(step, input_shapes, [tuple(result.shape) for result in results], values_kept))
            values.update(zip(step.outputs, results, strict=False))
            for name in step.freed:
                values.pop(name, None)
        return [self._value(name, values) for name in self.made]

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        return values[name] if name in values else self.get_constant(name)


class AttentionBlock(Runner):
    """The steps of an attention, from its projections to its output projection; it knows its number of heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(dict(zip(self.input_names, inputs, strict=True)))[0]


class OnnxModule(Runner):
    """An ONNX file as a module: takes inputs by position or name; returns a tensor, or a tuple if there are several.

    A softmax that makes an output is left out: the module gives logits. `file_outputs` includes it, and so does what
    `write_onnx` writes. Images have channels first, also if the file has them last (`channels_last`). `pretrained_cfg`
    describes the preprocessing of inputs in timm's terms, if it is known.
    """

    source: Source
    origins: dict[str, Origin]

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.origins = {}
        self.tails: dict[int, Step] = {}
        self.pretrained_cfg: dict[str, Any] = {}
        self.channels_last = False

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        made = self.run({**dict(zip(self.input_names, inputs, strict=False)), **named})
        return made[0] if len(made) == 1 else tuple(made)

    def file_outputs(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The outputs of the file: the module's, with the final softmax that the module leaves out."""
        made = self.run({**dict(zip(self.input_names, inputs, strict=False)), **named})
        for place, step in self.tails.items():
            assert not isinstance(step.run, str)
            made[place] = step.run(made[place])
        return made[0] if len(made) == 1 else tuple(made)

    def file_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's `inputs` as the file takes them, by name: in its types, and channels last if it has them so."""
        types = self.source.types
        made = self.graph_inputs(inputs)
        return {name: value.to(DTYPES[types[name].value]) if name in types else value for name, value in made.items()}

    def graph_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module's `inputs` as the graph in memory takes them: float32 even if the file is in half precision."""
        made = {}
        for value in self.source.model.graph.inputs:
            assert value.dtype is not None
            name = value.name or ""
            tensor = inputs.get(name, self.source.example[name])  # what nothing reads may be left out
            laid = to_channels_last(tensor).contiguous() if self.channels_last and name in self.input_names else tensor
            made[value.name or ""] = laid.to(DTYPES[value.dtype.value])
        return made

    def write_onnx(self, path: Path, metadata: Mapping[str, str], batch: int | None = None) -> None:
        """Write the file again with this module's weights; see `writing.write_back`."""
        from pxcompress.onnx_in.writing import write_back

        write_back(self, path, metadata, batch)


def trace_run(module: OnnxModule, *, keep_values: bool = False) -> list[Trace]:
    """Run the module on the file's example, and record the shapes of inputs and outputs of every step."""
    runners = [part for part in module.modules() if isinstance(part, Runner)]
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    traces: list[Trace] = []
    for runner in runners:
        runner.traces, runner.keeps_values = traces, keep_values
    try:
        with torch.no_grad():
            module.run({name: value.to(device) for name, value in module.source.example.items()})
    finally:
        for runner in runners:
            runner.traces, runner.keeps_values = None, False
    return traces
