"""ImageNet, or a part of it in folders: what is left of top-1, beside what was published.

    python benchmarks/imagenet.py --data DIR --model resnet50 [--checkpoint FILE] [--setting NAME ...]

DIR has train/ and val/, with a folder for every class that is called as in ImageNet (n01440764); a part of the classes
and of the images will do. Weights are timm's, or those of the checkpoint. Every setting is a whole `pxcompress run`;
time is that of the run, memory the most that the process held so far. Published figures are for all 50,000 images of
val/ and for the weights that their authors had.
"""

from __future__ import annotations

import itertools
import json
import resource
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from common import RESULTS, claim, parser, write
from PIL import Image
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo

from pxcompress.pipeline import compress
from pxcompress.recipe import Bench, Recipe
from pxcompress.state import seeded

WHOLE = 50_000
"""Images of val/ for which published figures are."""

SMALL = "resnet10t"
"""The model of --quick."""

DISTILLED = ("closed-form", "finetune:steps=3000")
MLPS = {"budget": "channels", "only": ("*mlp*",), "ratio": 0.5}


@dataclass(frozen=True)
class Setting:
    """What a run is asked for, the best published top-1 for it, whose that is, and what we want to reach, percent."""

    recipe: Mapping[str, object]
    published: float | None = None
    by: str = ""
    target: float | None = None


SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "resnet50": {
        "1.73x fewer MACs": Setting({"ratio": 1 - 1 / 1.73}, 72.58, "two-stage reconstruction", 73.0),
        "1.73x, distilled": Setting({"ratio": 1 - 1 / 1.73, "repair": DISTILLED}, 76.5, "long fine-tuning", 74.5),
        "2x fewer MACs": Setting({"ratio": 0.5}, None, "", 70.5),
        "2x, distilled": Setting({"ratio": 0.5, "repair": DISTILLED}, 76.5, "DepGraph, isomorphic, HALP", 73.5),
        "1.6x faster, 256 a call": Setting({"speedup": 1.6, "bench": Bench(batch_size=256)}, 76.47, "HALP, trained"),
    },
    "deit_base": {
        "MLPs halved": Setting(MLPS, 72.0, "CORP", 74.0),
        "MLPs halved, distilled": Setting({**MLPS, "repair": DISTILLED}, 82.5, "long fine-tuning", 78.0),
    },
    "vit_base": {
        "three classes, a quarter of the units": Setting(
            {"classes": ("n02085620", "n02123045", "n03100240"), "ratio": 0.75, "budget": "channels"},
            by="PXP: 95 % of the accuracy with 43 % of the units, masked",
        )
    },
}
"""Beginning of a model's name -> settings with published figures; the longest that fits counts."""

ANY = {f"{share} of the MACs": Setting({"ratio": 1 - share}) for share in (0.75, 0.5)}
"""Settings for every other model."""


@dataclass(frozen=True)
class Row:
    """What a run's report says; shares, with the 95 % interval of the change of top-1, and seconds and bytes."""

    model: str
    setting: str
    dense: float
    pruned: float
    change_low: float
    change_high: float
    samples: int
    macs_left: float
    units_left: float
    speedup: float
    seconds: float
    peak_bytes: int
    published: float | None = None
    by: str = ""


def settings_of(model: str) -> Mapping[str, Setting]:
    """Those with published figures for this model, or `ANY`."""
    fitting = [name for name in SETTINGS if model.startswith(name)]
    return SETTINGS[max(fitting, key=len)] if fitting else ANY


def run_setting(inputs: Mapping[str, object], name: str) -> Row:
    """One run; `inputs` are the recipe's fields for the model and the data."""
    model = str(inputs["model"])
    setting = settings_of(model)[name]
    recipe = Recipe(**{**inputs, **setting.recipe})  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as place:
        report = compress(recipe, Path(place) / "run", note=lambda text: print(f"    {text}", flush=True))
    return Row(
        model,
        name,
        report.dense.quality.value,
        report.pruned.quality.value,
        report.change.low,
        report.change.high,
        report.pruned.samples,
        report.ratios.macs,
        sum(group.kept for group in report.groups) / sum(group.units for group in report.groups),
        report.ratios.speedup_p50,
        sum(stage.seconds for stage in report.stages),
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        setting.published,
        setting.by,
    )


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What we want to reach, and that the published figure is passed; only where all of ImageNet's images are there."""
    stated = []
    for row in rows:
        setting = settings_of(row.model).get(row.setting)
        for target in (setting.target, setting.published) if setting and row.samples >= WHOLE else ():
            if target is not None:
                stated.append(claim(f"{row.model}, {row.setting}: top-1, percent", 100 * row.pruned, target, "higher"))
    return stated


def make_small_folder(folder: Path) -> Path:
    """A folder with eight of ImageNet's classes, of images that show nothing, and a checkpoint of 1000 outputs."""
    names = ImageNetInfo().label_names()[3:19:2]
    draw = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "val"), names, range(12)):
        path = folder / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    with seeded(0):
        save_file(timm.create_model(SMALL, num_classes=1000).state_dict(), folder / "weights.safetensors")
    return folder


def main() -> None:
    """Rows of other models and settings stay."""
    command_line = parser(__doc__ or "")
    command_line.add_argument("--data", help="a folder with train/ and val/")
    command_line.add_argument("--model", default="resnet50")
    command_line.add_argument("--checkpoint")
    command_line.add_argument("--setting", action="append", help="only this one")
    options = command_line.parse_args()
    if not options.quick and options.data is None:
        command_line.error("--data is missing: the folder that holds ImageNet's train/ and val/")
    with tempfile.TemporaryDirectory() as place:
        inputs = {"model": options.model, "data": options.data, "checkpoint": options.checkpoint}
        if options.quick:
            folder = make_small_folder(Path(place))
            inputs = {
                "model": SMALL,
                "data": str(folder),
                "checkpoint": str(folder / "weights.safetensors"),
                "input_size": 32,
            }
        path = RESULTS / ("quick/imagenet.json" if options.quick else "imagenet.json")
        earlier = json.loads(path.read_text())["rows"] if path.exists() else []
        row_by_setting = {(row["model"], row["setting"]): Row(**row) for row in earlier}
        known_names = list(settings_of(str(inputs["model"])))
        names = options.setting or known_names
        if unknown_names := set(names) - set(known_names):
            command_line.error(f"no setting {min(unknown_names)!r} for this model; there are: {', '.join(known_names)}")
        for name in names[:1] if options.quick else names:
            row = row_by_setting[str(inputs["model"]), name] = run_setting(inputs, name)
            print(f"{row.model}, {name}: {row.dense:.2%} -> {row.pruned:.2%} (published: {row.published})")
            rows = list(row_by_setting.values())
            command = "python benchmarks/imagenet.py" + " --quick" * options.quick
            write("imagenet", command, [asdict(each) for each in rows], [0], claims(rows))


if __name__ == "__main__":
    main()
