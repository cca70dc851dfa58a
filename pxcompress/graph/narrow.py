"""Lets attention modules run with fewer heads than their forward expects, by changing the sizes of reshapes.

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
WIDTH_ATTRIBUTE = "attn_dim"
"""The attribute, in timm's own attention, for the width of all heads together; it can simply be set."""

SCALES = ("scale", "head_dim", "logit_scale", "temperature")
"""Attributes with a scale.

Without them a forward computes the scale from the width of a head, wrongly after pruning.
"""


@dataclass(frozen=True)
class Widths:
    """Number of heads and their total width, before and after removal.

    `stream` is the width of a narrowed input, or 0.
    """

    heads: int
    inner: int
    heads_left: int
    stream: int = 0

    @property
    def kept_inner(self) -> int:
        """Total width of the heads that remain."""
        return self.inner // self.heads * self.heads_left

    def adapt_sizes(self, x: Tensor, sizes: Sequence[Any]) -> Sequence[Any]:
        """The sizes to which `x` must be reshaped: `sizes`, or if these do not fit, with the remaining heads' width."""
        head_sizes = self._choose_sizes(x, sizes)
        return head_sizes if head_sizes is sizes or -1 in sizes or prod(sizes) != x.numel() else sizes

    def _choose_sizes(self, x: Tensor, sizes: Sequence[Any]) -> Sequence[Any]:
        *front, last_size = sizes
        if not isinstance(last_size, int):  # symbolic while exporting: the batch is in it
            return sizes
        head_widths = self.inner // self.heads_left, self.stream // self.heads_left
        if last_size in head_widths and _is(front[-1:], self.heads_left):
            return (*front, self.inner // self.heads)
        is_inner = _is(x.shape[-1:], self.kept_inner) or _is(x.shape[-2:], self.kept_inner)
        if last_size in (self.inner, self.stream) and is_inner:
            return (*front, self.kept_inner)
        if last_size == self.heads and _is(x.shape[-1:], self.heads_left):
            return (*front, self.heads_left)
        return sizes


def _is(sizes: Sequence[Any], product: int) -> bool:
    """Whether `sizes` are plain numbers and multiply to `product`."""
    return len(sizes) > 0 and all(isinstance(size, int) for size in sizes) and prod(sizes) == product


class NarrowedAttention(nn.Module):
    """A mix-in in front of an attention module's class, whose forward then runs with the remaining heads."""

    widths_: Widths

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module's own forward, with reshapes adapted to the remaining heads."""
        with _ReshapeMode(self.widths_):
            return super().forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the name of the module's own class, since this class is made on the fly."""
        return _make_empty, (type(self).__bases__[1],), self.__dict__


class _ReshapeMode(TorchFunctionMode):
    """A mode in which reshapes use the sizes of the remaining heads."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in RESHAPES and len(args) > 1 and not kwargs:
            x, *sizes = args
            sizes_are_sequence = isinstance(sizes[0], tuple | list)
            return func(x, self.widths.adapt_sizes(x, sizes[0] if sizes_are_sequence else sizes))
        return func(*args, **(kwargs or {}))


def narrow_heads_(
    module: nn.Module, heads: int, inner: int, kept_heads: int | None = None, stream: int | None = None
) -> None:
    """Make `module`, built for `heads` with `inner` rows in all, run with `kept_heads` or on `stream` inputs, in place.

    A module that stores the total width of its heads needs nothing; one without a stored scale is left as it is.
    """
    if hasattr(module, WIDTH_ATTRIBUTE) or not any(hasattr(module, key) for key in SCALES):
        return
    if isinstance(module, NarrowedAttention):  # in an earlier round: its sizes are those of the first
        changes = {"heads_left": kept_heads, "stream": stream}
        module.widths_ = replace(module.widths_, **{key: size for key, size in changes.items() if size is not None})
    else:
        module.widths_ = Widths(heads, inner, kept_heads or heads, stream or 0)  # type: ignore[assignment]
        module.__class__ = _make_narrowed_class(type(module))


def _make_narrowed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (NarrowedAttention, kind), {})


def _make_empty(kind: type[nn.Module]) -> nn.Module:
    subclass = _make_narrowed_class(kind)
    return subclass.__new__(subclass)
