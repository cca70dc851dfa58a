"""Run the model beside this file on images: python predict.py IMAGE ... [--model model.int8.onnx]

A classifier's answer is printed, as are labels and numbers. Into the current folder are written: a segmentation as
IMAGE.mask.png, in the size that the model takes; boxes and joints drawn into a copy, IMAGE.boxes.png; any other output,
such as an embedding, as IMAGE.npz. Needs onnxruntime, numpy and pillow, nothing else. Preprocessing, task and class
names are read from the ONNX file. A detector's file has raw boxes: the threshold and non-maximum suppression are here.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageDraw

COLOURS = ("red", "lime", "yellow", "cyan", "magenta", "orange", "white", "deepskyblue")
ScoredBox = tuple[int, float, np.ndarray, np.ndarray]  # class, score, corners, joints


def eight_bits(image: Image.Image) -> Image.Image:
    """`image` as RGB or RGBA with 8 bits a channel: the higher of 16; `ValueError` for floats outside 0 to 1."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "I" or not (low >= 0 and high <= 1):
            kind = "32-bit integers" if image.mode == "I" else "floats"
            raise ValueError(f"it holds {kind} from {low:g} to {high:g}; expected 8 or 16 bits, or floats from 0 to 1")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    transparent = "A" in image.getbands() or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def place_image(width: int, height: int, metadata: dict[str, str]) -> tuple[tuple[int, int], int, int]:
    """Size (width, height) to resize an image to, and left and top of the input in it, negative for padding."""
    _, tall, wide = json.loads(metadata["input_size"])
    crop, mode = json.loads(metadata["crop"]), metadata.get("crop_mode", "center")
    full_tall, full_wide = math.floor(tall / crop), math.floor(wide / crop)
    if mode == "squash":
        size = (full_wide, full_tall)
    elif mode == "center" and full_tall == full_wide:  # the shorter side gets this length
        whole = full_tall
        size = (whole, int(whole * height / width)) if width <= height else (int(whole * width / height), whole)
    else:
        scale = (max if mode == "border" else min)(height / full_tall, width / full_wide)
        size = (round(width / scale), round(height / scale))
    left, top = (
        round((own - side) / 2) if own >= side else -((side - own) // 2)
        for own, side in zip(size, (wide, tall), strict=True)
    )
    return size, left, top


def prepare(path: str, metadata: dict[str, str]) -> np.ndarray:
    """Read an image and resize, crop or pad it, scale it to [0, 1] and normalise it: (1, channels, height, width)."""
    channels, height, width = json.loads(metadata["input_size"])
    image = eight_bits(Image.open(path)).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    mean, std = (np.array(json.loads(metadata[key]), dtype=np.float32) for key in ("input_mean", "input_std"))
    size, left, top = place_image(*image.size, metadata)
    image = image.resize(size, Image.Resampling[metadata["interpolation"].upper()])
    fill = [round(255 * value) for value in json.loads(metadata["input_mean"])]
    canvas = Image.new(image.mode, (width, height), fill[0] if channels == 1 else tuple(fill))
    canvas.paste(image, (-left, -top))
    pixels = (np.asarray(canvas, dtype=np.float32) / 255).reshape(height, width, channels)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])


def as_taken(images: np.ndarray, port: ort.NodeArg, metadata: dict[str, str]) -> np.ndarray:
    """Images in the type and layout of the model's input, with channels last if the file has them so."""
    last_by_shape = len(port.shape) == 4 and port.shape[3] in (1, 3, 4) and port.shape[1] not in (1, 3, 4)
    if last_by_shape or metadata.get("input_layout") == "nhwc":
        images = images.transpose(0, 2, 3, 1)
    if port.type == "tensor(uint8)":
        return np.ascontiguousarray(np.rint(images).clip(0, 255), dtype=np.uint8)
    return np.ascontiguousarray(images, dtype=np.float16 if port.type == "tensor(float16)" else np.float32)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def candidates(outputs: dict[str, np.ndarray], metadata: dict[str, str]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Raw boxes: corners (k, 4) in pixels of the input, scores (k, classes), and whether boxes still overlap."""
    _, height, width = json.loads(metadata["input_size"])
    logits = outputs.get("logits")
    if logits is not None and "boxes" in outputs:
        return outputs["boxes"], sigmoid(logits), True
    if logits is not None and "pred_boxes" in outputs:
        boxes = outputs["pred_boxes"] * np.array([width, height, width, height])
        if "layout=rt-detr" in metadata["task"] or any(name.startswith("enc_") for name in outputs):
            scores = sigmoid(logits)
        else:
            shares = np.exp(logits - logits.max(1, keepdims=True))
            scores = (shares / shares.sum(1, keepdims=True))[:, :-1]
    else:
        table = next(value for value in outputs.values() if value.ndim == 2 and len(value) > 4).T
        boxes, scores = table[:, :4], table[:, 4:]
    middle, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([middle - half, middle + half], 1), scores, "pred_boxes" not in outputs


def find_boxes(outputs: dict[str, np.ndarray], metadata: dict[str, str]) -> list[ScoredBox]:
    """Boxes with a high enough score, best first: class, score, corners, and joints (k, 2), in pixels of the input."""
    options = dict(part.split("=", 1) for part in metadata["task"].partition(":")[2].split(",") if part)
    least, most_overlap = float(options.get("score", 0.25)), float(options.get("overlap", 0.6))
    most = 20 if metadata["task"].startswith("keypoints") else 100
    corners, scores, overlap = candidates(outputs, metadata)
    joints = outputs.get("keypoints", np.zeros((len(corners), 0, 3)))[..., :2]
    boxes: list[ScoredBox] = []
    for place in np.argsort(-scores.max(1)):
        kind, score = int(scores[place].argmax()), float(scores[place].max())
        if score < least or len(boxes) == most:
            break
        rivals = [box for other, _, box, _ in boxes if other == kind]
        if not overlap or all(iou(corners[place], box) <= most_overlap for box in rivals):
            boxes.append((kind, score, corners[place], joints[place]))
    return boxes


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes (4,)."""
    shared = np.prod(np.maximum(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0))
    return float(shared / max(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared, 1e-12))


def show_boxes(path: str, outputs: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """Draw boxes into a copy of the image; returns text: class, score, corners and joints in pixels of the image."""
    image, classes, lines = eight_bits(Image.open(path)).convert("RGB"), json.loads(metadata["classes"]), []
    size, left, top = place_image(*image.size, metadata)
    scale = np.tile([image.width / size[0], image.height / size[1]], 2)
    draw = ImageDraw.Draw(image)
    for kind, score, corners, joints in find_boxes(outputs, metadata):
        box = ((corners + np.array([left, top, left, top])) * scale).clip(0, np.tile(image.size, 2)).tolist()
        name = classes[kind] if kind < len(classes) else str(kind)
        colour = COLOURS[kind % len(COLOURS)]
        draw.rectangle(box, outline=colour, width=max(1, min(image.size) // 200))
        draw.text((box[0] + 2, box[1] + 1), f"{name} {score:.2f}", fill=colour)
        lines.append(f"{name} {score:.4f} ({', '.join(f'{value:.1f}' for value in box)})")
        radius = max(1, min(image.size) // 100)
        for x, y in ((joints + np.array([left, top])) * scale[:2]).tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            lines[-1] += f" {x:.1f},{y:.1f}"
    file = f"{Path(path).name}.boxes.png"
    image.save(file)
    return f"{file}: {'; '.join(lines) or 'none'}"


def show(path: str, outputs: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """The text to print for one image, depending on the model's task; `outputs` are those of this image, by name."""
    task, classes = metadata.get("task", "classification").partition(":")[0], json.loads(metadata["classes"])
    name, values = Path(path).name, next(iter(outputs.values()))
    if task in ("detection", "box-agreement", "keypoints"):
        return show_boxes(path, outputs, metadata)
    if task == "classification":
        shares = values if metadata.get("output") == "probabilities" else np.exp(values - values.max())
        best = int(values.argmax())
        return f"{classes[best]}\t{shares[best] / shares.sum():.4f}"
    if task == "multi-label":
        labels = [f"{label} {share:.4f}" for label, share in zip(classes, sigmoid(values), strict=True) if share > 0.5]
        return ", ".join(labels) or "none"
    if task == "regression":
        names = classes or [str(place) for place in range(values.size)]
        return ", ".join(f"{label} {value:.6g}" for label, value in zip(names, values.flat, strict=True))
    if task == "segmentation":
        scores = next(value for value in outputs.values() if value.ndim == 3)
        mask = (scores[0] > 0) if len(scores) == 1 else scores.argmax(0)
        Image.fromarray(mask.astype(np.uint8)).save(f"{name}.mask.png")
        return f"{name}.mask.png"
    np.savez(f"{name}.npz", **outputs)  # type: ignore[arg-type]
    return f"{name}.npz: {', '.join(f'{key} {value.shape}' for key, value in outputs.items())}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print or write what the model makes of every image.")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default=Path(__file__).with_name("model.onnx"))
    options = parser.parse_args()
    session = ort.InferenceSession(options.model, providers=["CPUExecutionProvider"])  # on a GPU: "CUDA..." first
    metadata, port = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0]
    names = [output.name for output in session.get_outputs()]
    copies = port.shape[0] if isinstance(port.shape[0], int) else 1  # of the image, where the file has a fixed batch
    for path in options.images:
        try:
            batch = as_taken(prepare(path, metadata), port, metadata).repeat(copies, axis=0)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise SystemExit(f"predict.py: {path} cannot be read as an image: {error}") from error
        results = session.run(names, {port.name: batch})
        outputs = {name: value[0].astype(np.float64) for name, value in zip(names, results, strict=True)}
        if not all(np.isfinite(value).all() for value in outputs.values()):
            raise SystemExit(f"predict.py: the model returns NaN or infinity for {path}; do not use it")
        print(f"{path}\t{show(path, outputs, metadata)}")


if __name__ == "__main__":
    main()
