"""Shows layer by layer whether relevance is conserved: what enters and leaves, and what biases absorb."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.attribution import AttributedModel, Flow, attributed, parse_composite
from pxcompress.attribution.relevance import make_start
from pxcompress.columns import align
from pxcompress.errors import InputError
from pxcompress.scorers.lrp import LRP
from pxcompress.state import device_of

SAMPLES = 16
"""Most inputs for which relevance is shown, since all activations of a pass are in memory."""


@dataclass(frozen=True)
class LayerFlow:
    """One executed layer: relevance at its output and its input, as shares of the relevance of the model's output.

    `absorbed`, the difference, is what the layer's bias (and a stabiliser) took.
    """

    name: str
    kind: str
    rule: str
    relevance_out: float
    relevance_in: float
    absorbed: float


@dataclass(frozen=True)
class UnruledFlow:
    """Relevance through a function without an LRP rule, by its ordinary gradient.

    `share` is the sum of the relevance at its outputs, `size` the sum of its sizes, which does not cancel; both as
    shares of the relevance of the model's output, None where the function is only counted.
    """

    module: str
    kind: str
    function: str
    calls: int
    share: float | None
    size: float | None


@dataclass(frozen=True)
class Conservation:
    """How much relevance enters and leaves every layer, in executed order, for a model's predictions.

    `relevance` is what starts at the output, a mean over samples, in units of the logit.
    """

    composite: str
    start: str
    target: str
    inputs: str
    samples: int
    weights: str
    relevance: float
    layers: tuple[LayerFlow, ...]
    unruled: tuple[UnruledFlow, ...]


def random_images(shape: tuple[int, ...], samples: int = 8, seed: int = 0) -> Tensor:
    """Images of independent standard normal pixels, like normalised images on average: (samples, *shape)."""
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))


def conservation(
    model: nn.Module, inputs: Tensor, composite: str = "", *, data: str = "random images", weights: str = ""
) -> Conservation:
    """Follow the relevance of `model`'s predictions for the first `SAMPLES` of `inputs`, layer by layer.

    `composite` "" is the default of the scorer `lrp`, whose start and target are used in any case; `data` and `weights`
    are words for the record. Raises `InputError` for a composite that cannot be read, and where the predicted logits
    add up to 0, so that there is no relevance to follow. The model is left as it was.
    """
    scorer = LRP() if not composite else LRP(composite=composite)
    rules = parse_composite(scorer.composite)
    inputs = inputs[:SAMPLES].to(device_of(model))

    def start(logits: Tensor) -> Tensor:
        return make_start(scorer.start, "prediction")(logits, logits.argmax(1))

    with attributed(model, rules, inputs[:1]) as twin:
        with torch.no_grad():
            logits = twin.model(inputs)
        total = float((start(logits) * logits).sum()) / len(inputs)
        if abs(total) < 1e-6 * float(logits.abs().max()) or total == 0:
            raise InputError(
                f"the predicted logits of {type(model).__name__} add up to {total:g} on {data}, so there is no "
                "relevance to follow; give weights with --checkpoint, or images with --data"
            )
        flows = twin.flow(inputs, start)
        return Conservation(
            str(rules),
            scorer.start,
            "prediction",
            data,
            len(inputs),
            weights,
            total,
            tuple(_make_layer(flow) for flow in flows if flow.rule is not None),
            _list_unruled(twin, flows),
        )


def _make_layer(flow: Flow) -> LayerFlow:
    into = flow.relevance_in or 0.0
    return LayerFlow(flow.name, flow.kind, str(flow.rule), flow.relevance_out, into, flow.relevance_out - into)


def _list_unruled(twin: AttributedModel, flows: tuple[Flow, ...]) -> tuple[UnruledFlow, ...]:
    """The functions without a rule, with the relevance that passed through each."""
    shares: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for flow in flows:
        if flow.rule is None:
            shares[flow.name, flow.kind] += flow.relevance_out  # type: ignore[assignment]
            sizes[flow.name, flow.kind] += flow.size  # type: ignore[assignment]
    rows = []
    for row in twin.unruled:
        key = (row.module, row.function)
        is_followed = key in sizes
        share, size = (shares[key], sizes[key]) if is_followed else (None, None)
        rows.append(UnruledFlow(row.module, row.kind, row.function, row.calls, share, size))
    return tuple(rows)


def to_table(result: Conservation) -> str:
    """The relevance of every layer as text for a terminal."""
    of = f", {result.weights} weights" if result.weights else ""
    lines = [
        f"relevance of the {result.target} ({result.start}: {result.relevance:.4g} on average) with {result.composite} "
        f"on {result.samples} x {result.inputs}{of}; shares of it, branches side by side have parts:",
        "",
    ]
    rows = [("layer", "rule", "out", "in", "absorbed")]
    for row in result.layers:
        shares = f"{row.relevance_out:.2%}", f"{row.relevance_in:.2%}", f"{row.absorbed:.2%}"
        rows.append((row.name, row.rule, *shares))
    lines += align(rows, "<<>>>")
    absorbed_share = sum(row.absorbed for row in result.layers)
    lines += ["", f"absorbed by biases, all layers together: {absorbed_share:.2%}", ""]
    if not result.unruled:
        return "\n".join([*lines, "everything that relevance passes through has a rule"])
    lines.append("without a rule (plain gradient), with the relevance that passed through, and its size:")
    for flow in result.unruled:
        share_text = "not followed" if flow.share is None else f"{flow.share:.2%} {flow.size:.2%}"
        lines.append(f"{flow.module}: {flow.function} x {flow.calls} in {flow.kind}: {share_text}")
    return "\n".join(lines)
