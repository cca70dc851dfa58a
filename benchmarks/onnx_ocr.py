"""What is left of rapidocr's detector, recogniser and direction classifier, beside onnxsim on the same files.

    python benchmarks/onnx_ocr.py --files FOLDER [--net det|rec|cls ...] [--tool ours|onnxsim ...]

Pages and lines are rendered, with the fonts at hand, of words from Python's own documentation; calibration has no
labels. Ours has the defaults of a run. Of onnxsim, which simplifies the file first, the best of magnitude and Wanda at
the same MACs, both refitted (`apply_pruning_finetune`) and with BatchNorm recovered, chosen by what is measured here;
where it leaves more MACs, a row says how many. Figures: F1 of boxes at IoU 0.5 against the true lines, and against
those of the dense net; edits per character; share of directions that are right. Rows go into onnx_in.json.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from pydoc_data import topics
from typing import Any

import common
import numpy as np
import onnx
import onnx_in
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from pxcompress import compress_module
from pxcompress.cost.count import count_macs
from pxcompress.deploy.all_outputs import run_graph
from pxcompress.deploy.onnx_modules import read_onnx
from pxcompress.onnx_in import read_file
from pxcompress.state import seeded

SIZES = (0.75, 0.5)
"""Shares of the dense MACs that are left."""

SEED = 0
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Shares of channels that onnxsim is asked to remove, until the MACs are as near as they get."""
NEAR = 0.08
FAILURES = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AssertionError)
PAGE, LINE, TURNED = (256, 256), (48, 320), (48, 192)

Array = np.ndarray
Quality = Callable[[Path], dict[str, float]]


@dataclass(frozen=True)
class Net:
    """A file, what its inputs are made of, and how many: to calibrate, and to be judged by."""

    file: str
    figure: str
    better: str
    counts: tuple[int, int]
    draw: Callable[[int, int], tuple[Array, list[Any]]]
    judge: Callable[[Array, Array, list[Any], Path], dict[str, float]]
    logits: Callable[[Tensor], Tensor] | None = None


# Rendered text


@cache
def _words() -> list[str]:
    return re.findall(r"[A-Za-z]{2,11}", " ".join(topics.topics.values()))


@cache
def _fonts() -> list[str]:
    """Fonts for running text."""
    paths = font_manager.findSystemFonts() or [font_manager.findfont("DejaVu Sans")]
    return sorted(path for path in paths if "DejaVu" in path and "Light" not in path)


def _text(draw: np.random.Generator, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Words, one behind the other, that are at most as wide."""
    text, start = "", int(draw.integers(len(_words()) - 50))
    for word in _words()[start : start + 50]:
        longer = f"{text} {word}".strip()
        if font.getlength(longer) > width:
            break
        text = longer
    return text or "a"


def _colours(draw: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dark ink on a light ground."""
    return tuple(draw.integers(0, 90, 3).tolist()), tuple(draw.integers(190, 256, 3).tolist())


def _normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Array:
    pixels = np.asarray(image, dtype=np.float32) / 255
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


def draw_pages(count: int, seed: int) -> tuple[Array, list[Any]]:
    """Pages (n, 3, height, width) as the detector takes them, and boxes (left, top, right, bottom) of their lines."""
    draw, pages, boxes = np.random.default_rng(seed), [], []
    for _ in range(count):
        ink, ground = _colours(draw)
        page, lines, top = Image.new("RGB", PAGE[::-1], ground), [], int(draw.integers(6, 30))
        while top < PAGE[0] - 40:
            font = ImageFont.truetype(str(draw.choice(_fonts())), int(draw.integers(13, 26)))
            left = int(draw.integers(6, 60))
            text = _text(draw, font, PAGE[1] - left - 8 - int(draw.integers(0, 90)))
            pen = ImageDraw.Draw(page)
            pen.text((left, top), text, fill=ink, font=font)
            lines.append(pen.textbbox((left, top), text, font=font))
            top = int(lines[-1][3] + draw.integers(10, 34))
        pages.append(_normalised(page, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        boxes.append(lines)
    return np.stack(pages), boxes


def _draw_line(draw: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, str]:
    ink, ground = _colours(draw)
    font = ImageFont.truetype(str(draw.choice(_fonts())), int(draw.integers(24, 34)))
    text = _text(draw, font, size[1] - 16)
    image = Image.new("RGB", size[::-1], ground)
    left, top, _, bottom = font.getbbox(text)
    ImageDraw.Draw(image).text((6 - left, (size[0] - bottom - top) / 2), text, fill=ink, font=font)
    return image, text


def draw_lines(count: int, seed: int) -> tuple[Array, list[Any]]:
    """Lines (n, 3, 48, width) as the recogniser takes them, and their texts."""
    draw = np.random.default_rng(seed)
    drawn = [_draw_line(draw, LINE) for _ in range(count)]
    return np.stack([_normalised(image, (0.5,), (0.5,)) for image, _ in drawn]), [text for _, text in drawn]


def draw_turned(count: int, seed: int) -> tuple[Array, list[Any]]:
    """Lines, every other one upside down, and whether they are."""
    draw = np.random.default_rng(seed)
    images = [_draw_line(draw, TURNED)[0] for _ in range(count)]
    turned = [image.rotate(180) if place % 2 else image for place, image in enumerate(images)]
    return np.stack([_normalised(image, (0.5,), (0.5,)) for image in turned]), [place % 2 for place in range(count)]


# Figures


def _boxes(probabilities: Array) -> list[tuple[int, int, int, int]]:
    """Boxes of the regions above 0.3, grown as the detector was trained to shrink them."""
    regions, _ = ndimage.label(probabilities > 0.3)
    boxes = []
    for rows, columns in ndimage.find_objects(regions):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) >= 3:
            grown = round(1.5 * height * width / (2 * (height + width)))
            boxes.append((columns.start - grown, rows.start - grown, columns.stop + grown, rows.stop + grown))
    return boxes


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def _f1(boxes: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]) -> float:
    """Of boxes, each matched to at most one that is expected."""
    hits = 0
    for boxes_of_image, true_boxes in zip(boxes, expected, strict=True):
        left = list(true_boxes)
        for box in boxes_of_image:
            best = max(left, key=lambda other: _overlap(box, other), default=None)
            if best is not None and _overlap(box, best) > 0.5:
                left.remove(best)
                hits += 1
    return 2 * hits / max(sum(map(len, boxes)) + sum(map(len, expected)), 1)


def judge_pages(outputs: Array, dense: Array, truth: list[Any], file: Path) -> dict[str, float]:
    """F1 of boxes against the true lines, and against the dense net's."""
    boxes, before = ([_boxes(page[0]) for page in each] for each in (outputs, dense))
    return {"box F1": _f1(boxes, truth), "box F1 to dense": _f1(boxes, before)}


@cache
def _letters(file: Path) -> list[str]:
    facts = {entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props}
    return ["", *facts["character"].split("\n"), " "]


def _read(scores: Array, letters: Sequence[str]) -> str:
    """The text of scores (time, letters): the best letter at every time, once where it repeats."""
    best = scores.argmax(-1)
    return "".join(letters[at] for at, before in zip(best, [0, *best[:-1]], strict=True) if at and at != before)


def _edits(text: str, truth: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(truth) + 1))
    for place, letter in enumerate(text, 1):
        before, row[0] = row[0], place
        for at, wanted in enumerate(truth, 1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (letter != wanted))
    return row[-1]


def judge_lines(outputs: Array, dense: Array, truth: list[Any], file: Path) -> dict[str, float]:
    """Edits per character, spaces left out."""
    letters = _letters(file)
    texts = [_read(scores, letters[: scores.shape[-1]]).replace(" ", "") for scores in outputs]
    truths = [text.replace(" ", "") for text in truth]
    return {"character error": sum(map(_edits, texts, truths)) / sum(map(len, truths))}


def judge_turned(outputs: Array, dense: Array, truth: list[Any], file: Path) -> dict[str, float]:
    """Share of directions that are right."""
    return {"directions right": float((outputs.argmax(1) == np.array(truth)).mean())}


NETS: Mapping[str, Net] = {
    "det": Net("rapidocr-v4-det", "box F1", "higher", (32, 48), draw_pages, judge_pages),
    "rec": Net(
        "rapidocr-v4-rec",
        "character error",
        "lower",
        (96, 128),
        draw_lines,
        judge_lines,
        lambda outputs: outputs.amax(-1).mean(1),
    ),
    "cls": Net("rapidocr-v2.0-cls", "directions right", "higher", (512, 512), draw_turned, judge_turned),
}

# Both tools


def outputs_of(file: Path, inputs: Array) -> Array:
    """The first output of a file, in batches of 8."""
    name = onnx.load(file, load_external_data=False).graph.input[0].name
    parts = np.split(inputs, range(8, len(inputs), 8))
    return np.concatenate([run_graph(file, {name: part})[0] for part in parts])


def ours(net: Net, file: Path, inputs: Array, out: Path) -> Iterator[tuple[float, str, Path]]:
    """MACs left, what was done, and the pruned file, for each of the sizes."""
    module = read_onnx(file, {_input_name(file): inputs.shape[1:]})
    example = torch.from_numpy(inputs[:1])
    batches = list(torch.from_numpy(inputs).split(16))
    options = {} if net.logits is None else {"logits": net.logits}
    for size in SIZES:
        with seeded(SEED):
            result = compress_module(module, example, batches, 1 - size, note=print, **options)
        slim = result.pruned.model
        path = out / f"{file.stem}-{size}.onnx"
        slim.write_onnx(path, {})
        yield count_macs(slim, example) / count_macs(module, example), "ours", path


def onnxsims(file: Path, inputs: Array, out: Path) -> Iterator[tuple[float, str, Path]]:
    """The same for onnxsim, for every share of channels and importance that it can do."""
    onnxsim = importlib.import_module("onnxsim")
    name, example = _input_name(file), torch.from_numpy(inputs[:1])
    calibration = {"calibration_data": [{name: each[None]} for each in inputs]}
    dense, _ = onnxsim.simplify(file.as_posix())
    macs = count_macs(read_file(file, {name: inputs.shape[1:]}), example)
    prunes = {
        "magnitude": (onnxsim.apply_structured_pruning, {}),
        "Wanda": (onnxsim.apply_structured_wanda_pruning, calibration),
    }
    for importance, (prune, needed) in prunes.items():
        for share in SHARES:
            path = out / f"{file.stem}-{importance}-{share}.onnx".lower()
            try:
                slim = prune(dense, sparsity=share, **needed)
                onnx.save(slim, path)
                left = count_macs(read_file(path, {name: inputs.shape[1:]}), example) / macs
                if share != SHARES[-1] and min(abs(left - size) for size in SIZES) > NEAR:
                    continue
                yield left, importance, path
                slim = onnxsim.apply_pruning_finetune(dense, slim, **calibration)
                yield left, f"{importance}, refitted", _saved(slim, path, "refitted")
                slim = onnxsim.recover_batch_norm(slim, target_model=dense, **calibration)
                yield left, f"{importance}, refitted, BatchNorm", _saved(slim, path, "batchnorm")
            except FAILURES as error:
                print(f"onnxsim, {importance}, {share}: {type(error).__name__}: {str(error).splitlines()[:1]}")


def _saved(model: onnx.ModelProto, path: Path, ending: str) -> Path:
    path = path.with_suffix(f".{ending}.onnx")
    onnx.save(model, path)
    return path


def _input_name(file: Path) -> str:
    return onnx.load(file, load_external_data=False).graph.input[0].name


def measure(label: str, folder: Path, tools: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one net: dense, ours, and onnxsim's best at each size."""
    net = NETS[label]
    file, out = folder / f"{net.file}.onnx", folder / "pruned"
    out.mkdir(exist_ok=True)
    inputs, _ = net.draw(net.counts[0], SEED + 1)
    judged, truth = net.draw(net.counts[1], SEED + 2)
    dense = outputs_of(file, judged)
    rows = [{"task": label, "net": net.file, "tool": "dense", "macs_left": 1.0, **net.judge(dense, dense, truth, file)}]
    made = [ours(net, file, inputs, out)] if "ours" in tools else []
    made += [onnxsims(file, inputs, out)] if "onnxsim" in tools else []
    for left, tool, path in chain.from_iterable(made):
        try:
            figures = net.judge(outputs_of(path, judged), dense, truth, file)
        except FAILURES as error:
            figures = {"failure": str(error).splitlines()[0]}
        rows.append({"task": label, "net": net.file, "tool": tool, "macs_left": round(left, 3), **figures})
        print(rows[-1], flush=True)
    return rows


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At each size ours against the best of onnxsim's that keeps as many MACs or more, or up to NEAR fewer."""
    made = []
    for label, net in NETS.items():
        own = [row for row in rows if row["task"] == label and row["tool"] == "ours"]
        theirs = [row for row in rows if row["task"] == label and row["tool"] not in ("ours", "dense")]
        for row in own:
            size = min(SIZES, key=lambda size: abs(size - row["macs_left"]))
            near = [each[net.figure] for each in theirs if each["macs_left"] >= size - NEAR and net.figure in each]
            if near:
                best = max(near) if net.better == "higher" else min(near)
                text = f"{net.file} at {size} of the MACs: {net.figure}, target is onnxsim's best, with as many or more"
                made.append(common.claim(text, row[net.figure], best, net.better))
    return made


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--files", type=Path, required=True, help="a folder that onnx_files.py has filled")
    parser.add_argument("--net", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--tool", nargs="+", choices=["ours", "onnxsim"], default=["ours", "onnxsim"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for label in args.net:
        onnx_in.add_tasks(label, measure(label, args.files, args.tool), args.quick)


if __name__ == "__main__":
    main()
