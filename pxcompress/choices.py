"""The words that an option may take, each list once. Listing them loads no library: help and recipes are quick.

Methods are listed by `registry.names_in`; tables that give these words their meaning have exactly them as keys, which
a test checks.
"""

from collections.abc import Iterable

from pxcompress.registry import names_in

PROVIDERS = ("auto", *names_in("pxcompress.deploy.backends"))
"""Names of the execution providers that a model can run on; "auto" is CUDA where it works, else the CPU."""

RISKS = ("negative-flips", "disagreement", "accuracy-drop", "top1-error")
"""What can be certified of a classifier, as keys of `certify.path.RISKS`."""

LOSS_RISKS = ("mean-loss", "loss-increase")
"""What can be certified of any task, from a table of losses in [0, 1]; the other keys of `certify.path.RISKS`."""

PARTS = ("all", "confident", "classes")
"""Predictions that a certificate is about: all, those of which the dense model is sure, or every class by itself."""

NORMALISATIONS = ("none", "mean", "max", "sum", "norm", "cost", "uniform", "isomorphic", "knapsack")
"""Ways to make groups comparable, as keys of `planning.order.NORMALISATIONS`."""

SCOPES = ("all", "inner")
"""Groups that may be pruned: all, or those inside of residual streams only."""

INPUT_LAYOUTS = ("auto", "nchw", "nhwc")
"""Place of the channels in images that an ONNX file takes: as its shapes tell, first, or last (`onnx_file.LAYOUTS`)."""

TARGETS = ("fp32", "fp16", "int8")
"""Precisions that a model can be exported in."""


CONVERSIONS = names_in("pxcompress.deploy.converters")
"""Ecosystems that a slim model can be converted for."""


def one_of(words: Iterable[str]) -> str:
    """The words as part of a sentence: "a, b or c"."""
    return " or ".join(", ".join(words).rsplit(", ", 1))
