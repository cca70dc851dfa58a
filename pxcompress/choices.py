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

NORMALISATIONS = ("none", "mean", "max", "sum", "norm", "cost", "uniform", "isomorphic", "knapsack")
"""Ways to make groups comparable, as keys of `planning.order.NORMALISATIONS`."""

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
