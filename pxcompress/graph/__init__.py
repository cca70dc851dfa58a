"""Finds the removable units of a model and removes them; the only code that uses torch_pruning."""

from pxcompress.graph.attention_layouts import AttentionLayout, register_attention
from pxcompress.graph.dependencies import is_depthwise
from pxcompress.graph.find import find_groups
from pxcompress.graph.removal import REMOVAL_TOLERANCE, mask_units, prune, removal_error
from pxcompress.graph.rotatable import make_rotatable
from pxcompress.graph.rotation import own_all_norms, restore_layer_norms

__all__ = [
    "REMOVAL_TOLERANCE",
    "AttentionLayout",
    "own_all_norms",
    "find_groups",
    "is_depthwise",
    "mask_units",
    "prune",
    "register_attention",
    "removal_error",
    "make_rotatable",
    "restore_layer_norms",
]
