"""How pixels become the input of an ONNX file: by name, by numbers, by a file beside it, by its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
import torch
from linear_files import LEVELS, SIDE, classifier_file, grey_images
from onnx import helper
from PIL import Image

from pxcompress.clock import Clock
from pxcompress.errors import InputError, ModelError
from pxcompress.models.input_scale import with_values
from pxcompress.models.loading import LoadedModel, load_model
from pxcompress.pipeline import open_run
from pxcompress.recipe import Recipe

IMAGENET = [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]


def net(folder: Path, facts: Mapping[str, str] | None = None) -> Path:
    """A classifier of images in `folder` that says `facts` of itself."""
    path = classifier_file(folder / "net.onnx", LEVELS)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    helper.set_model_props(proto, dict(facts or {}))
    onnx.save(proto, path)
    return path


def load(path: Path) -> LoadedModel:
    return load_model(str(path), classes=3)


def ends(loaded: LoadedModel) -> list[tuple[float, float]]:
    """What a pixel of 0 and one of 255 become, in every channel."""
    values = zip(loaded.preprocessing.mean, loaded.preprocessing.std, strict=True)
    return [(-mean / std, (1 - mean) / std) for mean, std in values]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("imagenet",), [(-mean / std, (1 - mean) / std) for mean, std in IMAGENET]),
        (("0-1",), [(0, 1)] * 3),
        (("-1-1",), [(-1, 1)] * 3),
        (("0-255",), [(0, 255)] * 3),
        (("0.5", "0.25"), [(-2, 2)] * 3),
        (("0.1,0.2,0.3", "1,1,0.5"), [(-0.1, 0.9), (-0.2, 0.8), (-0.6, 1.4)]),
        (("123.675,116.28,103.53", "58.395,57.12,57.375", 255.0), [(-m / s, (1 - m) / s) for m, s in IMAGENET]),
        (("127.5", None, 255.0), [(-127.5, 127.5)] * 3),
        ((None, "128", 256.0), [(0, 2)] * 3),
        ((None, None, 255.0), [(0, 255)] * 3),
    ],
)
def test_pixels_become_what_was_asked_for(
    tmp_path: Path, options: tuple[str | float | None, ...], expected: list[tuple[float, float]]
) -> None:
    mean, std, scale = (*options, None, None)[:3]
    made = with_values(load(net(tmp_path)), mean, std, scale)  # type: ignore[arg-type]
    assert ends(made) == [pytest.approx(each) for each in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, None), "does not say how pixels become its input; give --input-mean with one of imagenet, 0-1, -1-1"),
        (("imagnet", None), "expected numbers for --input-mean and --input-std, or --input-mean alone as one of image"),
        (("0.5", None), "expected numbers for"),
        (("imagenet", "0.5"), "expected numbers for"),
        (("imagenet", None, 255.0), "expected numbers for"),
        (("0.5", "0"), "input-std is 0; expected numbers above 0"),
        (("nan", "1"), "input-mean is 'nan'; expected finite numbers"),
        (("0,5", "1"), "2 numbers are given for 3 channels"),
        (("0", "1", 0.0), "input-scale is 0.0; expected the largest value of a pixel"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    tmp_path: Path, options: tuple[str | float | None, ...], message: str
) -> None:
    mean, std, scale = (*options, None)[:3]
    with pytest.raises(InputError, match=message) as refusal:
        with_values(load(net(tmp_path)), mean, std, scale)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


PXCOMPRESS = {"input_mean": "[0.5, 0.5, 0.5]", "input_std": "[0.5, 0.5, 0.5]", "interpolation": "bicubic", "crop": "1"}
ULTRALYTICS = {"names": "{0: 'dark', 1: 'grey', 2: 'light'}", "imgsz": "[8, 8]", "task": "classify"}


@pytest.mark.parametrize(
    ("facts", "beside", "content", "expected"),
    [
        (PXCOMPRESS, "", {}, (-1, 1)),
        (ULTRALYTICS, "", {}, (0, 1)),
        ({}, "preprocess.json", {"mean": "-1-1"}, (-1, 1)),
        ({}, "net.preprocess.json", {"mean": [0.5], "std": [0.25]}, (-2, 2)),
        (PXCOMPRESS, "preprocess.json", {"mean": "0-255"}, (0, 255)),
        ({}, "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (-1, 1)),
        ({}, "preprocessor_config.json", {"do_normalize": False}, (0, 1)),
    ],
)
def test_a_file_or_what_lies_beside_it_says_it(
    tmp_path: Path, facts: Mapping[str, str], beside: str, content: object, expected: tuple[float, float]
) -> None:
    path = net(tmp_path, facts)
    if beside:
        (tmp_path / beside).write_text(json.dumps(content))
    assert ends(with_values(load(path), None, None)) == [pytest.approx(expected)] * 3
    assert ends(with_values(load(path), "0-1", None)) == [pytest.approx((0, 1))] * 3, "what is asked for counts more"


@pytest.mark.parametrize("content", ["", "[]", '{"mean": "imagnet"}', '{"mean": [0.5]}', '{"mean": "0-1", "scale": 1}'])
def test_a_file_beside_that_is_not_understood_is_refused(tmp_path: Path, content: str) -> None:
    path = net(tmp_path)
    (tmp_path / "preprocess.json").write_text(content)
    with pytest.raises(ModelError, match=r"preprocess\.json beside net\.onnx is not understood"):
        load(path)


def test_names_of_classes_come_with_it(tmp_path: Path) -> None:
    assert load(net(tmp_path, ULTRALYTICS)).class_names == ("dark", "grey", "light")


def test_a_wrong_guess_shows_as_accuracy_near_chance_and_is_said(tmp_path: Path) -> None:
    path = net(tmp_path)
    for name, label in grey_images(tmp_path / "photos", 240).items():
        place = tmp_path / "data" / label
        place.mkdir(parents=True, exist_ok=True)
        Image.open(tmp_path / "photos" / name).save(place / name)
    for mean, is_wrong in (("0-1", False), ("0-255", True)):
        lines: list[str] = []
        recipe = Recipe(str(path), 0.5, data=str(tmp_path / "data"), input_mean=mean)
        workload, _ = open_run(recipe, Clock(lines.append))
        near = [line for line in lines if "NEAR CHANCE" in line]
        assert bool(near) == is_wrong, lines
        assert all("--input-mean" in line and f"{SIDE} x {SIDE}" in line for line in near)
        inputs, _ = next(iter(workload.splits.test))
        assert inputs.max() <= torch.tensor(255.0 if is_wrong else 1.0)
