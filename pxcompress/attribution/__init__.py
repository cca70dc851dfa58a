"""Attribution: layer-wise relevance propagation in gradient form, for any model, at the price of a gradient.

with attributed(model, parse_composite("gamma"), example) as ruled:
    out = ruled.model(x.requires_grad_())
    (m,) = torch.autograd.grad(out, hidden, start)     # relevance of "hidden": hidden * m
"""

from pxcompress.attribution.attention import SOFTMAX_RULES, has_attention
from pxcompress.attribution.composites import COMPOSITES, Composite, parse_composite
from pxcompress.attribution.engine import AttributedModel, Flow, RuledLayer, UnruledFunction, attributed
from pxcompress.attribution.plrp import VARIANTS, RelevancePruning
from pxcompress.attribution.rules import RULES

__all__ = [
    "COMPOSITES",
    "RULES",
    "SOFTMAX_RULES",
    "VARIANTS",
    "AttributedModel",
    "Composite",
    "Flow",
    "RelevancePruning",
    "RuledLayer",
    "UnruledFunction",
    "attributed",
    "has_attention",
    "parse_composite",
]
