"""The only door to torch_pruning: which units a model has, and their physical removal."""

from pxcompress.graph.attention_layouts import AttentionLayout, register_attention
from pxcompress.graph.dependencies import is_depthwise
from pxcompress.graph.find import find_groups
from pxcompress.graph.removal import REMOVAL_TOLERANCE, mask_units, prune, removal_error

__all__ = [
    "REMOVAL_TOLERANCE",
    "AttentionLayout",
    "find_groups",
    "is_depthwise",
    "mask_units",
    "prune",
    "register_attention",
    "removal_error",
]
