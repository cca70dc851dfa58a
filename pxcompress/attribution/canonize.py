"""BatchNorm folded into the convolution or linear layer in front of it, in place, on a model made for the purpose.

Which BatchNorm follows which layer is observed in one forward pass, not read from names or a traced graph, so it works
for any model that runs. A BatchNorm is folded where its input is the output of a layer whose weight ran once, as it is
stored, and where nothing else reads that output.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from pxcompress.attribution.layers import LINEAR_FUNCTIONS


def fold_batchnorm(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Fold BatchNorm layers of `model` in place; returns the names of those that could not be folded.

    `model` is in eval mode, `example` is one input. A folded BatchNorm becomes `nn.Identity`; of a BatchNormAct the
    activation stays under its name. All other modules stay the same objects under the same names. A BatchNorm that
    stays (in front of a convolution, on a residual sum) is affine in eval mode: its gradient is LRP-0, what it adds is
    a bias.
    """
    pairs, ran = _observe(model, example)
    for norm_name, layer in pairs.items():
        norm = model.get_submodule(norm_name)
        _fold(layer, norm)
        parent, _, child = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), child, _make_replacement(norm))
    return tuple(name for name in ran if name not in pairs)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm: by its type (synchronised ones and timm's BatchNormAct too), or a frozen one by
    its buffers.
    """
    if isinstance(module, _BatchNorm):
        return module.running_mean is not None
    return "Frozen" in type(module).__name__ and hasattr(module, "running_mean") and hasattr(module, "running_var")


class _Observer(TorchFunctionMode):
    """Records for each tensor which weight made it and how many functions read it, and how often each weight ran."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, Tensor] = {}  # kept alive, so that their ids stay theirs
        self.weight_of: dict[int, int] = {}
        self.runs: Counter[int] = Counter()
        self.reads: Counter[int] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(value, Tensor) for value in _flatten((result,))):
            self.reads.update({id(arg) for arg in _flatten((*args, *kwargs.values()))} & self.outputs.keys())
        if getattr(func, "__name__", "") in LINEAR_FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.runs[id(weight)] += 1
            self.outputs[id(result)] = result
            self.weight_of[id(result)] = id(weight)
        return result


def _flatten(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flatten(value)
        else:
            yield value


def _observe(model: nn.Module, example: Tensor) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Maps the name of each foldable BatchNorm to the layer in front of it.

    Also returns the names of all BatchNorms that ran.
    """
    observer = _Observer()
    inputs: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: inputs.setdefault(name, []).append(args[0])

    norms = {name: module for name, module in model.named_modules() if is_batchnorm(module)}
    handles = [norm.register_forward_pre_hook(note(name)) for name, norm in norms.items()]
    try:
        with torch.no_grad(), observer:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    owners = _find_owners(model)
    pairs = {}
    for name, tensors in inputs.items():
        weight = observer.weight_of.get(id(tensors[0]))
        layer = owners.get(weight) if weight is not None and observer.runs[weight] == 1 else None
        has_one_reader = len(tensors) == 1 and observer.reads[id(tensors[0])] == 1
        if has_one_reader and layer is not None and _can_fold(layer, tensors[0], norms[name]):
            pairs[name] = layer
    return pairs, tuple(inputs)


def _find_owners(model: nn.Module) -> dict[int, nn.Module]:
    """Maps the id of a weight to its convolution or linear layer, for weights that no other module shares."""
    layers = [module for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear))]
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return {id(layer.weight): layer for layer in layers if holders[id(layer.weight)] == 1}


def _can_fold(layer: nn.Module, output: Tensor, norm: nn.Module) -> bool:
    """Whether the BatchNorm's channels are the layer's output channels (for linear layers, only where outputs have two
    axes).
    """
    channels: int = norm.running_mean.numel()  # type: ignore[operator]
    if isinstance(layer, nn.Linear):
        return layer.out_features == channels and output.dim() == 2
    return bool(layer.out_channels == channels)


def _fold(layer: Any, norm: Any) -> None:
    """Fold a BatchNorm into the layer in place: W <- scale W, b <- scale (b - mean) + shift, scale = weight / sqrt(var
    + eps).
    """
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    bias = -norm.running_mean * scale if layer.bias is None else (layer.bias - norm.running_mean) * scale
    bias = bias if norm.bias is None else bias + norm.bias
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
        grouped = weight.view(layer.groups, -1, *weight.shape[1:])
        weight = grouped * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = weight.view_as(layer.weight)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(weight.detach().to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().to(layer.weight.dtype), requires_grad=False)


def _make_replacement(norm: nn.Module) -> nn.Module:
    """The module to put in place of a folded BatchNorm: an identity, or the drop and activation layers of a
    BatchNormAct.
    """
    children = OrderedDict((name, child) for name, child in norm.named_children() if name in ("drop", "act"))
    return nn.Sequential(children) if children else nn.Identity()
