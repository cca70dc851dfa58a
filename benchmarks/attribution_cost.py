"""What attribution costs: time and memory next to a plain gradient, and what autocast changes. Used by attribution.py.

Plain forward + backward: eval mode, gradients of the target logit towards all weights, none towards the input. The
attribution pass goes on to the input and computes no weight gradients; its copy of the model is made once, before.
The loop: zennit's own rules, layer by layer the same, with its canonizer, one sample at a time, without the latent
relevances that PXP's code also stores. PXP's code attaches the composite anew for every call; once for all is cheaper.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import timm
import torch
import torchvision
from torch import Tensor, nn
from zennit import rules as zennit_rules
from zennit.composites import NameLayerMapComposite
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, AvgPool

from pxcompress.attribution import RuledLayer, attributed, parse_composite
from pxcompress.attribution.relevance import TOLERANCE, relative_error
from pxcompress.graph import find_groups
from pxcompress.models.loading import classifier_names
from pxcompress.scorers.lrp import LRP
from pxcompress.types import Batch, Group

SIDE, BATCH = 64, 16
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torchvision.models.resnet50,  # zennit's canonizer knows torchvision's residual blocks only
    "vit_small_patch16_224": lambda: timm.create_model("vit_small_patch16_224", img_size=SIDE),
    "resnet18": torchvision.models.resnet18,
}
MIXED = {"resnet50": "pxp-cnn", "vit_small_patch16_224": "pxp-vit"}
LEAST = {"epsilon": 0.5, "gamma": 0.25, "alpha2beta1": 0.25}
"""Targets of throughput / plain throughput; mixed composites: as gamma."""


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model with drawn weights in eval mode, and a batch of normalised noise."""
    torch.manual_seed(0)
    return MODELS[name]().eval(), torch.randn(BATCH, 3, SIDE, SIDE)


def composites(model: str) -> tuple[str, ...]:
    return (*LEAST, MIXED[model])


def plain_pass(model: nn.Module, x: Tensor) -> None:
    """Forward and backward with weight gradients."""
    model.zero_grad(set_to_none=True)
    model(x)[:, 0].sum().backward()


def relevance_pass(model: nn.Module, x: Tensor) -> None:
    """Forward and backward to the input, with whatever rules are attached."""
    x = x.detach().requires_grad_()
    logits = model(x)
    start = torch.zeros_like(logits)
    start[:, 0] = 1
    torch.autograd.grad(logits, x, start)


def zennit_composite(layers: Sequence[RuledLayer], model: str) -> NameLayerMapComposite:
    """zennit's rules for the same layers."""
    named = [
        ([layer.name], getattr(zennit_rules, type(layer.rule).__name__)(**dataclasses.asdict(layer.rule)))
        for layer in layers
    ]
    canonizers = [ResNetCanonizer()] if model.startswith("resnet") else []
    others = [(Activation, zennit_rules.Pass()), (AvgPool, zennit_rules.Norm())]
    return NameLayerMapComposite(name_map=named, layer_map=others, canonizers=canonizers)


def timed(call: Callable[[], None], samples: int) -> float:
    """Samples per second of one call."""
    start = time.perf_counter()
    call()
    return samples / (time.perf_counter() - start)


def speed(model_name: str, rounds: int, loop_samples: int) -> list[dict[str, Any]]:
    """One row per composite; every round times all of them in turn, ratios are those of one round.

    The first round warms up and does not count, unless it is the only one.
    """
    model, x = build(model_name)
    measurements: dict[str, list[dict[str, float]]] = {text: [] for text in composites(model_name)}
    for turn in range(rounds):
        for text, rounds_measured in measurements.items():
            row = one_composite(model_name, model, x, text, loop_samples)
            if turn or rounds == 1:
                rounds_measured.append(row)
    return [speed_row(model_name, text, rounds_measured) for text, rounds_measured in measurements.items()]


def one_composite(name: str, model: nn.Module, x: Tensor, text: str, loop_samples: int) -> dict[str, float]:
    start = time.perf_counter()
    with attributed(model, parse_composite(text), x[:1]) as twin:
        setup = time.perf_counter() - start
        relevance_pass(twin.model, x[:2])
        plain = timed(lambda: plain_pass(model, x), BATCH)
        ours = timed(lambda: relevance_pass(twin.model, x), BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            relevance_pass(twin.model, x[:2])
            low = timed(lambda: relevance_pass(twin.model, x), BATCH)
        layers = twin.layers
    composite, part = zennit_composite(layers, name), x[:loop_samples]
    entering = timed(lambda: loop_entering(model, composite, part), loop_samples)
    with composite.context(model) as registered:
        loop = timed(lambda: [relevance_pass(registered, one) for one in part.split(1)], loop_samples)
        batched = timed(lambda: relevance_pass(registered, x), BATCH)
    model.zero_grad(set_to_none=True)
    seconds = {"plain": plain, "ours": ours, "bf16": low, "loop": loop, "loop_entering": entering}
    return {**seconds, "zennit_batched": batched, "setup_seconds": setup}


def loop_entering(model: nn.Module, composite: NameLayerMapComposite, inputs: Tensor) -> None:
    """The loop as PXP's `lrp_pass` does it: the composite is attached and detached around every call."""
    for one in inputs.split(1):
        with composite.context(model) as registered:
            relevance_pass(registered, one)


def speed_row(model: str, text: str, measured: Sequence[dict[str, float]]) -> dict[str, Any]:
    def ratio(over: str, of: str = "ours") -> dict[str, float]:
        values = [row[of] / row[over] for row in measured]
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    medians = {f"{key}_samples_per_s": statistics.median(row[key] for row in measured) for key in ("plain", "ours")}
    return {
        "part": "speed",
        "model": model,
        "composite": text,
        "side": SIDE,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "rounds": len(measured),
        **medians,
        "ours_over_plain": ratio("plain"),
        "ours_over_loop": ratio("loop_entering"),
        "ours_over_loop_registered_once": ratio("loop"),
        "ours_over_zennit_batched": ratio("zennit_batched"),
        "bf16_over_float32": ratio("ours", "bf16"),
        "setup_seconds": statistics.median(row["setup_seconds"] for row in measured),
    }


def speed_claims(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        name = f"{row['model']}, {row['composite']}, {SIDE} px, batch {BATCH}"
        least = LEAST.get(row["composite"], 0.25)
        text = f"{name}: throughput / plain forward + backward"
        yield common.claim(text, row["ours_over_plain"]["median"], least, "higher")
        text = f"{name}: throughput / sample-by-sample loop with zennit as PXP's code has it"
        yield common.claim(text, row["ours_over_loop"]["median"], 10, "higher")
        text = f"{name}: throughput / the same loop with zennit's composite attached once for all samples"
        yield common.claim(text, row["ours_over_loop_registered_once"]["median"], 10, "higher")


# --- memory: every case in a process of its own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Batches drawn anew in every iteration, so that they take no memory."""

    samples: int

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.samples // BATCH):
            yield torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), torch.zeros(BATCH, dtype=torch.int64)


def peak_bytes() -> int:
    """The process's largest resident set so far. Not ru_maxrss, which a child inherits from its parent; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def memory_here(model_name: str, what: str) -> int:
    """Growth of the peak resident set, from before the model is built, over two passes of `what`."""
    before = peak_bytes()
    model, x = build(model_name)
    if what == "plain":
        for _ in range(2):
            plain_pass(model, x)
    elif what.startswith("collect:"):
        group = Group("conv1", "channel", 64, last_block(model))
        LRP()(model, [group], Noise(int(what.partition(":")[2])))
    else:
        with attributed(model, parse_composite(what), x[:1]) as twin:
            for _ in range(2):
                relevance_pass(twin.model, x)
    return peak_bytes() - before


def last_block(model: nn.Module) -> tuple[Any, ...]:
    """The members of the first inner convolution of a torchvision ResNet-18: found by hand, as tracing takes memory."""
    from pxcompress.types import Member

    index = torch.arange(64).unsqueeze(1)
    return (Member("layer1.0.conv1", "out", index), Member("layer1.0.conv2", "in", index))


def memory_in_child(model: str, what: str) -> int:
    """`memory_here` in a fresh process, where freed tensors go back to the system at once."""
    command = [sys.executable, str(Path(__file__)), model, what]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return int(json.loads(process.stdout.splitlines()[-1]))


def memory(models: Sequence[str], samples: tuple[int, int]) -> list[dict[str, Any]]:
    how = "growth of the peak resident set (VmHWM) from before the model is built, in a process of its own"
    rows = []
    for model in models:
        plain = memory_in_child(model, "plain")
        for text in composites(model):
            ours = memory_in_child(model, text)
            row = {"part": "memory", "model": model, "composite": text, "side": SIDE, "batch": BATCH, "how": how}
            rows.append({**row, "plain_bytes": plain, "ours_bytes": ours, "ratio": ours / plain})
    few, many = (memory_in_child("resnet18", f"collect:{count}") for count in samples)
    row = {"part": "memory", "model": "resnet18", "composite": "epsilon", "side": SIDE, "batch": BATCH, "how": how}
    rows.append({**row, "samples": list(samples), "bytes": [few, many], "ratio": many / few})
    return rows


def memory_claims(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if "samples" in row:
            few, many = row["samples"]
            text = f"resnet18, scorer lrp: peak memory with {many} samples / with {few}"
            yield common.claim(text, row["ratio"], 1.1, "lower")
        else:
            text = f"{row['model']}, {row['composite']}: peak memory / plain forward + backward, batch {BATCH}"
            yield common.claim(text, row["ratio"], 1.5, "lower")


# --- autocast ---------------------------------------------------------------------------------------------------------


def autocast(name: str, model: nn.Module, inputs: Tensor, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Deviation of S1 under bf16 from float32 on a trained model, and whether the scorer refuses it."""
    from pxcompress.errors import InputError

    example = inputs[:1]
    groups = find_groups(model, example, classifier_names(model, example)).groups
    batches = [(inputs, torch.zeros(len(inputs), dtype=torch.int64))]
    rows = []
    for text in texts:
        exact = LRP(composite=text)(model, groups, batches)
        with torch.autocast("cpu", torch.bfloat16):
            off = relative_error(LRP(composite=text)(model, groups, batches), exact)
        try:
            LRP(composite=text, autocast="bf16")(model, groups, batches)
            refused = False
        except InputError:
            refused = True
        row = {"part": "autocast", "model": name, "composite": text, "precision": "bf16"}
        rows.append({**row, "samples": len(inputs), "s1_deviation": off, "refused": refused})
    return rows


def autocast_claims(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    wrong = sum(row["refused"] != (row["s1_deviation"] > TOLERANCE) for row in rows)
    text = f"bf16: of {len(rows)} cases, refused although within {TOLERANCE:g} of float32, or taken although not"
    yield common.claim(text, wrong, 0, "equal")
    deviations = [row["s1_deviation"] for row in rows if not row["refused"]]
    text = (
        f"bf16: largest deviation of S1 from float32 of the {len(deviations)} of {len(rows)} cases that are not refused"
    )
    yield common.claim(text, max(deviations, default=0.0), TOLERANCE, "lower")


if __name__ == "__main__":
    print(json.dumps(memory_here(*sys.argv[1:])))
