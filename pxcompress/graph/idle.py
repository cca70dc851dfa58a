"""Layers with weights that do not run on the example: auxiliary heads, early exits, branches for other sizes, experts.

Nothing that runs shows what they read, so whatever they could read or write stays whole: tensors as wide as they are,
among those that the code which calls them can see. Where they run in training mode, a trial in that mode decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError, describe
from pxcompress.graph.mentions import could_run
from pxcompress.models.adapter import all_outputs
from pxcompress.models.outputs import kinds, leaves
from pxcompress.state import copy_sharing, device_of, evaluating, seeded, without_checkpointing
from pxcompress.types import FixedLayer

NOT_REACHED = "the example does not reach it"
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Shapes = Mapping[tuple[str, int], torch.Size]
"""(module name, position among the tensors that it takes and returns) -> shape."""


@dataclass(frozen=True, eq=False)
class Idle:
    """Layers that do not run, the tensor `shapes` that each could read, and the model's outputs in training mode."""

    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    shapes: Mapping[str, Shapes] = field(default_factory=dict)
    trained: Sequence[tuple[torch.Size, torch.dtype]] | None = None

    @property
    def fixed(self) -> Iterator[FixedLayer]:
        """The idle layers as `FixedLayer` records, which say that their outputs stay."""
        for name, layer in self.layers.items():
            if isinstance(weight := getattr(layer, "weight", None), Tensor):
                rows = weight.shape[1] * layer.groups if isinstance(layer, TRANSPOSED) else len(weight)
                yield FixedLayer(name, int(rows), f"{NOT_REACHED}; it stays, as does what it could read")

    def fault(self, slim: nn.Module, inputs: Tensor) -> str:
        """How a slim model changes a tensor that an idle layer could read, in words; "" if it does not."""
        if not self.layers:
            return ""
        shapes_by_place = _record_shapes(slim, inputs) if self.shapes else {}
        for name, shapes in self.shapes.items():
            widths = _list_widths(self.layers[name])
            if any(_is_narrowed(shapes_by_place.get(place), shape, widths) for place, shape in shapes.items()):
                return f"{name} could read or write its units, and {NOT_REACHED}; give an example that does"
        if self.trained is not None:
            try:
                has_changed = kinds(_run_in_training(slim, inputs)) != self.trained
            except Exception as error:  # noqa: BLE001  (a model that does not fit together may fail in any way)
                return f"without its units training mode fails, which runs {self._first}: {describe(error)}"
            if has_changed:
                return f"without its units the outputs in training mode change, which runs {self._first}"
        return ""

    @property
    def _first(self) -> str:
        return next(iter(self.layers))


def idle_layers(model: nn.Module, inputs: Tensor) -> Idle:
    """The layers with weights that do not run on `inputs` in eval mode, and the tensors that they could read."""
    reached_layers, called_layers = _find_reached(model, lambda twin: all_outputs(twin, inputs))
    layers = {
        name: module
        for name, module in model.named_modules()
        if name not in reached_layers and any(True for _ in module.parameters(recurse=False))
    }
    if not layers:
        return Idle()
    training_layers, output_kinds = _find_trained(copy_sharing(model), inputs)
    dense_shapes = _record_shapes(model, inputs)
    shapes = {}
    for name in [name for name in layers if name not in training_layers and could_run(model, name)]:
        shapes[name] = {
            place: shape for place, shape in dense_shapes.items() if _is_visible(place[0], name, called_layers)
        }
    return Idle(layers, shapes, output_kinds if training_layers & set(layers) else None)


def _find_reached(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[set[str], set[str]]:
    """Names of modules that run or whose parameters affect the outputs, and names of those that run."""
    twin = copy_sharing(model)
    twin.eval()
    called_layers: set[str] = set()
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called_layers.add(name))
    with torch.enable_grad(), without_checkpointing():
        parameter_ids = _find_parameters(run(twin))
    owners = {
        name
        for name, module in twin.named_modules()
        if any(id(parameter) in parameter_ids for parameter in module.parameters(recurse=False))
    }
    return called_layers | owners, called_layers


def _find_parameters(outputs: Sequence[Tensor]) -> set[int]:
    """Ids of the parameters that the outputs depend on, found by following autograd's graph."""
    stack = [value.grad_fn for value in outputs if value.grad_fn is not None]
    visited_nodes, parameter_ids = set(stack), set()
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            parameter_ids.add(id(node.variable))
        following = {function for function, _ in node.next_functions if function is not None} - visited_nodes
        visited_nodes |= following
        stack += following
    return parameter_ids


def _find_trained(model: nn.Module, inputs: Tensor) -> tuple[set[str], Sequence[tuple[torch.Size, torch.dtype]] | None]:
    """Names of layers that run in training mode, and shapes and types of its outputs; None if that mode fails."""
    outputs: list[Tensor] = []

    def run(twin: nn.Module) -> list[Tensor]:
        outputs.extend(_run_in_training(twin, inputs))
        return outputs

    try:
        return _find_reached(model, run)[0], kinds(outputs)
    except Exception:  # noqa: BLE001  (training may want targets as well)
        return set(), None


def _run_in_training(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Outputs of `model` in training mode, in which it is left; its buffers may change."""
    model.train()
    with seeded(0):
        return all_outputs(model, inputs.to(device_of(model)))


def _record_shapes(model: nn.Module, inputs: Tensor) -> Shapes:
    """Shapes of all tensors that modules take and return; for a module called several times, of its last call."""
    shapes: dict[tuple[str, int], torch.Size] = {}

    def note(name: str, args: Any, kwargs: Any, output: Any) -> None:
        try:
            tensors = leaves((args, kwargs, output))
        except ModelError:  # what one module hands to another may be of any class
            return
        shapes.update({(name, place): value.shape for place, value in enumerate(tensors)})

    with torch.no_grad(), evaluating(model):
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _, args, kwargs, output, name=name: note(name, args, kwargs, output), with_kwargs=True
            )
        all_outputs(model, inputs)
    return shapes


def _is_visible(name: str, layer: str, called_layers: set[str]) -> bool:
    """Whether the code that would call `layer` can see what the module `name` takes and returns."""
    return _find_caller(name, called_layers) in {"", *_list_ancestors(layer)}


def _find_caller(name: str, called_layers: set[str]) -> str:
    """The module whose forward calls `name`: the nearest enclosing one that runs, which lists of modules do not."""
    return next((above for above in _list_ancestors(name) if above in called_layers), "")


def _list_ancestors(name: str) -> list[str]:
    """Names of the modules that contain `name`, from the inside to the outside."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def _is_narrowed(slim_shape: torch.Size | None, shape: torch.Size, widths: set[int]) -> bool:
    """Whether a tensor has another size where its `shape` was one of `widths`, along an axis or flattened."""
    if slim_shape is None or len(slim_shape) != len(shape):
        return True
    sizes = zip((*shape[1:], shape[1:].numel()), (*slim_shape[1:], slim_shape[1:].numel()), strict=True)
    return any(dense_size in widths and dense_size != slim_size for dense_size, slim_size in sizes)


def _list_widths(layer: nn.Module) -> set[int]:
    """Sizes that a layer may have as channels of its input or output."""
    for pair in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if all(isinstance(getattr(layer, key, None), int) for key in pair):
            return {getattr(layer, key) for key in pair}
    return {size for parameter in layer.parameters(recurse=False) for size in parameter.shape if size > 1}
