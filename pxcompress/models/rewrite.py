"""Rewrites a model in plain layers that hold the weights they compute with, so that units can be removed.

nn.MultiheadAttention becomes explicit q, k, v and output layers, a global response norm one whose mean over channels is
a layer, a frozen BatchNorm one of PyTorch's; a layer that derives its weights at every call (weight standardisation,
weight or spectral norm, masks) becomes one that holds the weights it has in eval mode. Compiled and parallel modules
become the module inside.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from pxcompress.models.outputs import difference, leaves
from pxcompress.models.response_norm import explicit_response_norm, is_response_norm
from pxcompress.state import evaluating, hooks_of

TOLERANCE = 1e-5
"""Largest accepted difference between a layer and its plain version, as a share of the outputs' scale."""

AMPLIFIED_TOLERANCE = 1e-3
"""Largest accepted difference of a model's outputs by rewriting; models may amplify rounding of layers."""

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

REMOVERS: dict[type, Callable[[Any, str], object]] = {
    WeightNorm: remove_weight_norm,
    SpectralNorm: remove_spectral_norm,
    prune.BasePruningMethod: prune.remove,
}
"""Type of a hook that sets a weight before every call -> the function that makes the weight a parameter again."""

Run = Callable[[nn.Module], Any]
"""A function that runs a model on some example, and returns its outputs."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` or a parallel wrapper; a copy if inference mode or `compile()` was used."""
    while (inner := _inside(model)) is not None:
        model = inner
    tensors = [*model.parameters(), *model.buffers()]
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return _copy_model(model) if is_compiled or any(tensor.is_inference() for tensor in tensors) else model


def rewrite_plain(model: nn.Module, run: Run | None = None) -> nn.Module:
    """A copy of `model` in plain layers, which hold the weights that they compute with; `model` itself if it is so.

    A layer whose plain version does not compute the same stays, as does one that shares parameters with others. With
    `run`, rewrites that change the model's outputs are left out.
    """
    owners = _owners(model)
    names = [name for name, part in model.named_modules() if _may_be_rewritten(part) and not _is_tied(part, owners)]
    expected = None if run is None or not names else _outputs(model, run)
    if expected is None or any(bool(value.isnan().any()) for value in expected):
        return _rewrite(model, names)

    def is_same(twin: nn.Module) -> bool:
        outputs = _outputs(twin, run) if run else None
        return outputs is not None and difference(outputs, expected) <= AMPLIFIED_TOLERANCE

    return _rewrite(model, _sound([], names, lambda some: is_same(_rewrite(model, some))))


def _sound(sound_names: list[str], suspects: Sequence[str], is_sound: Callable[[list[str]], bool]) -> list[str]:
    """`sound_names`, and those of the suspects for which `is_sound` still holds when added, found by bisection."""
    if not suspects or is_sound([*sound_names, *suspects]):
        return [*sound_names, *suspects]
    if len(suspects) == 1:
        return sound_names
    middle = len(suspects) // 2
    sound_names = _sound(sound_names, suspects[:middle], is_sound)
    return _sound(sound_names, suspects[middle:], is_sound)


def _rewrite(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of `model` with plain versions of the modules `names`, wherever they are used.

    `model` if there are none.
    """
    if not names:
        return model
    twin = _copy_model(model)
    for module in reversed([twin.get_submodule(name) for name in names]):  # what is inside comes first
        plain_module = _plain_version(module)
        if plain_module is None:
            continue
        plain_module.train(module.training)
        twin = plain_module if module is twin else twin
        for parent in twin.modules():
            parent._modules.update({name: plain_module for name, child in parent._modules.items() if child is module})
    return twin


def _plain_version(module: nn.Module) -> nn.Module | None:
    """A module in plain layers that computes the same as `module`; None if there is none."""
    if (inner := _inside(module)) is not None:
        return inner
    if parametrize.is_parametrized(module):
        module = _fix_weights(module)
    for hook, remove in _weight_hooks(module):
        remove(module, hook.name if isinstance(hook, WeightNorm | SpectralNorm) else hook._tensor_name)
    if _is_attention(module):
        return _with_hooks_of(module, ExplicitAttention(module).to(module.out_proj.weight.device))
    if _has_own_forward(module):
        convolution = _with_its_weights(module)
        return convolution and _with_hooks_of(module, convolution)
    norm = _unfreeze(module) if _is_frozen_norm(module) else explicit_response_norm(module)
    return module if norm is None else _with_hooks_of(module, norm)


def _outputs(model: nn.Module, run: Run) -> list[Tensor] | None:
    """All output tensors of `model`; None if it does not run."""
    try:
        with torch.no_grad(), evaluating(model):
            return leaves(run(model))
    except Exception:  # noqa: BLE001  (a user's forward may raise anything; whoever runs it next says so)
        return None


def _copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, which also works if a hook has left a computed weight in a module."""
    values = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in values if not value.is_leaf})


def _inside(module: nn.Module) -> nn.Module | None:
    """The module inside a compiled or parallel one; None for other modules."""
    inner = module.module if isinstance(module, WRAPPERS) else getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def _weight_hooks(module: nn.Module) -> list[tuple[Any, Callable[[Any, str], object]]]:
    """The hooks of a module that set a weight, each with the function that removes it."""
    hooks = module._forward_pre_hooks.values()
    return [(hook, remove) for hook in hooks for kind, remove in REMOVERS.items() if isinstance(hook, kind)]


def _with_hooks_of(module: nn.Module, replacement: nn.Module) -> nn.Module:
    for name, hooks in hooks_of(module).items():
        getattr(replacement, name).update(hooks)
    return replacement


def _owners(model: nn.Module) -> Mapping[int, set[int]]:
    """Id of a parameter -> ids of the modules that hold it themselves."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
    return owners


def _is_tied(module: nn.Module, owners: Mapping[int, set[int]]) -> bool:
    """Whether `module` shares a parameter with a module outside of it, which a rewritten copy would no longer share."""
    own_ids = {id(part) for part in module.modules()}
    return any(owners[id(parameter)] - own_ids for parameter in module.parameters())


class ExplicitAttention(nn.Module):
    """nn.MultiheadAttention rewritten with layers of its own for queries, keys, values and outputs."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.head_dim, self.embed_dim = attention.head_dim, attention.embed_dim
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.batch_first = attention.batch_first
        # nn.TransformerEncoderLayer reads these: one fused kernel would pass by the layers here
        self._qkv_same_embed_dim, self.in_proj_weight, self.in_proj_bias = False, None, None
        self.bias_k, self.bias_v, self.add_zero_attn = None, None, False
        weights: Any = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(  # noqa: PLR0913  (those of nn.MultiheadAttention)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The same as nn.MultiheadAttention, with the same arguments and results."""
        single = query.dim() == 2
        if single:
            query, key, value = (part[None] for part in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = (
            layer(part).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, part in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask = _mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            output = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if single:
            return output[0], None if weights is None else weights[0]
        return (output if self.batch_first else output.transpose(0, 1)), weights


def _mask(attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """The sum of nn.MultiheadAttention's two masks, to add to scores (n, heads, queries, keys).

    None if both are None.
    """
    parts = []
    if attention is not None:  # (queries, keys) or (n * heads, queries, keys)
        parts.append(attention.unflatten(0, (len(like), -1)) if attention.dim() == 3 else attention)
    if padding is not None:  # (n, keys)
        parts.append(padding[:, None, None])
    additive_masks = [
        torch.zeros_like(part, dtype=like.dtype).masked_fill(part, -torch.inf) if part.dtype == torch.bool else part
        for part in parts
    ]
    return sum(additive_masks[1:], additive_masks[0]) if additive_masks else None


class _Weights(TorchFunctionMode):
    """Records, while active, the weights with which convolutions compute, and the shapes of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Size, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d and not kwargs:
            self.calls.append((args[0].shape, args[1].detach().clone()))
        return func(*args, **(kwargs or {}))


def _may_be_rewritten(module: nn.Module) -> bool:
    derives_weights = parametrize.is_parametrized(module) or _weight_hooks(module) or _inside(module) is not None
    is_other_norm = is_response_norm(module) or _is_frozen_norm(module)
    return bool(derives_weights) or _is_attention(module) or _has_own_forward(module) or is_other_norm


def _is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is a plain nn.MultiheadAttention, with options that can be rewritten."""
    is_torch_attention = (
        isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    )
    return is_torch_attention and module.bias_k is None and not module.add_zero_attn


def _has_own_forward(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and type(module).forward is not nn.Conv2d.forward


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a FrozenBatchNorm2d, of which several libraries have their own."""
    names = {"weight", "bias", "running_mean", "running_var"}
    return type(module).__name__.endswith("FrozenBatchNorm2d") and set(module._buffers) == names


def _unfreeze(module: nn.Module) -> nn.Module:
    """A BatchNorm2d that computes the same as a frozen one in eval mode."""
    values = module._buffers
    assert values["weight"] is not None
    norm = nn.BatchNorm2d(len(values["weight"]), eps=getattr(module, "eps", 1e-5)).to(values["weight"])
    norm.load_state_dict(values, strict=False)
    return norm


def _fix_weights(module: nn.Module) -> nn.Module:
    """A copy of a parametrized layer with its computed weights as plain parameters."""
    plain_layer = copy.deepcopy(module)
    plain_layer.__class__ = parametrize.type_before_parametrizations(
        module
    )  # the class is shared with `module`: not touched
    del plain_layer.parametrizations
    with torch.no_grad(), evaluating(module):  # spectral norm takes a step in training mode, whenever it is read
        for name, parts in module.parametrizations.items():  # type: ignore[union-attr, operator]
            value = getattr(module, name).detach().clone()
            if any(True for _ in parts.parameters(recurse=False)):
                plain_layer.register_parameter(name, nn.Parameter(value))
            else:
                plain_layer.register_buffer(name, value)
    return plain_layer


def _with_its_weights(module: nn.Module) -> nn.Module | None:
    """A plain convolution with the weights that `module` computes in its forward; None if it does anything else."""
    assert isinstance(module, nn.Conv2d)
    side = tuple(2 * dilation * size + 1 for dilation, size in zip(module.dilation, module.kernel_size, strict=True))
    inputs = torch.randn(2, module.in_channels, *side, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(module.weight)
    try:
        with torch.no_grad(), evaluating(module), _Weights() as recorded_weights:
            expected = module(inputs)
    except Exception:  # noqa: BLE001  (a user's forward may raise anything, or want more than one input)
        return None
    if len(recorded_weights.calls) != 1 or torch.equal(recorded_weights.calls[0][1], module.weight):
        return None
    shape, weight = recorded_weights.calls[0]
    convolution = _like(module, weight, keeps_size=shape != inputs.shape)
    with torch.no_grad(), evaluating(convolution):
        outputs = convolution(inputs)
    is_same = outputs.shape == expected.shape and (outputs - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return convolution if is_same else None


def _like(module: nn.Conv2d, weight: Tensor, *, keeps_size: bool) -> nn.Conv2d:
    """A convolution with the settings of `module` and another weight; `keeps_size` pads so that the size stays."""
    convolution: nn.Conv2d = (Conv2dSame if keeps_size else nn.Conv2d)(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        stride=module.stride,  # type: ignore[arg-type]
        padding=0 if keeps_size else module.padding,  # type: ignore[arg-type]
        dilation=module.dilation,  # type: ignore[arg-type]
        groups=module.groups,
        bias=module.bias is not None,
    ).to(weight)
    with torch.no_grad():
        convolution.weight.copy_(weight)
        if convolution.bias is not None and module.bias is not None:
            convolution.bias.copy_(module.bias)
    return convolution


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.detach())
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
