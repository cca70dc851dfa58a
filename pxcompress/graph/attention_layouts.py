"""Descriptions of attention modules: one record for each family, used to find and remove their heads.

A family of your own is one record in one file that is imported before the model is pruned, such as the one that defines
the model:

    from pxcompress.graph import AttentionLayout, register_attention

    register_attention(
        AttentionLayout("my-attention", projections=("to_qkv",), outputs=("to_out",), counts=("n_head",), rows="heads")
    )

Nothing else has to be told. That heads can go is proved on the example as for every other group: with a record that
does not fit the module, its heads stay whole, and `pxcompress inspect` says by how much the outputs differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class AttentionLayout:
    """How the attention modules of one family store their heads.

    All names are those of attributes of the attention module, or of a part of it ("self.num_attention_heads").
    """

    name: str

    projections: tuple[str, ...]
    """Names of child modules whose linear layers make queries, keys and values; those that exist are used."""

    outputs: tuple[str, ...]
    """Names of child modules that may hold the linear layer behind the heads; a module has exactly one."""

    counts: tuple[str, ...] = ("num_heads",)
    """Attributes that may hold the number of heads, the most likely first."""

    sizes: tuple[str, ...] = ()
    """Attributes that may hold the width of one head, for modules that do not store the number of heads."""

    rows: Literal["blocks", "heads"] = "blocks"
    """Order of a projection's rows. "blocks": the queries of all heads, then the keys of all, then the values.
    "heads": queries, keys and values of the first head, then those of the second."""

    widths: tuple[str, ...] = ()
    """Further attributes that grow with the number of heads, unlike the scale or the width of one head."""

    tables: tuple[str, ...] = ("table",)
    """Parts of names of parameters with one entry a head on their last axis; in others it is the first axis."""

    caches: tuple[str, ...] = ()
    """Attributes with a dictionary of values computed from all heads, which is emptied when heads are removed."""

    marks: tuple[str, ...] = ()
    """Attributes of which one must be true, for families that the names of children alone do not identify."""

    def heads(self, module: nn.Module) -> int:
        """Number of heads of `module` if it belongs to this family; 0 for any other module."""
        if self.marks and not any(getattr(module, mark, False) for mark in self.marks):
            return 0
        outputs = layers_below(module, self.outputs)
        if not layers_below(module, self.projections) or len(outputs) != 1:
            return 0
        if count := _read_first(module, self.counts):
            return count
        width: int = module.get_submodule(outputs[0]).in_features  # type: ignore[assignment]
        return width // size if (size := _read_first(module, self.sizes)) else 0


def _read_first(module: nn.Module, paths: Sequence[str]) -> int:
    """The first whole number among the attributes `paths` of a module; 0 if there is none."""
    values = (read_attribute(module, path) for path in paths)
    return next((value for value in values if isinstance(value, int)), 0)


def read_attribute(module: nn.Module, path: str) -> Any:
    """The value of an attribute of `module` or its parts, such as "self.num_attention_heads"; None if it is missing."""
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


def layers_below(module: nn.Module, children: Sequence[str], kind: type[nn.Module] = nn.Linear) -> list[str]:
    """Names of all layers of `kind` inside those `children` that `module` has."""
    parts = [(name, child) for name in children if isinstance(child := getattr(module, name, None), nn.Module)]
    return [
        f"{part}.{name}".rstrip(".")
        for part, child in parts
        for name, layer in child.named_modules()
        if isinstance(layer, kind)
    ]


ATTENTION_LAYOUTS: dict[str, AttentionLayout] = {}
"""The registered families by name. A module that fits several belongs to the one registered last."""


def register_attention(layout: AttentionLayout) -> None:
    """Register a family, which takes precedence over earlier ones. Raises `ValueError` for a name that is taken."""
    if layout.name in ATTENTION_LAYOUTS:
        raise ValueError(f"attention layout {layout.name!r} is registered twice; give it another name")
    ATTENTION_LAYOUTS[layout.name] = layout


def layout_of(module: nn.Module) -> AttentionLayout | None:
    """The family (`AttentionLayout`) of an attention module; None for any other module."""
    return next((layout for layout in reversed(ATTENTION_LAYOUTS.values()) if layout.heads(module)), None)


_PROJECTIONS = ("qkv", "qk", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj")
_OUTPUTS = ("proj", "out_proj")
_COUNTS = ("num_heads", "heads")
_WIDTHS = ("attn_dim", "all_head_dim", "attention_dim", "key_attn_dim", "val_attn_dim")

# timm's usual attention, and nn.MultiheadAttention as `models.rewrite.ExplicitAttention`.
register_attention(AttentionLayout("usual", _PROJECTIONS, _OUTPUTS, _COUNTS, widths=_WIDTHS))
# LeViT: keys are narrower than values (`val_dim`), and biases by position are cached for each device.
register_attention(
    AttentionLayout(
        "levit",
        _PROJECTIONS,
        _OUTPUTS,
        _COUNTS,
        rows="heads",
        widths=_WIDTHS,
        caches=("attention_bias_cache",),
        marks=("val_dim",),
    )
)
# MaxViT and CoAtNet, as far as they keep what belongs to a head together (`head_first`).
register_attention(
    AttentionLayout("maxvit", _PROJECTIONS, _OUTPUTS, _COUNTS, rows="heads", widths=_WIDTHS, marks=("head_first",))
)
# Hugging Face's: BERT, RoBERTa, ELECTRA keep projections and output apart, YOLOS and older ViTs by other names;
# DistilBERT; ViT, DINOv2, SegFormer; DETR and RT-DETR, which hold the size of a head alone.
register_attention(
    AttentionLayout("bert", ("self",), ("output",), ("self.num_attention_heads",), widths=("self.all_head_size",))
)
register_attention(
    AttentionLayout(
        "yolos", ("attention",), ("output",), ("attention.num_attention_heads",), widths=("attention.all_head_size",)
    )
)
register_attention(AttentionLayout("distilbert", ("q_lin", "k_lin", "v_lin"), ("out_lin",), ("n_heads",)))
register_attention(
    AttentionLayout(
        "transformers",
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("num_attention_heads", "num_heads"),
        sizes=("head_dim",),
    )
)
