"""ONNX files of linear classifiers of grey images, built by hand in a moment, and images for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SIDE = 8
NAMES = ("dark", "grey", "light")
LEVELS = (60.0, 120.0, 180.0)


def classifier_file(
    path: Path, levels: Sequence[float], spare: int = 0, names: Sequence[str] = NAMES, task: str = "classification"
) -> Path:
    """A file that answers with the class whose of `levels` is nearest to an image's mean; `spare` numbers make it
    larger. Another `task` takes the scores of the classes for what it judges.
    """
    centres = np.array(levels, dtype=np.float32) / 255
    weights = np.repeat(2 * centres[None], 3 * SIDE * SIDE, axis=0) / (3 * SIDE * SIDE)
    tensors = {"weights": weights, "bias": -(centres**2), "spare": np.zeros(spare, dtype=np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        ],
        "classifier",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(levels)])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    facts = {
        "classes": json.dumps(list(names)),
        "task": task,
        "input_size": f"[3, {SIDE}, {SIDE}]",
        "input_mean": "[0, 0, 0]",
        "input_std": "[1, 1, 1]",
        "interpolation": "bilinear",
        "crop": "1.0",
    }
    helper.set_model_props(model, facts)
    onnx.save(model, path)
    return path


def grey_images(folder: Path, count: int, seed: int = 0) -> dict[str, str]:
    """Write `count` images without labels into `folder`; returns the true class of each, by name."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    truth = {}
    for number in range(count):
        label = int(rng.integers(len(NAMES)))
        pixels = rng.normal(LEVELS[label] + rng.normal(0, 14), 6, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
        truth[f"{number:03}.png"] = NAMES[label]
    return truth
