"""Public weights and free photographs or sounds, no labels: how near a pruned model stays to the dense one.

Every method gets the same unlabelled samples; agreement is the share of other samples, of other sources, on which
pruned and dense model name the same class. EfficientNet-Lite sees photographs, CREPE hears tones of instruments. Parts
can be run one by one; rows of other parts stay.

    python benchmarks/real.py --model lite1 --samples 256,1024 --part ours
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from common import RESULTS, claim, parser, write
from photographs import photograph_folder
from PIL import Image, ImageEnhance, ImageFilter
from public_weights import EFFICIENTNETS, efficientnet_lite
from rivals import Onnxsim, Refused, TorchPruning, onnx_macs, onnxsim_repairs, reestimate
from tones import crepe, frames
from torch import Tensor, nn

from pxcompress.clock import Clock
from pxcompress.cost.count import count_macs
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.intervals import wilson_interval
from pxcompress.deploy.runtime import open_session
from pxcompress.passes.parts import HeldOut
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.run_folder.smaller_images import resize_images
from pxcompress.stages import cut, plan_at, score
from pxcompress.state import seeded
from pxcompress.types import Batch, ScoredModel

REMOVED = (0.1, 0.3, 0.5)
"""Shares of the MACs to remove; the middle one is that of most targets."""
BATCH = 32
CREPE = "crepe"
PARTS = ("calibration", "judge")

OURS: dict[str, dict[str, object]] = {
    "defaults": {},
    "closed form": {"repair": ("closed-form",)},
    "defaults, 300 steps": {"repair": ("closed-form", "finetune:steps=300")},
    "magnitude, ridge fold": {"scorer": "magnitude", "repair": ("fold",)},
    "magnitude, closed form": {"scorer": "magnitude", "repair": ("closed-form",)},
}
RIVALS = {
    "Torch-Pruning, L2": TorchPruning("L2", "global"),
    "Torch-Pruning, L2, isomorphic": TorchPruning("L2", "isomorphic"),
    "Torch-Pruning, Taylor": TorchPruning("Taylor", "global"),
}


ONNXSIM = "onnxsim, best of its variants"
OTHERS = {*RIVALS, ONNXSIM, *(f"{name}, BatchNorm re-estimated" for name in RIVALS), "magnitude, ridge fold"}


@dataclass(frozen=True)
class Row:
    """Agreement of one pruned model with its dense one on photographs that no method saw, with its 95 % interval.

    `cpu_seconds` are those of the process that made it, None where only wall time was taken.
    """

    model: str
    method: str
    samples: int
    removed: float
    macs_left: float
    agreement: float
    low: float
    high: float
    top5: float
    divergence: float
    cpu_seconds: float | None
    images: str = "photographs"

    @property
    def key(self) -> tuple[object, ...]:
        """What tells rows apart."""
        return self.model, self.method, self.samples, self.removed, self.images


@dataclass(frozen=True, eq=False)
class Subject:
    """A dense model, samples to calibrate on and to judge by (photographs as bytes), and its logits on the latter."""

    label: str
    model: nn.Module
    calibration: Tensor
    judge: Tensor
    logits: Tensor

    @classmethod
    def of(cls, label: str, quick: bool) -> Subject:
        """The model with all its samples: photographs (n, 3, height, width) in its size, or frames of sound."""
        if label == CREPE:
            model, parts = crepe(), [frames(part) for part in PARTS]
        else:
            model, folder = efficientnet_lite(label), photograph_folder()
            side, crop = model.pretrained_cfg["input_size"][-1], model.pretrained_cfg["crop_pct"]
            parts = [images(folder / part, side, crop) for part in PARTS]
        calibration, judge = parts[0], parts[1][:64] if quick else parts[1]
        return cls(label, model, calibration, judge, predictions(model, judge))

    def batches(self, samples: int, change: Callable[[Tensor], Tensor] | None = None) -> list[Batch]:
        """Photographs to calibrate on, drawn once for all methods; labels are the dense model's own predictions."""
        order = torch.randperm(len(self.calibration), generator=torch.Generator().manual_seed(0))[:samples]
        chosen = self.calibration[order] if change is None else change(self.calibration[order])
        labels = predictions(self.model, chosen).argmax(1)
        return [(normalised(part), mine) for part, mine in zip(chosen.split(BATCH), labels.split(BATCH), strict=True)]

    def row(self, method: str, samples: int, removed: float, model: nn.Module, seconds: float, images: str) -> Row:
        """How near `model` is to the dense one."""
        example = normalised(self.judge[:1])
        left = count_macs(model, example) / count_macs(self.model, example)
        measured = self.measure(predictions(model, self.judge))
        return Row(self.label, method, samples, removed, left, **measured, cpu_seconds=seconds, images=images)

    def measure(self, logits: Tensor) -> dict[str, float]:
        """How near `logits` (n, classes) of the samples to judge by are to the dense ones: fields of a row."""
        dense = self.logits
        same = float((logits.argmax(1) == dense.argmax(1)).double().mean())
        among = float((logits.topk(5).indices == dense.argmax(1, keepdim=True)).any(1).double().mean())
        change = (dense.softmax(1) * (dense.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
        interval = wilson_interval(same, len(dense))
        return {
            "agreement": same,
            "low": interval.low,
            "high": interval.high,
            "top5": among,
            "divergence": float(change),
        }


def images(folder: Path, side: int, crop: float) -> Tensor:
    """All images of a folder, resized and cropped as the model expects, (n, 3, side, side) bytes."""
    large, edge = round(side / crop), (round(side / crop) - side) // 2
    arrays = []
    for path in sorted(folder.iterdir()):
        image = Image.open(path).resize((large, large), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(image.crop((edge, edge, edge + side, edge + side))))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def normalised(values: Tensor) -> Tensor:
    """Bytes as EfficientNet-Lite takes them, from -1 to 1; numbers as they are."""
    return values if values.is_floating_point() else values.float() / 127.5 - 1


def predictions(model: nn.Module, values: Tensor) -> Tensor:
    """Logits (n, classes) of samples as `Subject` holds them."""
    with torch.no_grad():
        return torch.cat([model(normalised(part)) for part in values.split(BATCH)])


def ours(
    subject: Subject,
    samples: int,
    methods: Sequence[str],
    images: str = "photographs",
    sizes: Sequence[float] = REMOVED,
) -> Iterator[Row]:
    """Each scorer scores once and is cut at all sizes, as `pxcompress sweep` does; every row counts the scoring."""
    batches = subject.batches(samples, SHIFTS.get(images))
    example = batches[0][0][:1]
    fit = HeldOut(batches, others=True)
    parts = {"score": fit, "repair": fit, "held-out": HeldOut(batches)}
    results: dict[str, tuple[ScoredModel, Run, float]] = {}
    for method in methods:
        recipe = Recipe(subject.label, REMOVED[1], budget="macs", **OURS[method])
        run = Run(recipe, parts, Clock(lambda text: print(f"    {text}", flush=True)))
        if recipe.scorer not in results:
            begin = time.process_time()
            with seeded(0):
                prepared, run = prepare(subject.model, example, run)
                scored = score(prepared, run)
            results[recipe.scorer] = scored, run, time.process_time() - begin
        scored, cached_run, scoring = results[recipe.scorer]
        run = replace(cached_run, recipe=recipe)
        for removed in sizes if "steps" not in method else REMOVED[1:2]:
            begin = time.process_time()
            with seeded(0):
                slim = cut(scored, plan_at(scored, removed, recipe), run)
            seconds = scoring + time.process_time() - begin
            yield subject.row(method, samples, removed, slim.pruned.model, seconds, images)


def rivals(subject: Subject, samples: int) -> Iterator[Row]:
    """Torch-Pruning's models as they are, and with BatchNorm statistics of the same photographs."""
    batches = subject.batches(samples)
    for method, rival in RIVALS.items():
        begin = time.process_time()
        models = rival(subject.model, batches[0][0][:1], batches, [1 - removed for removed in REMOVED])
        seconds = time.process_time() - begin
        for removed in REMOVED:
            model = models[1 - removed]
            if isinstance(model, Refused):
                print(f"{method} at {removed}: {model.reason}", file=sys.stderr)
                continue
            yield subject.row(method, samples, removed, model, seconds, "photographs")
            model = reestimate(model, batches)
            yield subject.row(f"{method}, BatchNorm re-estimated", samples, removed, model, seconds, "photographs")


def onnxsim(subject: Subject, samples: int) -> Iterator[Row]:
    """onnxsim's pruned files, refitted and not: of all variants the one that agrees most on the judged samples."""
    batches = subject.batches(samples)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        export_onnx(subject.model, batches[0][0][:1], dense, {})
        macs = onnx_macs(onnx.load(dense))
        best: dict[float, Row] = {}
        for importance in ("magnitude", "Wanda"):
            begin = time.process_time()
            slims = Onnxsim(importance)(dense, batches, [1 - removed for removed in REMOVED])
            for removed, slim in zip(REMOVED, slims.values(), strict=True):
                if isinstance(slim, Refused):
                    print(f"onnxsim, {importance}, at {removed}: {slim.reason}", file=sys.stderr)
                    continue
                for file in (slim, *onnxsim_repairs(dense, slim, batches)):
                    measured, seconds = subject.measure(file_predictions(file, subject.judge)), time.process_time()
                    left = onnx_macs(onnx.load(slim)) / macs
                    row = Row(subject.label, ONNXSIM, samples, removed, left, **measured, cpu_seconds=seconds - begin)
                    print(f"    {file.name}: {row.agreement:.1%}")
                    best[removed] = max(best.get(removed, row), row, key=lambda each: each.agreement)
    yield from best.values()


def file_predictions(file: Path, values: Tensor) -> Tensor:
    """Logits (n, classes) of an ONNX file for samples as `Subject` holds them."""
    session = open_session(file, "cpu", threads=1)
    return torch.cat([torch.from_numpy(session.predict(normalised(part).numpy())) for part in values.split(BATCH)])


def _each(change: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    def apply(values: Tensor) -> Tensor:
        arrays = [np.asarray(change(Image.fromarray(each.permute(1, 2, 0).numpy()))) for each in values]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    return apply


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "half the contrast": _each(lambda image: ImageEnhance.Contrast(image).enhance(0.5)),
    "blurred": _each(lambda image: image.filter(ImageFilter.GaussianBlur(2))),
}
"""What photographs to calibrate on are made like; models are judged on those as they are."""


class SmallerImages(nn.Module):
    """A model that sees images resized to a smaller side."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model = model
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return self.model(resize_images(x, (self.side, self.side)).clamp(-1, 1))


def smaller_images(subject: Subject) -> Iterator[Row]:
    """The dense model on smaller images: what fewer MACs cost where nothing is pruned, and what agreement is worth."""
    side, example = subject.judge.shape[-1], normalised(subject.judge[:1])
    for smaller in range(side - 16, side // 2, -16):
        model = SmallerImages(subject.model, smaller).eval()
        share = count_macs(model, example) / count_macs(subject.model, example)
        if share > 0.45:
            yield subject.row(f"dense, {smaller} pixels", 0, round(1 - share, 2), model, 0.0, "photographs")


def by_data(subject: Subject) -> Iterator[Row]:
    """Closed form from few samples to many, and magnitude with the same repairs where they are fewest."""
    for samples in (32, 64, 128, 256, 512, 1024):
        methods = ("closed form", "magnitude, closed form")[: 1 + (samples == 32)]
        yield from ours(subject, samples, methods, sizes=REMOVED[1:2])


def claims(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The targets of the issue that asked for this benchmark, and what was measured."""
    of = {row.key: row for row in rows}
    stated = []
    for samples, target in ((256, 0.65), (1024, 0.75)):
        for method in ("closed form", "defaults"):
            if row := of.get(("lite1", method, samples, 0.3, "photographs")):
                text = f"lite1, {samples} samples, 0.7 of the MACs left, {method}: agreement"
                stated.append(claim(text, row.agreement, target, "higher"))
        if row := of.get(("lite1", "defaults, 300 steps", samples, 0.3, "photographs")):
            text = f"lite1, {samples} samples, 0.7 of the MACs left, 300 label-free steps: agreement"
            stated.append(claim(text, row.agreement, 0.80, "higher"))
    sizes = {(row.model, row.samples, row.removed) for row in rows if row.images == "photographs"}
    for model, samples, removed in sorted(sizes):
        mine = of.get((model, "closed form", samples, removed, "photographs"))
        others = [
            row
            for row in rows
            if (row.model, row.samples, row.removed) == (model, samples, removed) and row.method in OTHERS
        ]
        if mine and others:
            best = max(others, key=lambda row: row.agreement)
            text = f"{model}, {samples} samples, {1 - removed:.1f} of the MACs: above the best other, {best.method}"
            stated.append(claim(text, mine.agreement - best.agreement, 0.0, "higher"))
    stated += by_data_claims(rows)
    for images in SHIFTS:
        shifted = of.get(("lite1", "closed form", 256, 0.3, images))
        right = of.get(("lite1", "closed form", 256, 0.3, "photographs"))
        if shifted and right:
            text = f"lite1, calibrated on photographs {images}: agreement lost against the right ones"
            stated.append(claim(text, right.agreement - shifted.agreement, 0.05, "lower"))
    return stated


def by_data_claims(rows: Sequence[Row]) -> list[dict[str, object]]:
    """More photographs never hurt, and few do no worse than with magnitude."""
    stated = []
    at_target = [row for row in rows if (row.model, row.removed, row.images) == ("lite1", 0.3, "photographs")]
    curve = sorted((row.samples, row.agreement) for row in at_target if row.method == "closed form")
    if len(curve) > 2:
        worst = min(later[1] - earlier[1] for earlier, later in itertools.pairwise(curve))
        stated.append(claim("lite1, 32 to 1024 samples: least rise for twice as many", worst, -0.02, "higher"))
    by_magnitude = next(
        (row for row in at_target if row.method == "magnitude, closed form" and row.samples == 32), None
    )
    if curve and curve[0][0] == 32 and by_magnitude:
        text = "lite1, 32 samples: above magnitude with the same repairs"
        stated.append(claim(text, curve[0][1] - by_magnitude.agreement, 0.0, "higher"))
    return stated


def main() -> None:
    """Run the parts that are asked for."""
    command_line = parser(__doc__ or "")
    command_line.add_argument("--model", default="lite1", choices=(*EFFICIENTNETS, CREPE))
    command_line.add_argument("--samples", default="256,1024")
    command_line.add_argument("--part", default="ours,rivals,data,shift")
    command_line.add_argument("--removed", default=",".join(map(str, REMOVED)), help="shares, for ours")
    command_line.add_argument("--method", default="", help="some of ours, with semicolons, instead of all")
    options = command_line.parse_args()
    subject = Subject.of(options.model, options.quick)
    folder = RESULTS / "quick" if options.quick else RESULTS
    row_by_key: dict[tuple[object, ...], Row] = {}
    if (folder / "real.json").exists():
        earlier = (Row(**row) for row in json.loads((folder / "real.json").read_text())["rows"])
        row_by_key = {row.key: row for row in earlier}
    sizes = [32] if options.quick else [int(each) for each in options.samples.split(",")]
    removed = [float(each) for each in options.removed.split(",")]
    methods = tuple(options.method.split(";")) if options.method else tuple(OURS)
    work: dict[str, Callable[[], Iterator[Row]]] = {
        "ours": lambda: itertools.chain.from_iterable(
            ours(subject, samples, methods, sizes=removed) for samples in sizes
        ),
        "rivals": lambda: itertools.chain.from_iterable(rivals(subject, samples) for samples in sizes),
        "onnxsim": lambda: itertools.chain.from_iterable(onnxsim(subject, samples) for samples in sizes),
        "data": lambda: by_data(subject),
        "smaller-images": lambda: smaller_images(subject),
        "shift": lambda: itertools.chain.from_iterable(
            ours(subject, 256, ("closed form",), name, REMOVED[1:2]) for name in SHIFTS
        ),
    }
    for part in options.part.split(","):
        for row in work[part]():
            print(
                f"{row.model} {row.samples} {row.removed} {row.method}: {row.agreement:.1%} ({row.cpu_seconds:.0f} s)"
            )
            row_by_key[row.key] = row
            rows = sorted(row_by_key.values(), key=lambda each: str(each.key))
            command = "python benchmarks/real.py" + (" --quick" if options.quick else "")
            write("real", command, [asdict(each) for each in rows], [0], claims(rows))


if __name__ == "__main__":
    main()
