"""Data as NumPy arrays: .npz by the names of a model's inputs, .npy for its only one, and folders of such."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command import Px, one_line
from torch import nn

import pxcompress
from pxcompress.data import are_known_by_content, load_splits, open_source
from pxcompress.data.arrays import open_arrays
from pxcompress.data.samples import Numbers, Samples
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import DataError, ModelError
from pxcompress.models.onnx_file import Ports, read_ports
from pxcompress.recipe import Recipe
from pxcompress.types import Input, Preprocessing
from pxcompress.workload import load_workload

PORTS = Ports(
    "net.onnx",
    (Input("image", (3, None, 8), torch.float32), Input("kind", (), torch.int64)),
    channels_last=False,
)
COUNT = 12


def arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "kind": draw.integers(0, 5, COUNT),
        "image": draw.standard_normal((COUNT, 3, 8, 8)).astype(np.float32),
        "label": np.arange(COUNT) % 3,
    }


def values(samples: Samples) -> np.ndarray:
    assert isinstance(samples.read, Numbers)
    return samples.read.values[samples.positions]


def write(folder: Path, layout: str) -> Path:
    """The arrays in one file, as batches, or as a sample each."""
    data = arrays()
    if layout == "file":
        np.savez(folder / "all.npz", **data)
        return folder / "all.npz"
    for start in range(0, COUNT, 4 if layout == "batches" else 1):
        part = {name: array[start : start + 4] if layout == "batches" else array[start] for name, array in data.items()}
        np.savez(folder / f"{start:03d}.npz", **part)
    return folder


@pytest.mark.parametrize("layout", ["file", "batches", "samples"])
def test_all_layouts_hold_the_same_samples_in_the_files_order_of_inputs(layout: str, tmp_path: Path) -> None:
    data = open_arrays(str(write(tmp_path, layout)), PORTS)
    assert [each.name for each in data.inputs] == ["image", "kind"]
    image, kind = arrays()["image"], arrays()["kind"]
    np.testing.assert_array_equal(values(data.train), np.concatenate([image.reshape(COUNT, -1), kind[:, None]], 1))
    assert (data.inputs[1].low, data.inputs[1].high) == (kind.min(), kind.max())
    assert (data.layout, data.train.labels.tolist()) == ("classes", arrays()["label"].tolist())
    assert len(set(data.train.ids)) == COUNT


def test_a_model_that_names_no_inputs_takes_them_by_the_names_of_the_file(tmp_path: Path) -> None:
    data = open_arrays(str(write(tmp_path, "batches")))
    assert {each.name: (each.shape, each.dtype) for each in data.inputs} == {
        "image": ((3, 8, 8), torch.float32),
        "kind": ((), torch.int64),
    }


def test_folders_train_and_val_are_two_halves(tmp_path: Path) -> None:
    for half, count in (("train", 10), ("val", 6)):
        (tmp_path / half).mkdir()
        np.save(tmp_path / half / "a.npy", np.full((count, 4), count, dtype=np.float64))
    data = open_arrays(str(tmp_path))
    assert data.held_out is not None
    assert data.inputs == ()
    assert (values(data.train) == 10).all()
    assert (values(data.held_out) == 6).all()
    assert values(data.train).dtype == np.float32


@pytest.mark.parametrize("turned", [False, True])
def test_images_come_with_their_channels_first_whatever_the_file_has(turned: bool, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 6, 8, 3), dtype=np.uint8)
    first = np.moveaxis(images, -1, 1)
    np.save(tmp_path / "a.npy", first if turned else images)
    ports = Ports("net.onnx", (Input("image", (6, 8, 3), torch.uint8),), channels_last=True)
    data = open_arrays(str(tmp_path / "a.npy"), ports)
    np.testing.assert_array_equal(values(data.train), first.astype(np.float32))


Change = Any
FAULTS: dict[str, tuple[Change, str]] = {
    "no input": (lambda data: {**data, "pixels": data["image"]}, "unknown input of net.onnx: 'pixels'"),
    "missing": (lambda data: {"image": data["image"]}, "no 'kind', which net.onnx takes; its inputs are image, kind"),
    "shape": (lambda data: {**data, "image": data["image"][:, :2]}, "are 2 x 8 x 8, net.onnx takes 3 x any x 8"),
    "floats": (lambda data: {**data, "kind": data["kind"] / 2}, "'kind' is float32, net.onnx takes int64"),
    "whole numbers": (lambda data: {**data, "image": data["image"].astype(int)}, "is int64, net.onnx takes float32"),
    "samples": (lambda data: {**data, "kind": data["kind"][:5]}, "'kind' has 5 samples, 'image' 12"),
    "none": (lambda data: {name: array[:0] for name, array in data.items()}, "holds no samples"),
    "objects": (lambda data: {**data, "kind": np.array([{}] * COUNT)}, "cannot be read"),
    "words": (lambda data: {**data, "kind": np.array(["a"] * COUNT)}, "'kind' holds <U1; expected numbers"),
    "targets": (lambda data: {**data, "target": data["kind"]}, "one target at most"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_clear_line(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    np.savez(tmp_path / "a.npz", **change(dict(arrays())))
    with pytest.raises(DataError) as error:
        open_arrays(str(tmp_path / "a.npz"), PORTS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x93NUMPY"])
def test_torn_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz cannot be read"):
        open_source(str(tmp_path / "a.npz"))


class TwoInputs(nn.Module):
    """An image and a whole number, which is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 16, 3), nn.Embedding(5, 16)
        self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, image: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        pooled = self.conv(image).relu().mean((2, 3))
        return self.head(self.first(torch.cat([pooled, self.table(kind)], 1)).relu()).softmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two inputs, and 80 samples of them."""
    path = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    inputs = torch.randn(80, 3, 8, 8), torch.randint(5, (80,))
    names = {"input_names": ["image", "kind"], "output_names": ["score"]}
    axes = {name: {0: "n"} for name in ("image", "kind", "score")}
    torch.onnx.export(TwoInputs().eval(), inputs, path / "net.onnx", dynamo=False, dynamic_axes=axes, **names)
    proto = onnx.load(path / "net.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(proto, path / "open.onnx")
    np.savez(path / "data.npz", image=inputs[0].numpy(), kind=inputs[1].numpy())
    return path


def test_inputs_of_a_file_are_read_by_name(folder: Path) -> None:
    ports = read_ports(str(folder / "net.onnx"))
    assert [(each.name, each.shape, each.dtype) for each in ports.inputs] == [
        ("image", (3, 8, 8), torch.float32),
        ("kind", (), torch.int64),
    ]


def test_images_alone_are_refused_for_a_file_with_several_inputs(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"net\.onnx takes image, kind, no images alone; give --data with arrays"):
        load_workload(Recipe(str(folder / "net.onnx"), 0.5, data="glyphs"))


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of that file."""
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = Recipe(str(folder / "net.onnx"), 0.4, data=str(folder / "data.npz"), round_to=1, repair=("fold",))
    report = pxcompress.compress(recipe, out)
    assert report.parity.passed
    assert report.pruned.macs < 0.65 * report.dense.macs
    return out


def test_a_file_with_several_inputs_is_pruned_from_arrays(folder: Path, run: Path) -> None:
    small, dense = (open_session(run / name, "cpu") for name in ("model.onnx", "dense.onnx"))
    assert [(port.name, port.dtype) for port in small.inputs] == [(port.name, port.dtype) for port in dense.inputs]
    data = np.load(folder / "data.npz")
    feed = {name: data[name][:4] for name in ("image", "kind")}
    loaded = pxcompress.load(run)
    with torch.no_grad():
        logits = loaded(**{name: torch.from_numpy(array) for name, array in feed.items()})
    np.testing.assert_allclose(small.predict(feed), logits.softmax(1).numpy(), atol=1e-5)


def test_all_commands_take_a_file_with_several_inputs(
    px: Px, folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or end in one line with the reason."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    net, data = folder / "net.onnx", folder / "data.npz"
    works = (
        ["inspect", "--model", net, "--latency"],
        ["inspect", "--model", folder / "open.onnx", "--data", data],
        ["sweep", "--model", net, "--data", data, "--ratios", 0.2, "--round-to", 1, "--out", tmp_path / "sweep"],
        ["sweep", "--model", net, "--data", data, "--ratios", 0.01, "--budget", "latency", "--round-to", 1],
        ["certify", run, "--risk", "mean-loss", "--max-drop", 0.5, "--out", tmp_path / "proof"],
        ["verify", tmp_path / "proof"],
        ["bench", run],
        ["bench", run / "model.onnx", "--precision", "int8", "--data", data],
        ["explain", run],
    )
    monkeypatch.chdir(tmp_path)
    for command in works:
        outcome = px(*command, *(["--quiet"] if command[0] in ("sweep", "certify", "verify", "explain") else []))
        assert outcome.code == 0, (command, outcome.err)
    ends = {
        "takes 'image' of any size (3 x any x 8); give --data": ["inspect", "--model", folder / "open.onnx"],
        "has 2 inputs (image, kind); expected one: images": ["bench", net, "--precision", "int8", "--data", data],
        "net.onnx': an ONNX file without preprocessing": ["certify", net, run / "model.onnx", "--data", data],
        "takes no images; leave it out": ["sweep", "--model", net, "--data", data, "--input-mean", "0-1", "--quiet"],
    }
    for message, command in ends.items():
        assert message in one_line(px(*command, *(["--max-drop", 0.5] if command[0] == "certify" else []))), command


def test_arrays_under_another_name_are_not_taken_for_new(
    px: Px, folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what they have served for, so that only the share is certified on that no run would have used."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    shutil.copy(folder / "data.npz", tmp_path / "other.npz")
    outcome = px("certify", run, "--data", tmp_path / "other.npz", "--risk", "mean-loss", "--max-drop", 0.5, "--json")
    assert outcome.code == 0, outcome.err
    reserved = load_splits(open_source(str(folder / "data.npz")), Preprocessing((193,))).ids["certify"]
    assert json.loads(outcome.out)["reserved"] == len(reserved)
    assert "seen none of these data" not in outcome.err


def test_samples_of_arrays_are_known_by_their_place_only(tmp_path: Path) -> None:
    splits = load_splits(open_source(str(write(tmp_path, "file"))), Preprocessing((193,)))
    assert not are_known_by_content(splits)
    assert are_known_by_content(load_splits(open_source("digits"), Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3)))
