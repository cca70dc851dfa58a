"""Rotates a residual stream so that its directions can be removed one by one, then restores plain LayerNorms.

LayerNorm ignores the mean of a position, so every writer of the stream may leave it out: what remains needs one
dimension less. Gain and bias of a norm, and scales behind writers, go into the linear layers beside them. In any
orthonormal basis with the ones vector last the norm is then y / sqrt(|y|^2 / D + eps), and a direction can go like a
channel (Ashkboos et al., https://arxiv.org/abs/2401.15024, with one basis for the whole stream, so that nothing is
multiplied on the skips). The last coordinate is always zero. It stays, since a LayerNorm of width m sees m - 1
dimensions: a reflection turns it into their mean (`restore_layer_norms`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pxcompress.graph.streams import Stream
from pxcompress.layout.rows import members_by_module
from pxcompress.types import Group, Member, Pruned


class DirectionNorm(nn.LayerNorm):
    """An RMS norm for a rotated stream, y / sqrt(|y|^2 / width + eps); `width` stays the dense one after removal."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape[-1], norm.eps, elementwise_affine=False)
        self.width = norm.normalized_shape[-1]

    def forward(self, y: Tensor) -> Tensor:
        left = y.shape[-1]
        return F.rms_norm(y, (left,), eps=self.eps * self.width / left) * math.sqrt(self.width / left)


def make_direction_group(name: str, stream: Stream) -> Group:
    """The group whose units are the directions of a rotated stream, all but the last coordinate."""
    index = torch.arange(stream.width - 1)[:, None]
    readers = {reader for norm in stream.norms for reader in norm.readers}
    writers = [Member(writer, "out", index) for writer in stream.writers]
    norms = [Member(norm.name, "out", index) for norm in stream.norms]
    tables = [Member(table, "out", index, -1) for table in stream.tables]
    return Group(
        name,
        "direction",
        stream.width - 1,
        (*writers, *norms, *tables, *(Member(reader, "in", index) for reader in sorted(readers))),
    )


@torch.no_grad()
def rewrite_stream_(model: nn.Module, stream: Stream) -> None:
    """Change a stream's coordinates so that no norm subtracts a mean, in place; the model computes the same."""
    for scale, writer in stream.scales:
        _absorb_scale_(model, scale, _get_layer(model, writer))
    for norm in stream.norms:
        layer = model.get_submodule(norm.name)
        assert isinstance(layer, nn.LayerNorm)
        for reader in norm.readers:
            _absorb_norm_(model.get_submodule(reader), layer)
        _replace_(model, norm.name, DirectionNorm(layer))
    basis = _make_reflection(stream.width)
    group = make_direction_group(stream.writers[0], stream)
    _multiply_weights_(model, group, basis.T, basis)
    for tensor, dim in find_writing_weights(model, group):
        tensor.narrow(dim, stream.width - 1, 1).zero_()


@torch.no_grad()
def rotate_(model: nn.Module, group: Group, basis: Tensor) -> None:
    """Change a stream's coordinates, in place: column u of the orthogonal `basis` (units, units) becomes unit u."""
    whole = torch.block_diag(basis.double(), torch.ones(1, 1, dtype=torch.float64))
    _multiply_weights_(model, group, whole.T, whole)


@torch.no_grad()
def restore_layer_norms_(model: nn.Module, groups: Iterable[Group]) -> None:
    """Replace the norms of narrowed streams by plain LayerNorms, in place; the model computes the same."""
    for group in groups:
        if group.kind != "direction":
            continue
        norms = [name for name in members_by_module([group], "out") if _is_direction_norm(model, name)]
        first = model.get_submodule(norms[0])
        assert isinstance(first, DirectionNorm)
        left = first.normalized_shape[-1]
        basis = _make_reflection(left)
        _multiply_weights_(model, group, basis, math.sqrt(first.width / left) * basis)
        for name in norms:
            norm = model.get_submodule(name)
            assert isinstance(norm, DirectionNorm)
            _replace_(model, name, nn.LayerNorm(left, norm.eps * norm.width / left, elementwise_affine=False))


def restore_layer_norms(pruned: Pruned) -> Pruned:
    """`pruned` with plain LayerNorms in its model, changed in place; to be called after the last repair."""
    restore_layer_norms_(pruned.model, pruned.groups)
    return pruned


def own_all_norms(model: nn.Module, groups: Iterable[Group]) -> bool:
    """Whether all norms of rotated streams in `model` belong to `groups`, so that LayerNorms can replace them."""
    owned = {member.module for group in groups for member in group.members}
    return all(name in owned for name, module in model.named_modules() if isinstance(module, DirectionNorm))


def _is_direction_norm(model: nn.Module, name: str) -> bool:
    with suppress(AttributeError):  # a parameter
        return isinstance(model.get_submodule(name), DirectionNorm)
    return False


def _multiply_weights_(model: nn.Module, group: Group, writes: Tensor, reads: Tensor) -> None:
    """Multiply weights that write a stream by `writes` from the left, and weights that read it by `reads` from the
    right.
    """
    for tensor, dim in find_writing_weights(model, group):
        turned = torch.tensordot(tensor.double(), writes.to(tensor.device), ([dim], [1]))
        tensor.copy_(turned.movedim(-1, dim))
    for member in group.consumers:
        weight = _get_layer(model, member.module).weight.data
        weight.copy_(weight.double() @ reads.to(weight.device))


def find_writing_weights(model: nn.Module, group: Group) -> Iterator[tuple[Tensor, int]]:
    """Weights, biases and tables that write a stream, each with the dimension of the stream's coordinates."""
    for member in group.members:
        if member.axis == "in":
            continue
        if member.dim is not None:
            table: Tensor = model.get_parameter(member.module).data
            yield table, member.dim % table.dim()
        elif not _is_direction_norm(model, member.module):
            layer = _get_layer(model, member.module)
            yield layer.weight.data, 0
            if layer.bias is not None:
                yield layer.bias.data, 0


def _get_layer(model: nn.Module, name: str) -> nn.Linear | _ConvNd:
    """The linear layer or convolution called `name`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | _ConvNd)
    return layer


def _make_reflection(width: int) -> Tensor:
    """The reflection (width, width) that swaps the last unit vector and the normalised vector of ones."""
    difference = torch.full((width,), -1 / math.sqrt(width), dtype=torch.float64)
    difference[-1] += 1
    matrix = torch.eye(width, dtype=torch.float64)
    return matrix if width == 1 else matrix - 2 * torch.outer(difference, difference) / difference.square().sum()


def _absorb_scale_(model: nn.Module, scale: str, writer: nn.Linear | _ConvNd) -> None:
    """Multiply a parameter that scales outputs of a layer into the layer, in place.

    A module just for that is removed.
    """
    path, _, attribute = scale.rpartition(".")
    parameter, owner = model.get_parameter(scale), model.get_submodule(path)
    writer.weight.data.mul_(parameter.view(-1, *([1] * (writer.weight.dim() - 1))))
    if writer.bias is not None:
        writer.bias.data.mul_(parameter)
    if path and len(list(owner.parameters())) == 1 and not list(owner.children()):
        _replace_(model, path, nn.Identity())
    else:
        setattr(owner, attribute, nn.Parameter(torch.ones_like(parameter[:1])))  # at any width


def _absorb_norm_(reader: nn.Module, norm: nn.LayerNorm) -> None:
    """Move gain and bias of a norm into a linear layer that reads it, in place."""
    assert isinstance(reader, nn.Linear)
    if norm.bias is not None:
        shift = reader.weight.data.double() @ norm.bias.double()
        if reader.bias is None:
            reader.bias = nn.Parameter(torch.zeros_like(reader.weight[:, 0]))
        reader.bias.data.add_(shift.to(reader.bias))
    if norm.weight is not None:
        reader.weight.data.mul_(norm.weight)


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the module `name`, with the same training mode."""
    path, _, attribute = name.rpartition(".")
    parent = model.get_submodule(path)
    module.train(getattr(parent, attribute).training)
    parent._modules[attribute] = module


def add_linear_behind(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `model` with an identity, as a linear layer, behind each of the norms `names`."""
    twin = copy.deepcopy(model)
    for name in names:
        norm = twin.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        width = norm.normalized_shape[-1]
        linear = nn.Linear(width, width).to(next(twin.parameters()))
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        _replace_(twin, name, nn.Sequential(norm, linear))
    return twin


def merge_attention_biases_(model: nn.Module) -> None:
    """Give joint query-key-value projections a bias, in place; BEiT and EVA store its parts apart from the layer."""
    for module in model.modules():
        projection = getattr(module, "qkv", None)
        parts = [getattr(module, name, None) for name in ("q_bias", "k_bias", "v_bias")]
        if isinstance(projection, nn.Linear) and projection.bias is None and all(part is not None for part in parts):
            projection.bias = nn.Parameter(torch.cat([part.detach() for part in parts if part is not None]))
            module.q_bias = module.k_bias = module.v_bias = None
