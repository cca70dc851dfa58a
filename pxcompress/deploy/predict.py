"""Run the model beside this file on images: python predict.py IMAGE ... [--model model.int8.onnx]

A classifier's answer is printed, as are labels and numbers; a segmentation is written into
the current folder as IMAGE.mask.png, in the size that the model takes, any other output, such as an embedding, as
IMAGE.npz. Needs onnxruntime, numpy and pillow,
nothing else. Preprocessing, task and class names are read from the ONNX file.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image


def eight_bits(image: Image.Image) -> Image.Image:
    """`image` as RGB or RGBA of 8 bits a channel: 16 bits lose the lower 8, floats have to be from 0 to 1."""
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


def prepare(path: str, facts: dict[str, str]) -> np.ndarray:
    """One image as the model takes it, (1, channels, height, width): resize, centre crop, to [0, 1], normalise."""
    channels, height, width = json.loads(facts["input_size"])
    image = eight_bits(Image.open(path)).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    crop, (w, h) = json.loads(facts["crop"]), image.size
    tall, wide = math.floor(height / crop), math.floor(width / crop)
    if tall == wide:  # the shorter side gets this length
        size = (tall, int(tall * h / w)) if w <= h else (int(tall * w / h), tall)
    else:
        scale = min(h / tall, w / wide)
        size = (round(w / scale), round(h / scale))
    image = image.resize(size, Image.Resampling[facts["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    pixels = pixels.reshape(height, width, channels)
    mean, std = (np.array(json.loads(facts[key]), dtype=np.float32) for key in ("input_mean", "input_std"))
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)[None])


def as_taken(images: np.ndarray, port: ort.NodeArg) -> np.ndarray:
    """Images as the file takes them: its type, and channels last where it has them there."""
    if len(port.shape) == 4 and port.shape[3] in (1, 3, 4) and port.shape[1] not in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if port.type == "tensor(uint8)":
        return np.ascontiguousarray(np.rint(images).clip(0, 255), dtype=np.uint8)
    return np.ascontiguousarray(images, dtype=np.float16 if port.type == "tensor(float16)" else np.float32)


def show(path: str, outputs: dict[str, np.ndarray], facts: dict[str, str]) -> str:
    """What to print for one image, by the task of the model; `outputs` are those of one image, by name."""
    task, classes = facts.get("task", "classification").partition(":")[0], json.loads(facts["classes"])
    name, values = Path(path).name, next(iter(outputs.values()))
    if task == "classification":
        shares = values if facts.get("output") == "probabilities" else np.exp(values - values.max())
        best = int(values.argmax())
        return f"{classes[best]}\t{shares[best] / shares.sum():.4f}"
    if task == "multi-label":
        shares = 1 / (1 + np.exp(-values))
        labels = [f"{label} {share:.4f}" for label, share in zip(classes, shares, strict=True) if share > 0.5]
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
    facts, port = session.get_modelmeta().custom_metadata_map, session.get_inputs()[0]
    names = [output.name for output in session.get_outputs()]
    copies = port.shape[0] if isinstance(port.shape[0], int) else 1  # of the image, where the file has a fixed batch
    for path in options.images:
        try:
            batch = as_taken(prepare(path, facts), port).repeat(copies, axis=0)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise SystemExit(f"predict.py: {path} cannot be read as an image: {error}") from error
        results = session.run(names, {port.name: batch})
        outputs = {name: value[0].astype(np.float64) for name, value in zip(names, results, strict=True)}
        if not all(np.isfinite(value).all() for value in outputs.values()):
            raise SystemExit(f"predict.py: the model returns NaN or infinity for {path}; do not use it")
        print(f"{path}\t{show(path, outputs, facts)}")


if __name__ == "__main__":
    main()
