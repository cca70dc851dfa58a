"""The words that an option may take, each list once. Listing them loads no library: help and recipes are quick.

Methods are listed by `registry.names_in`; tables that give these words their meaning have exactly them as keys, which
a test checks.
"""

from collections.abc import Iterable

from pxcompress.registry import names_in

PROVIDERS = ("auto", *names_in("pxcompress.deploy.backends"))
"""Names of the execution providers that a model can run on; "auto" is CUDA where it works, else the CPU."""

RISKS = ("negative-flips", "disagreement", "accuracy-drop", "top1-error")
"""Risks that can be certified of a classifier, as keys of `certify.path.RISKS`."""

LOSS_RISKS = ("mean-loss", "loss-increase")
"""Risks that can be certified for any task, from a table of losses in [0, 1]; also keys of `certify.path.RISKS`."""

PARTS = ("all", "confident", "classes")
"""Which predictions a certificate covers: all, those of which the dense model is sure, or each class separately."""

NORMALISATIONS = {
    "none": "scores of all groups are compared as they are",
    "mean": "scores are divided by the mean of their group",
    "max": "scores are divided by the largest of their group",
    "sum": "scores are divided by the sum of their group",
    "norm": "scores are divided by the L2 norm of their group",
    "cost": "scores are divided by what the unit costs, in the budget's unit",
    "uniform": "scores become ranks, so that every group loses the same share of its units",
    "isomorphic": "as uniform, but groups of the same form are ranked together (Fang et al. 2024)",
    "knapsack": "no ranking: the widths of all groups that lose the least of the scores within the budget",
}
"""Ways to make the scores of different groups comparable, as keys of `planning.order.NORMALISATIONS`, in words."""

SCOPES = ("all", "inner")
"""Groups that may be pruned: all, or only those inside blocks, so that residual streams keep their width."""

INPUT_LAYOUTS = ("auto", "nchw", "nhwc")
"""Where images of an ONNX file have their channels: "auto" follows the shapes, "nchw" is first, "nhwc" last."""

TARGETS = ("fp32", "fp16", "int8")
"""Precisions that a model can be exported in."""


CONVERSIONS = names_in("pxcompress.deploy.converters")
"""Ecosystems that a slim model can be converted for."""


def one_of(words: Iterable[str]) -> str:
    """Join words for a sentence: "a, b or c"."""
    return " or ".join(", ".join(words).rsplit(", ", 1))
