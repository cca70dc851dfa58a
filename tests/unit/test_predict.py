"""predict.py: the model of a run folder on real images, by an interpreter that has neither torch nor pxcompress."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exports import Exported
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pxcompress.data.batches import read_images
from pxcompress.data.samples import Samples
from pxcompress.deploy import predict, runtime
from pxcompress.deploy.export import export_onnx
from pxcompress.errors import DataError
from pxcompress.types import OpenAxes, Preprocessing

PREPARED = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), "bilinear", 0.8)
CLASSES = ["ant", "bee", "cat", "dog", "<eel>"]
PACKAGES = ("onnxruntime", "numpy", "numpy.libs", "PIL", "pillow.libs")
MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16")


def facts(preprocessing: Preprocessing) -> dict[str, str]:
    """What `artifact` writes into the file."""
    return {
        "classes": json.dumps(CLASSES),
        "input_mean": json.dumps(preprocessing.mean),
        "input_std": json.dumps(preprocessing.std),
        "input_size": json.dumps(preprocessing.input_size),
        "interpolation": preprocessing.interpolation,
        "crop": json.dumps(preprocessing.crop),
    }


def image(path: Path, size: tuple[int, int], mode: str, seed: int = 0) -> Path:
    """A file with smooth colours and noise, (width, height), in `mode`; a palette has a transparent colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 4), dtype=np.uint8), "RGBA").resize(size)
    converted = coarse.convert("L").convert("I;16") if mode == "I;16" else coarse.convert("RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        converted.putalpha(coarse.getchannel("A"))
    path = path.with_suffix(".tif" if mode == "CMYK" else ".png")
    converted.save(path, **({"transparency": 0} if mode == "P" else {}))
    return path


def tools_own(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """The image as a run prepares it."""
    samples = Samples.of(("it",), np.zeros(1, dtype=np.int64), lambda index: Image.open(path))
    store = read_images(samples, preprocessing, skip_corrupt=False).store
    (inputs, _), *_ = store.batches([np.arange(1)])
    return inputs.numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(16, 16), (37, 20), (20, 37), (9, 40), (300, 211), (17, 17)])
def test_images_are_prepared_as_in_a_run(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = image(tmp_path / "it", size, mode)
    np.testing.assert_array_equal(predict.prepare(str(path), facts(PREPARED)), tools_own(path, PREPARED))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    input_size=st.sampled_from([(3, 16, 16), (1, 16, 16), (3, 24, 16), (3, 32, 32)]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
    crop=st.sampled_from([0.875, 0.9, 0.95, 1.0]),
)
def test_whatever_the_model_asks_for(
    tmp_path_factory: pytest.TempPathFactory,
    width: int,
    height: int,
    input_size: tuple[int, int, int],
    interpolation: str,
    crop: float,
) -> None:
    path = image(tmp_path_factory.mktemp("any") / "it", (width, height), "RGB", width)
    mean = PREPARED.mean[: input_size[0]]
    preprocessing = Preprocessing(input_size, mean, PREPARED.std[: input_size[0]], interpolation, crop)
    np.testing.assert_array_equal(predict.prepare(str(path), facts(preprocessing)), tools_own(path, preprocessing))


@pytest.fixture(scope="module")
def folder(slim_cnn: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder's predict.py and model.onnx, and nothing else."""
    place = tmp_path_factory.mktemp("shipped")
    export_onnx(slim_cnn.model, slim_cnn.example, place / "model.onnx", facts(PREPARED))
    (place / "predict.py").write_bytes(Path(predict.__file__).read_bytes())
    return place


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `python -S` finds the three packages and no others."""
    place = tmp_path_factory.mktemp("packages")
    site = Path(np.__file__).parents[1]
    for name in PACKAGES:
        (place / name).symlink_to(site / name)
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, "PYTHONPATH": str(place)}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bits_and_floats_are_scaled_by_their_range(tmp_path: Path, suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    Image.fromarray(values).save(tmp_path / "plain.png")
    plain = tools_own(tmp_path / "plain.png", PREPARED)
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(values * np.uint16(257)).save(path)
    np.testing.assert_array_equal(predict.prepare(str(path), facts(PREPARED)), plain)
    np.testing.assert_array_equal(tools_own(path, PREPARED), plain)
    Image.fromarray(values.astype(np.float32) / 255).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(tools_own(tmp_path / "float.tif", PREPARED), plain)
    np.testing.assert_array_equal(predict.prepare(str(tmp_path / "float.tif"), facts(PREPARED)), plain)


UNREADABLE = {
    "integers": np.full((9, 9), 70, np.int32),
    "too large": np.full((9, 9), 70, np.float32),
    "nodata": np.where(np.eye(9), np.float32(-9999), np.float32(0.5)),
    "NaN": np.where(np.eye(9), np.float32("nan"), np.float32(0.5)),
    "infinity": np.where(np.eye(9), np.float32("inf"), np.float32(0.5)),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_values_of_unknown_range_are_refused_by_name(
    folder: Path, bare: dict[str, str], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "it.tif"
    Image.fromarray(UNREADABLE[kind]).save(path)
    with pytest.raises(
        DataError, match=r"it\.tif' cannot be read \(it holds .*expected 8 or 16 bits, or floats from 0"
    ):
        read_images(
            Samples.of((str(path),), np.zeros(1, dtype=np.int64), lambda index: Image.open(path)), PREPARED, False
        )
    done = run(bare, folder / "predict.py", path)
    assert done.stderr.startswith(f"predict.py: {path} cannot be read as an image: it holds ")
    assert len(done.stderr.splitlines()) == 1


def test_probabilities_are_shown_as_they_are(
    folder: Path, bare: dict[str, str], tmp_path: Path, slim_cnn: Exported
) -> None:
    ending = nn.Sequential(slim_cnn.model, nn.Softmax(1)).eval()
    export_onnx(ending, slim_cnn.example, tmp_path / "soft.onnx", {**facts(PREPARED), "output": "probabilities"})
    path = image(tmp_path / "it", (64, 48), "RGB")
    soft, plain = (
        run(bare, folder / "predict.py", path, "--model", file)
        for file in (tmp_path / "soft.onnx", folder / "model.onnx")
    )
    assert soft.stdout == plain.stdout != ""


def run(bare: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", *map(str, args)],
        capture_output=True,
        text=True,
        env=bare,
        check=False,
        cwd=bare["PYTHONPATH"],
    )


def test_it_runs_without_torch_and_decides_as_the_tool(folder: Path, bare: dict[str, str], tmp_path: Path) -> None:
    for package in ("torch", "pxcompress", "timm", "onnx"):
        assert importlib.util.find_spec(package)
        assert run(bare, "-c", f"import {package}").returncode == 1
    cases = [("RGB", (64, 48)), ("L", (20, 90)), ("RGBA", (16, 16)), ("P", (33, 31)), ("CMYK", (200, 120))]
    paths = [image(tmp_path / str(seed), size, mode, seed) for seed, (mode, size) in enumerate(cases)]
    done = run(bare, folder / "predict.py", *paths)
    assert done.returncode == 0, done.stderr
    model = runtime.open_session(folder / "model.onnx", "cpu")
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        (logits,) = model.predict(tools_own(path, PREPARED)).astype(np.float64)
        shares = np.exp(logits) / np.exp(logits).sum()
        name, decided, probability = line.split("\t")
        assert (name, decided) == (str(path), CLASSES[int(logits.argmax())])
        assert float(probability) == pytest.approx(shares.max(), abs=1e-4)


@pytest.mark.slow
def test_it_runs_in_a_virtual_environment_with_three_packages(folder: Path, tmp_path: Path) -> None:
    """As someone who is sent the folder would do it, with the runtime for CPUs."""
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "onnxruntime", "numpy", "pillow"]
    if subprocess.run(install, capture_output=True).returncode != 0:
        pytest.skip("no package registry")
    path = image(tmp_path / "it", (64, 48), "RGB")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run_python(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *args], capture_output=True, text=True, env=environment, check=False)

    assert run_python("-c", "import torch").returncode == 1
    done = run_python(folder / "predict.py", path)
    assert done.returncode == 0, done.stderr
    (logits,) = runtime.open_session(folder / "model.onnx", "cpu").predict(tools_own(path, PREPARED))
    assert done.stdout.split("\t")[1] == CLASSES[int(logits.argmax())]


def test_a_file_with_a_fixed_batch_takes_one_image_too(
    folder: Path, bare: dict[str, str], tmp_path: Path, slim_cnn: Exported
) -> None:
    export_onnx(slim_cnn.model, slim_cnn.example, folder / "fixed.onnx", facts(PREPARED), axes=OpenAxes(3))
    path = image(tmp_path / "it", (64, 48), "RGB")
    fixed, free = (run(bare, folder / "predict.py", path, "--model", folder / n) for n in ("fixed.onnx", "model.onnx"))
    assert fixed.stdout == free.stdout != ""


def test_another_file_can_be_chosen(folder: Path, bare: dict[str, str], tmp_path: Path, wide_cnn: Exported) -> None:
    other = replace(PREPARED, input_size=(3, 16, 16), interpolation="nearest")
    export_onnx(wide_cnn.model, wide_cnn.example, folder / "dense.onnx", facts(other))
    path = image(tmp_path / "it", (64, 48), "RGB")
    done = run(bare, folder / "predict.py", path, "--model", folder / "dense.onnx")
    (logits,) = runtime.open_session(folder / "dense.onnx", "cpu").predict(tools_own(path, other))
    assert done.stdout.split("\t")[1] == CLASSES[int(logits.argmax())]


def test_what_is_no_image_is_one_line(folder: Path, bare: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        done = run(bare, folder / "predict.py", tmp_path / name)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith(f"predict.py: {tmp_path / name} cannot be read as an image: ")
        assert len(done.stderr.splitlines()) == 1


def test_it_is_short() -> None:
    assert len(Path(predict.__file__).read_text().splitlines()) < 200
