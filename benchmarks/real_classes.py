"""An ImageNet EfficientNet-Lite fine-tuned to sixteen classes of photographs, then `pxcompress run` as a user runs it.

    python benchmarks/real_classes.py --ratios 0.5 [--methods "defaults;magnitude, ridge fold"]

The objects are cut from free photographs; those of val/ are in no image of train/. Top-1 is that of the report: of the
exported files, on the test split.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import RESULTS, claim, parser, write
from photographs import CLASSES, class_folder
from public_weights import efficientnet_lite
from real import images, normalised
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pxcompress.cache import cache_dir
from pxcompress.pipeline import compress
from pxcompress.recipe import Bench, Recipe
from pxcompress.state import seeded

LABEL, SIDE, CROP = "lite1", 240, 0.882
EPOCHS, BATCH, RATE = 2, 32, 3e-4
METHODS: dict[str, dict[str, object]] = {
    "defaults": {},
    "closed form": {"repair": ("closed-form",)},
    "defaults, 300 steps": {"repair": ("closed-form", "finetune:steps=300")},
    "magnitude, ridge fold": {"scorer": "magnitude", "repair": ("fold",)},
}


TARGETS = {"closed form": 0.04, "defaults": 0.04, "defaults, 300 steps": 0.02}
"""What a method may lose of top-1, a share, with half of the MACs."""


@dataclass(frozen=True)
class Row:
    """What a run's report says of the fine-tuned model and of the pruned one."""

    method: str
    removed: float
    dense: float
    pruned: float
    samples: int
    macs_left: float
    speedup: float


def fine_tuned(folder: Path) -> Path:
    """A checkpoint of the network with sixteen outputs, trained once: its head first, then all of it."""
    path = cache_dir() / "photographs" / f"{LABEL}-{len(CLASSES)}.safetensors"
    if not path.exists():
        model = efficientnet_lite(LABEL, num_classes=len(CLASSES))
        parts = [images(folder / "train" / name, SIDE, CROP) for name in sorted(CLASSES)]
        inputs = torch.cat(parts)
        labels = torch.cat([torch.full((len(part),), place) for place, part in enumerate(parts)])
        with seeded(0):
            _train_head(model, inputs, labels)
            _train_all(model, inputs, labels)
        save_file(model.state_dict(), path)
    return path


def _train_head(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        parts = (model.forward_features(normalised(part)) for part in inputs.split(BATCH))
        features = torch.cat([model.forward_head(part, pre_logits=True) for part in parts])
    head = model.get_classifier()
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        cross_entropy(head(features), labels).backward()
        optimiser.step()


def _train_all(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """AdamW with a falling rate; BatchNorm keeps ImageNet's statistics."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    steps = EPOCHS * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(inputs)).split(BATCH):
            optimiser.zero_grad()
            cross_entropy(model(normalised(inputs[chosen])), labels[chosen], label_smoothing=0.1).backward()
            optimiser.step()
            schedule.step()


def rows(ratios: list[float], methods: list[str]) -> Iterator[Row]:
    """One run for every method and ratio."""
    folder = class_folder()
    checkpoint = fine_tuned(folder)
    for method in methods:
        for ratio in ratios:
            recipe = Recipe(
                f"tf_efficientnet_{LABEL}",
                ratio,
                data=str(folder),
                checkpoint=str(checkpoint),
                budget="macs",
                bench=Bench(threads=1),
                **METHODS[method],
            )
            with tempfile.TemporaryDirectory() as place:
                report = compress(recipe, Path(place) / "run", note=lambda text: print(f"    {text}", flush=True))
            yield Row(
                method,
                ratio,
                report.dense.quality.value,
                report.pruned.quality.value,
                report.pruned.samples,
                report.ratios.macs,
                report.ratios.speedup_p50,
            )


def main() -> None:
    """Rows of other methods and ratios stay."""
    command_line = parser(__doc__ or "")
    command_line.add_argument("--ratios", default="0.5")
    command_line.add_argument("--methods", default=";".join(METHODS), help="names with semicolons")
    options = command_line.parse_args()
    path = RESULTS / "real_classes.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    row_by_key = {(row["method"], row["removed"]): Row(**row) for row in earlier}
    for row in rows([float(each) for each in options.ratios.split(",")], options.methods.split(";")):
        row_by_key[row.method, row.removed] = row
        print(f"{row.method} {row.removed}: {row.dense:.1%} -> {row.pruned:.1%}")
        lost = {
            name: row_by_key[name, 0.5].dense - row_by_key[name, 0.5].pruned
            for name in TARGETS
            if (name, 0.5) in row_by_key
        }
        stated = [
            claim(f"16 classes, {name}, half of the MACs: top-1 lost", value, TARGETS[name], "lower")
            for name, value in lost.items()
        ]
        command = "python benchmarks/real_classes.py"
        write("real_classes", command, [asdict(each) for each in row_by_key.values()], [0], stated)


if __name__ == "__main__":
    main()
