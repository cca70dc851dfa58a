"""The only door to torch_pruning: which units a model has, and their physical removal."""

from pxcompress.graph.attention_layouts import AttentionLayout, register_attention
from pxcompress.graph.dependencies import is_depthwise
from pxcompress.graph.find import find_groups
from pxcompress.graph.removal import REMOVAL_TOLERANCE, masked, prune, removal_error
from pxcompress.graph.rotatable import rotatable
from pxcompress.graph.rotation import are_rotated_norms_of, settled

__all__ = [
    "REMOVAL_TOLERANCE",
    "AttentionLayout",
    "are_rotated_norms_of",
    "find_groups",
    "is_depthwise",
    "masked",
    "prune",
    "register_attention",
    "removal_error",
    "rotatable",
    "settled",
]
