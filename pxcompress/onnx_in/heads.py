"""Finds attention in a graph by what it computes: two matrix products around a softmax, with layers before and behind.

Opset 23 has one operator for the products and the softmax.
Which rows of a layer belong to which head is not guessed from shapes: row numbers are sent through the same steps. What
is found becomes an `AttentionBlock` with `num_heads` and layers named q, k, v (or qkv, or q and kv) and proj.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.onnx_in.module import AttentionBlock, OnnxModule, Runner, Step
from pxcompress.onnx_in.regroup import HEADS, Regroup, Sizes
from pxcompress.onnx_in.walk import Path, Walk, trace_shapes

MOST_STEPS = 80
"""Most steps that one attention may consist of."""

MOST_INPUTS = 3
"""Most values that one attention may read: those from which queries, keys and values are made."""

OUTER = ("LayerNorm", "Conv", "BatchNorm")
"""Layers that stand in front of an attention, not inside it."""

CORES = ("Softmax", "Attention")
"""Kinds of steps of which every attention contains exactly one."""

NAMES = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}


@dataclass(frozen=True)
class _Attention:
    """An attention in a graph: its core, the paths from its layers to the core, the layer behind, and each layer's
    rows.

    The core is the softmax between both products, or the one operator for all three. `rows` (heads, k) has the rows of
    every head, by the layer's name.
    """

    core: Step
    roles: tuple[Path, ...]
    behind: Path
    rows: dict[str, Tensor]
    heads: int

    @property
    def layers(self) -> list[Step]:
        """The layers whose outputs belong to heads, each once."""
        return list({id(role.end): role.end for role in self.roles}.values())


def group_attention_(module: OnnxModule) -> None:
    """Move every attention that is found into a block of its own, in place."""
    cores = [step for step in module.steps if step.operator in CORES and not isinstance(step.run, str)]
    shapes = trace_shapes(module) if cores else {}
    for core in cores:
        walk = Walk(module, shapes)  # the steps are others after each block
        attention = _find(walk, core)
        if attention is not None:
            _group_(walk, attention)
    module.remove_unused()


def _find(walk: Walk, core: Step) -> _Attention | None:
    products = (core.inputs[:3], core) if core.operator == "Attention" else _find_products(walk, core)
    if products is None:
        return None
    names, product = products
    behind = walk.find_below(product.outputs[0], "Linear")
    roles = [path for name in names if (path := walk.to_layer(name)) is not None]
    if behind is None or len(roles) != 3:
        return None
    rows = _rows_of_heads(walk, roles, [name or "" for name in names])
    if rows is None:
        return None
    heads = len(next(iter(rows.values())))
    candidate = _Attention(core, tuple(roles), behind, rows, heads)
    return candidate if _is_usual(walk, candidate) and _reads_in_order(walk, candidate, product) else None


def _find_products(walk: Walk, softmax: Step) -> tuple[list[str | None], Step] | None:
    """Names of queries, keys and values around a softmax, and the step of the product that reads it.

    None if it is no attention.
    """
    above, below = walk.to_product(softmax.inputs[0]), walk.find_below(softmax.outputs[0], "MatMul")
    if above is None or below is None:
        return None
    ends = [name for step in (softmax, *below.between) for name in step.outputs]
    if below.end.inputs[0] not in ends:
        return None
    return [*above.end.inputs, below.end.inputs[1]], below.end


def _rows_of_heads(walk: Walk, roles: Sequence[Path], names: Sequence[str]) -> dict[str, Tensor] | None:
    """Layer name -> rows of every head (heads, k); None if the rows cannot be assigned to heads."""
    rows: dict[str, Tensor] = {}
    for role, name in zip(roles, names, strict=True):
        start, layer = role.end.outputs[0], str(role.end.run)
        shape = walk.shapes[start]
        sets = _by_head(walk.send(role.between, start, torch.arange(shape[-1]).expand(shape))[name])
        if sets is None or any(len(others) != len(sets) for others in rows.values()):
            return None
        rows[layer] = torch.cat([rows[layer], sets], 1) if layer in rows else sets
    return rows


def _by_head(values: Tensor) -> Tensor | None:
    """Row numbers as (heads, rows), grouped by the only leading axis on which they differ; None if there is none."""
    axes = [axis for axis in range(values.dim() - 2) if _varies(values, axis)]
    if len(axes) != 1:
        return None
    sets: list[Tensor] = []
    for place in range(values.shape[axes[0]]):
        rows = values.select(axes[0], place).unique()
        if sets and torch.equal(rows, sets[0]):  # windows, or samples, and their heads on one axis
            break
        sets.append(rows)
    alike = len({len(rows) for rows in sets}) == 1 and values.shape[axes[0]] % len(sets) == 0
    return torch.stack(sets) if alike else None


def _varies(values: Tensor, axis: int) -> bool:
    return values.shape[axis] > 1 and not bool((values == values.narrow(axis, 0, 1)).all())


def _is_usual(walk: Walk, attention: _Attention) -> bool:
    """Whether heads are ordered as `graph.heads` expects: blocks of all heads, one after the other."""
    inner = walk.module.get_submodule(str(attention.behind.end.run)).in_features
    if attention.heads < 2 or int(inner) % attention.heads:  # type: ignore[arg-type]
        return False
    for name, sets in attention.rows.items():
        count: int = walk.module.get_submodule(name).out_features  # type: ignore[assignment]
        if count % int(inner):  # type: ignore[arg-type]
            return False
        blocks = torch.arange(count).reshape(count // int(inner), attention.heads, -1)  # type: ignore[arg-type]
        if not torch.equal(sets.sort(1).values, blocks.transpose(0, 1).reshape(attention.heads, -1)):
            return False
    return True


def _reads_in_order(walk: Walk, attention: _Attention, product: Step) -> bool:
    """Whether the output projection reads the heads one after the other."""
    inner: int = walk.module.get_submodule(str(attention.behind.end.run)).in_features  # type: ignore[assignment]
    shape = walk.shapes[product.outputs[0]]
    axis = _axis_of_heads(shape, attention.heads)
    if axis is None:
        return False
    sizes = [-1 if place == axis else 1 for place in range(len(shape))]
    marks = (torch.arange(shape[axis]) % attention.heads).reshape(sizes).expand(shape)
    read = walk.send(attention.behind.between, product.outputs[0], marks)[attention.behind.end.inputs[0] or ""]
    expected = torch.arange(attention.heads).repeat_interleave(inner // attention.heads)
    return torch.equal(read.reshape(-1, inner)[0], expected)


def _axis_of_heads(shape: Sequence[int], heads: int) -> int | None:
    """The axis, in front of the last two, of heads or of samples and heads together; None if there is none."""
    axes = [axis for axis in range(len(shape) - 2) if shape[axis] % heads == 0 and shape[axis] > 1]
    exact = [axis for axis in axes if shape[axis] == heads and axis > 0]
    return exact[-1] if exact else next(iter(axes), None)


def _group_(walk: Walk, attention: _Attention) -> bool:
    """Replace the steps of an attention by one `AttentionBlock`, from which heads can be removed.

    Returns False, and changes nothing, if its steps or reshapes do not allow that.
    """
    freed = _follow_heads(walk, attention)
    inner = _inner_steps(walk, attention)
    if freed is None or inner is None or len(attention.layers) not in NAMES:
        return False
    steps, input_names = inner
    module, output = walk.module, attention.behind.end
    block = AttentionBlock(attention.heads)
    block.input_names, block.made, block.steps = input_names, [output.outputs[0]], steps
    where = _place(module, [str(step.run) for step in (*attention.layers, output)])
    for child, step in (*zip(NAMES[len(attention.layers)], attention.layers, strict=True), ("proj", output)):
        _move_layer_(module, block, step, f"{where}.{child}")
    for name in {name for step in steps for name in step.inputs if name in module.constants}:
        _store_in_block_(block, steps, name or "", module.get_constant(name or ""))
    _insert_(module, where, block)
    block.remove_unused()
    at = next(place for place, step in enumerate(module.steps) if step is output)
    module.steps[at] = Step("Attention", where, list(input_names), list(output.outputs), output.node)
    module.steps = [step for step in module.steps if not any(step is each for each in steps)]
    for rule, segments in freed:
        rule.segments = segments
    return True


def _follow_heads(walk: Walk, attention: _Attention) -> list[tuple[Regroup, list[tuple[int, Sizes]]]] | None:
    """How the reshapes before the core depend on the number of remaining heads; None if one cannot."""
    freed: dict[int, tuple[Regroup, list[tuple[int, Sizes]]]] = {}
    for role in attention.roles:
        rows, start = attention.rows[str(role.end.run)], role.end.outputs[0]
        head_of = torch.zeros(rows.numel(), dtype=torch.int64)
        for head, owned in enumerate(rows):
            head_of[owned] = head
        values = walk.send(role.between, start, head_of.expand(walk.shapes[start]))
        for step in role.between:
            if step.operator == "Reshape":
                return None
            if isinstance(step.run, Regroup):
                freed[id(step.run)] = step.run, _by_heads(step.run, values[step.outputs[0]], attention.heads)
    return list(freed.values())


def _by_heads(rule: Regroup, made: Tensor, heads: int) -> list[tuple[int, Sizes]]:
    """The segments of a reshape, with the axis of heads marked as such."""
    varying = [axis for axis in range(made.dim()) if _varies(made, axis)]
    segments: list[tuple[int, Sizes]] = []
    place = 0
    for axes, sizes in rule.segments:
        count = 1 if sizes is None else len(sizes)
        inside = [axis - place for axis in varying if place <= axis < place + count]
        if sizes is not None and len(inside) == 1 and made.shape[place + inside[0]] == heads:
            full: list[int | None] = [
                made.shape[place + at] if sizes[inside[0]] is None else sizes[at] for at in range(count)
            ]
            full[inside[0]] = HEADS
            sizes = full
        segments.append((axes, sizes))
        place += count
    return segments


def _inner_steps(walk: Walk, attention: _Attention) -> tuple[list[Step], list[str]] | None:
    """The steps of an attention in order, and the names it reads; None if other steps read values inside it."""
    module, output = walk.module, attention.behind.end
    inside: dict[int, Step] = {}
    inputs: dict[str, None] = {}
    waiting = [output]
    while waiting:
        step = waiting.pop()
        if id(step) in inside:
            continue
        inside[id(step)] = step
        is_layer = any(step is layer for layer in attention.layers)
        for name in step.inputs:
            if not name or name in module.constants:
                continue
            if is_layer or name not in walk.maker or walk.maker[name].operator in OUTER:
                inputs[name] = None
            else:
                waiting.append(walk.maker[name])
    if id(attention.core) not in inside or len(inside) > MOST_STEPS or len(inputs) > MOST_INPUTS:
        return None
    for step in inside.values():
        for name in step.outputs if step is not output else ():
            outside = any(id(reader) not in inside for reader in walk.readers.get(name, ()))
            if outside or name in module.made:
                return None
    return [step for step in module.steps if id(step) in inside], list(inputs)


def _move_layer_(module: OnnxModule, block: AttentionBlock, step: Step, name: str) -> None:
    before = str(step.run)
    parent, _, last = before.rpartition(".")
    layer = module.get_submodule(before)
    delattr(module.get_submodule(parent), last)
    module.origins[name] = module.origins.pop(before)
    step.run = name.rpartition(".")[2]
    block.add_module(step.run, layer)


def _store_in_block_(block: AttentionBlock, steps: Sequence[Step], name: str, value: Tensor) -> None:
    """Move a constant into the block.

    A bias with an entry for each head ([1,] heads, rows, columns) becomes (heads, ...).
    """
    added = any(step.operator == "Add" and name in step.inputs for step in steps)
    by_head = value.dim() in (3, 4) and value.shape[:-2] in ((1, block.num_heads), (block.num_heads,))
    table = added and value.is_floating_point() and by_head
    block.store_constant(name, value.reshape(value.shape[-3:]) if table else value, learned=table)


def _insert_(module: OnnxModule, where: str, block: Runner) -> None:
    parent, _, last = where.rpartition(".")
    holder: nn.Module = module
    for part in parent.split(".") if parent else ():
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    holder._modules.pop(last, None)
    holder.add_module(last, block)


def _place(module: OnnxModule, names: Sequence[str]) -> str:
    """Name for the block: the layers' common parent if it contains nothing else, else a new name."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) == 1 and (parent := parents.pop()):
        children = {f"{parent}.{child}" for child, _ in module.get_submodule(parent).named_children()}
        if children == set(names):
            return parent
    return f"attention_{sum(isinstance(part, AttentionBlock) for part in module.modules())}"
