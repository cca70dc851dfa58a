"""What names data: folders and the data sets of timm; one clear line for whatever is wrong."""

import importlib.util
import struct

import numpy as np
import pytest
from image_data import SMALL, error_of, save_images
from PIL import Image
from timm.data import create_dataset

from pxcompress.data import load_splits, open_source

# ---- what can be wrong with a spec


def test_missing_folder(tmp_path):
    assert "does not exist" in error_of(tmp_path / "nowhere")
    assert "does not exist" in error_of("./nowhere")


def test_not_a_folder(tmp_path):
    (tmp_path / "file.png").touch()
    assert "is a file; expected a folder" in error_of(tmp_path / "file.png")


def test_empty_folder(tmp_path):
    assert "is empty" in error_of(tmp_path)


def test_folder_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").touch()
    assert "no images in class folders" in error_of(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    assert "expected CLASS/IMAGE" in error_of(tmp_path)


def test_only_one_class(tmp_path):
    assert "only one class (a)" in error_of(save_images(tmp_path, {"a": 30}))


def test_class_without_training_images(halves):
    save_images(halves / "val", {"fox": 1})
    assert "class 'fox'" in error_of(halves)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digts", "did you mean digits"),
        ("glyph", "did you mean glyphs"),
        ("", "unknown data ''"),
        ("imagenet", "known: digits, dna, glyph-boxes, glyph-counts, glyph-identities"),
        ("digits:train=5", "has no options"),
        ("glyphs:trian=5", "did you mean train"),
        ("glyphs:train=0", "expected a number from 1"),
        ("glyphs:train=many", "whole number"),
        ("glyphs:train", "train=VALUE"),
        ("torch/mnist:rot=x", "did you mean root"),
        ("torch/nothing", "cannot be had"),
        ("torch/imagenet", "cannot be had"),
        ("torch/image_folder", "root=DIR"),
        ("torch/image_folder:root=nowhere-at-all", "nor is there a folder"),
    ],
)
def test_wrong_specs(spec, words):
    assert words in error_of(spec)


@pytest.mark.parametrize(
    ("spec", "package"),
    [("hfds/a/b", "datasets"), ("wds/a", "webdataset"), ("tfds/a", "tensorflow_datasets"), ("hfids/a", "datasets")],
)
def test_missing_package(spec, package):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert f"pip install {package}" in error_of(spec)


def write_mnist(root):
    """MNIST's own files: 40 training and 20 test images of size 28 x 28, labels going round."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{half}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{half}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())


# ---- data sets of timm


def test_torchvision_data(tmp_path):
    write_mnist(tmp_path)
    source = open_source(f"torch/mnist:root={tmp_path}")
    assert len(source.classes) == 10
    assert len(source.train) + len(source.select) == 40
    assert len(source.held_out) == 20
    reference = create_dataset("torch/mnist", root=str(tmp_path), split="validation")
    for index, sample in enumerate(source.held_out.ids):
        image, label = reference[int(sample.rpartition("/")[2])]
        assert np.array_equal(np.asarray(source.held_out.load(index)), np.asarray(image.convert("RGB")))
        assert source.held_out.labels[index] == label
    splits = load_splits(source, SMALL, limits={"score": 10, "repair": 10})
    assert splits.test.samples == 10


def test_torchvision_folder_is_a_folder(halves):
    assert open_source(f"torch/image_folder:root={halves}").held_out.ids == open_source(str(halves)).held_out.ids


def write_tar(path, count):
    """A WebDataset shard of `count` noise images, labels going round two classes."""
    import io
    import tarfile

    with tarfile.open(path, "w") as tar:
        for index in range(count):
            pixels = np.random.default_rng(index).integers(0, 256, (9, 9, 3), np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            for suffix, content in (("png", image.getvalue()), ("cls", str(index % 2).encode())):
                member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_webdataset_stream(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "train-00.tar", 30)
    write_tar(tmp_path / "val-00.tar", 10)
    spec = f"wds/noise:root={tmp_path},train=train-00.tar|30,val=val-00.tar|10"
    source = open_source(spec)
    assert source.classes == ("0", "1")
    assert any("stream" in note for note in source.notes)
    for index, sample in enumerate(source.held_out.ids):
        number = int(sample.rpartition("/")[2])
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        assert np.array_equal(np.asarray(source.held_out.load(index)), pixels)
        assert source.held_out.labels[index] == number % 2
    assert load_splits(source, SMALL).test.samples == 5


def test_webdataset_needs_its_place(tmp_path):
    pytest.importorskip("webdataset")
    assert "root=DIR" in error_of("wds/noise")
    assert "cannot be had" in error_of(f"wds/noise:root={tmp_path}")
    assert "has no images" in error_of(f"wds/noise:root={tmp_path},train=absent.tar|5,val=absent.tar|5")


def test_data_without_a_held_out_split_is_cut_and_noted(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "train-00.tar", 30)
    source = open_source(f"wds/noise:root={tmp_path},train=train-00.tar|30")
    assert len(source.train) + len(source.select) + len(source.held_out) == 30
    assert any("cut from 'train'" in note for note in source.notes)


def test_hugging_face_data(halves):
    pytest.importorskip("datasets")
    (halves / "val").rename(halves / "validation")
    source = open_source(f"hfds/{halves}")
    assert source.classes == ("cat", "dog")
    assert len(source.held_out) == 24
    assert load_splits(source, SMALL).test.samples == 12
