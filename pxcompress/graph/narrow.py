"""Attention that goes on when its heads are fewer than its input is wide.

Many a forward takes the width of its input for that of all heads: `C = x.shape[-1]`, then `reshape(B, N, heads,
C // heads)` and `reshape(B, N, C)`, or keeps the number of heads in a shape made long ago. A narrowed module has a
subclass of its class, in whose forward such sizes are those of the heads that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RESHAPES = frozenset({"reshape", "view"})
SETTABLE = "attn_dim"
"""The attribute of timm's own attention that holds the width of all heads."""

SCALES = ("scale", "head_dim", "logit_scale", "temperature")
"""Attributes that hold a scale; without them a forward derives it from the width of a head, wrongly after pruning."""


@dataclass(frozen=True)
class Widths:
    """Heads and width of all of them together, before and after; `stream` is that of a narrowed input, 0 for none."""

    heads: int
    inner: int
    kept: int
    stream: int = 0

    @property
    def kept_inner(self) -> int:
        """Width of the heads that are left."""
        return self.inner // self.heads * self.kept

    def mend(self, x: Tensor, sizes: Sequence[Any]) -> Sequence[Any]:
        """`sizes` to which `x` is reshaped; where `x` does not have them, with the last as the kept heads have it."""
        head_sizes = self._choose_sizes(x, sizes)
        return head_sizes if head_sizes is sizes or -1 in sizes or prod(sizes) != x.numel() else sizes

    def _choose_sizes(self, x: Tensor, sizes: Sequence[Any]) -> Sequence[Any]:
        *front, last_size = sizes
        if not isinstance(last_size, int):  # symbolic while exporting: the batch is in it
            return sizes
        if last_size in (self.inner // self.kept, self.stream // self.kept) and _is(front[-1:], self.kept):
            return (*front, self.inner // self.heads)
        is_inner = _is(x.shape[-1:], self.kept_inner) or _is(x.shape[-2:], self.kept_inner)
        if last_size in (self.inner, self.stream) and is_inner:
            return (*front, self.kept_inner)
        if last_size == self.heads and _is(x.shape[-1:], self.kept):
            return (*front, self.kept)
        return sizes


def _is(sizes: Sequence[Any], product: int) -> bool:
    """Whether there are sizes, none of them symbolic, and this is their product."""
    return len(sizes) > 0 and all(isinstance(size, int) for size in sizes) and prod(sizes) == product


class NarrowedAttention(nn.Module):
    """Mix-in before the class of an attention module, whose forward then runs with the remaining heads."""

    widths_: Widths

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own class returns."""
        with _ReshapeMode(self.widths_):
            return super().forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by the name of the module's own class: this one has none."""
        return _make_empty, (type(self).__bases__[1],), self.__dict__


class _ReshapeMode(TorchFunctionMode):
    """Reshapes to the sizes that the heads that are left have."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in RESHAPES and len(args) > 1 and not kwargs:
            x, *sizes = args
            sizes_are_sequence = isinstance(sizes[0], tuple | list)
            return func(x, self.widths.mend(x, sizes[0] if sizes_are_sequence else sizes))
        return func(*args, **(kwargs or {}))


def narrow_heads_(
    module: nn.Module, heads: int, inner: int, kept_heads: int | None = None, stream: int | None = None
) -> None:
    """Tell `module`, which has `heads` with `inner` rows together, to run with `kept_heads`, or on `stream` inputs.

    A module that keeps the width of its heads as an attribute needs no telling; one without a scale is left as it is.
    """
    if hasattr(module, SETTABLE) or not any(hasattr(module, key) for key in SCALES):
        return
    if isinstance(module, NarrowedAttention):  # in an earlier round: its sizes are those of the first
        changes = {"kept": kept_heads, "stream": stream}
        module.widths_ = replace(module.widths_, **{key: size for key, size in changes.items() if size is not None})
    else:
        module.widths_ = Widths(heads, inner, kept_heads or heads, stream or 0)  # type: ignore[assignment]
        module.__class__ = _make_narrowed_class(type(module))


def _make_narrowed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (NarrowedAttention, kind), {})


def _make_empty(kind: type[nn.Module]) -> nn.Module:
    subclass = _make_narrowed_class(kind)
    return subclass.__new__(subclass)
