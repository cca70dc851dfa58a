"""Sources, roles and batches: disjoint, re-iterable, timm's own numbers, and one clear line for whatever is wrong."""

import importlib.util
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.transforms_factory import create_transform

from pxcompress.data import batches as batches_module
from pxcompress.data import load_splits, open_source, training_batches
from pxcompress.data.samples import draw_order
from pxcompress.errors import DataError, InputError
from pxcompress.types import Preprocessing

ROLES = ("score", "repair", "select", "certify", "test")
SMALL = Preprocessing((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
TINY_GLYPHS = "glyphs:train=60,select=12,held_out=24"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def lazy(monkeypatch):
    """Nothing fits into memory."""
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", 0)


def save_images(root, counts, size=(12, 10), start=0):
    """Images whose colours differ, `counts[name]` in folder `name`."""
    for offset, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = np.random.default_rng([start, offset, index]).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return save_images(tmp_path / "data", {"cat": 30, "dog": 30, "eel": 15})


@pytest.fixture
def halves(tmp_path):
    save_images(tmp_path / "data" / "train", {"cat": 30, "dog": 30})
    save_images(tmp_path / "data" / "val", {"cat": 10, "dog": 14}, start=1)
    return tmp_path / "data"


def labels_of(batches):
    return torch.cat([labels for _, labels in batches])


def inputs_of(batches):
    return torch.cat([inputs for inputs, _ in batches])


def error_of(spec, **options):
    with pytest.raises(InputError) as caught:
        open_source(str(spec), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- roles


@pytest.mark.parametrize("spec", ["digits", TINY_GLYPHS])
def test_roles_are_disjoint_and_well_formed(spec):
    source = open_source(spec)
    splits = load_splits(source, SMALL, batch_size=7)
    assert source.embedded
    assert source.native_size == 32
    apart = [set(splits.ids["score"] + splits.ids["repair"]), *(set(splits.ids[role]) for role in ROLES[2:])]
    assert len(set().union(*apart)) == sum(map(len, apart))
    for role in ROLES:
        assert len(set(splits.ids[role])) == len(splits.ids[role])
        batches = getattr(splits, role)
        assert batches.samples == len(splits.ids[role]) == len(labels_of(batches))
        assert all(0 < len(inputs) <= 7 and inputs.shape[1:] == (3, 8, 8) for inputs, _ in batches)
        assert len(list(batches)) == len(batches)
        inputs, labels = next(iter(batches))
        assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert 0 <= labels.min() <= labels.max() < len(source.classes)
    assert torch.equal(splits.example, next(iter(splits.score))[0][:1])


def test_digits_sizes():
    splits = load_splits(open_source("digits"), SMALL)
    sizes = {role: getattr(splits, role).samples for role in ROLES}
    assert sizes == {"score": 256, "repair": 512, "select": 150, "certify": 150, "test": 497}
    for role, spread in (("score", 1), ("repair", 2)):  # repair may begin and end within a round
        counts = Counter(labels_of(getattr(splits, role)).tolist()).values()
        assert max(counts) - min(counts) <= spread


def test_digits_are_the_digits():
    """An image is scikit-learn's, 0 to 16 spread over 0 to 255, under its label."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pool = open_source("digits").train
    for index in (0, 5, 999):
        number = int(pool.ids[index].removeprefix("digits/"))
        pixels = np.asarray(pool.load(index)).astype(float)
        assert np.abs(pixels / 255 * 16 - bunch.images[number][..., None]).max() < 0.05
        assert pool.labels[index] == bunch.target[number]


def test_seed_changes_draws_but_never_what_is_trained_on():
    one, two = (open_source("digits", seed=seed) for seed in (0, 1))
    assert one.train.ids == two.train.ids
    first, again, other = (load_splits(one, SMALL, seed=seed) for seed in (5, 5, 6))
    assert first.ids == again.ids
    assert all(first.ids[role] != other.ids[role] for role in ROLES)


def test_limits_cap_and_share():
    source = open_source("digits")
    splits = load_splits(source, SMALL, limits={"score": 30, "repair": 40, "select": 10, "certify": 20, "test": 50})
    assert [getattr(splits, role).samples for role in ROLES] == [30, 40, 10, 20, 50]
    shared = load_splits(source, SMALL, limits={"score": 1000, "repair": 3000, "certify": 5000, "select": 9999})
    assert [getattr(shared, role).samples for role in ROLES] == [1000, 1000, 150, 323, 324]


@pytest.mark.parametrize(
    ("score", "repair", "both"), [(300, 700, 0), (300, 701, 1), (300, 1000, 300), (1000, 300, 300)]
)
def test_score_and_repair_overlap_no_more_than_they_have_to(score, repair, both):
    source = open_source("digits")
    splits = load_splits(source, SMALL, limits={"score": score, "repair": repair})
    ids = {role: set(splits.ids[role]) for role in ROLES}
    assert (len(ids["score"]), len(ids["repair"]), len(ids["score"] & ids["repair"])) == (score, repair, both)
    assert not splits.notes, "what serves both is no copy"


@pytest.mark.parametrize(
    ("limits", "words"), [({"scores": 9}, "did you mean score"), ({"test": 1}, "limit of role 'test' is 1")]
)
def test_wrong_limits(limits, words):
    with pytest.raises(DataError, match=words):
        load_splits(open_source("digits"), SMALL, limits=limits)


def test_folder_without_halves(folder):
    source = open_source(str(folder))
    assert source.classes == ("cat", "dog", "eel")
    assert (source.embedded, source.native_size) == (False, None)
    splits = load_splits(source, SMALL)
    everything = {sample for role in ROLES for sample in splits.ids[role]}
    assert sorted(everything) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    for role in ("select", "certify", "test"):  # 2 : 2 : 1
        counts = Counter(sample.split("/")[0] for sample in splits.ids[role])
        assert abs(counts["cat"] - counts["dog"]) <= 1
        assert abs(counts["cat"] - 2 * counts["eel"]) <= 2
    assert open_source(str(folder), seed=1).train.ids != source.train.ids


def test_folder_with_halves(halves):
    splits = load_splits(open_source(str(halves)), SMALL)
    for role in ROLES:
        half = "train/" if role in ("score", "repair", "select") else "val/"
        assert all(sample.startswith(half) for sample in splits.ids[role])
    assert splits.certify.samples + splits.test.samples == 24


@pytest.mark.parametrize(("train", "held_out"), [("train", "test"), ("Train", "Validation"), ("training", "valid")])
def test_spellings_of_halves(tmp_path, train, held_out):
    save_images(tmp_path / train, {"a": 12, "b": 12})
    save_images(tmp_path / held_out, {"a": 3, "b": 3})
    source = open_source(str(tmp_path))
    assert len(source.held_out) == 6
    assert all(sample.startswith(f"{held_out}/") for sample in source.held_out.ids)


def test_one_half_alone_is_cut(tmp_path):
    save_images(tmp_path / "val", {"a": 20, "b": 20})
    splits = load_splits(open_source(str(tmp_path)), SMALL)
    assert len(set().union(*splits.ids.values())) == 40


def test_unused_half_and_empty_class_are_noted(halves):
    save_images(halves / "test", {"cat": 1, "dog": 1})
    (halves / "train" / "fox").mkdir()
    source = open_source(str(halves))
    assert source.classes == ("cat", "dog")
    assert any("'fox'" in note for note in source.notes)
    assert any("test/ is not used" in note for note in source.notes)


def test_hidden_and_other_files_are_no_images(folder):
    (folder / "cat" / "._0.png").write_bytes(b"resource fork")
    (folder / "cat" / "notes.txt").write_text("x")
    save_images(folder, {".thumbnails": 2})
    assert len(load_splits(open_source(str(folder)), SMALL).ids["test"]) > 0
    assert open_source(str(folder)).classes == ("cat", "dog", "eel")


def test_nested_folders_belong_to_their_class(tmp_path):
    save_images(tmp_path / "a", {"deep": 12})
    save_images(tmp_path, {"b": 12})
    assert open_source(str(tmp_path)).classes == ("a", "b")


@pytest.mark.parametrize("even", [True, False])
def test_drawing_order_mixes_every_beginning(even):
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = draw_order(labels, np.random.default_rng(0), balanced=even)
    assert sorted(order) == list(range(100))
    for n in range(1, 101):
        counts = np.bincount(labels[order[:n]], minlength=3)
        expected = np.minimum([n / 3] * 3, [60, 30, 10]) if even else n * np.array([0.6, 0.3, 0.1])
        if not even or n <= 30:
            assert np.abs(counts - expected).max() <= 1.5


# ---- batches


@pytest.mark.parametrize(
    "preprocessing",
    [
        SMALL,
        Preprocessing((3, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875),
        Preprocessing((3, 6, 14), (0.1,) * 3, (0.7,) * 3, "bicubic", 0.9),
    ],
)
@pytest.mark.parametrize("memory", [0, 10**9])
def test_inputs_are_what_timm_computes(folder, preprocessing, memory, monkeypatch):
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", memory)
    splits = load_splits(open_source(str(folder)), preprocessing, batch_size=4)
    transform = create_transform(
        preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop,
    )
    for role in ("score", "test"):
        expected = [transform(Image.open(folder / sample).convert("RGB")) for sample in splits.ids[role]]
        assert torch.equal(inputs_of(getattr(splits, role)), torch.stack(expected))
        labels = [("cat", "dog", "eel").index(sample.split("/")[0]) for sample in splits.ids[role]]
        assert labels_of(getattr(splits, role)).tolist() == labels


def test_grey_models_get_one_channel(folder):
    splits = load_splits(open_source(str(folder)), Preprocessing((1, 8, 8), (0.5,), (0.5,)))
    assert splits.example.shape == (1, 1, 8, 8)
    with pytest.raises(DataError, match="takes 5 channels"):
        load_splits(open_source(str(folder)), Preprocessing((5, 8, 8), (0.5,) * 5, (0.5,) * 5))


def test_models_of_four_channels_get_the_transparency(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(20):
            image = Image.new("RGBA", (8, 8), (200, 100 if name == "cat" else 50, 5 * index, 64))
            image.save(tmp_path / name / f"{name}{index}.png")
    splits = load_splits(open_source(str(tmp_path)), Preprocessing((4, 8, 8), (0.0,) * 4, (1.0,) * 4))
    assert splits.example.shape == (1, 4, 8, 8)
    assert torch.allclose(splits.example[:, 3], torch.tensor(64 / 255))
    opaque = load_splits(open_source(str(tmp_path)), Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3))
    assert torch.allclose(opaque.example, splits.example[:, :3], atol=2 / 255)


@pytest.mark.parametrize("memory", [0, 10**9])
def test_batches_repeat_and_leave_the_global_generator_alone(folder, memory, monkeypatch):
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", memory)
    splits = load_splits(open_source(str(folder)), SMALL, batch_size=4)
    before = torch.get_rng_state()
    assert torch.equal(inputs_of(splits.repair), inputs_of(splits.repair))
    assert torch.equal(torch.get_rng_state(), before)
    one = iter(splits.repair)
    next(one)
    assert len(list(splits.repair)) == len(splits.repair), "iterations do not disturb each other"


def test_batches_are_not_changed_by_their_users(folder):
    splits = load_splits(open_source(str(folder)), SMALL)
    before = inputs_of(splits.score)
    for inputs, labels in splits.score:
        inputs.zero_()
        labels.zero_()
    assert torch.equal(inputs_of(splits.score), before)
    assert labels_of(splits.score).max() > 0


def test_workers_give_the_same_batches(halves, lazy, monkeypatch):
    splits = load_splits(open_source(str(halves)), SMALL, batch_size=5)
    alone = inputs_of(splits.repair)
    monkeypatch.setattr(batches_module, "_cores", lambda: 3)
    monkeypatch.setattr(batches_module, "_WORKERS_FROM", 1)
    assert torch.equal(inputs_of(splits.repair), alone)


@pytest.mark.parametrize("memory", [0, 10**9])
def test_training_batches(halves, memory, monkeypatch):
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", memory)
    source = open_source(str(halves))
    splits = load_splits(source, SMALL)
    assert set(splits.ids["score"]) | set(splits.ids["repair"]) <= set(source.train.ids)
    assert not set(source.train.ids) & {sample for role in ROLES[2:] for sample in splits.ids[role]}
    one, two = (training_batches(source, SMALL, batch_size=8, seed=3) for _ in range(2))
    assert one.samples == len(source.train) // 8 * 8
    first, second = inputs_of(one), inputs_of(one)
    assert len(first) == one.samples
    assert not torch.equal(first, second), "a new order every epoch"
    assert torch.equal(inputs_of(two), first), "the same orders for the same seed"
    assert not torch.equal(inputs_of(training_batches(source, SMALL, batch_size=8, seed=4)), first)


def test_a_pool_smaller_than_a_batch_is_one_batch(halves):
    source = open_source(str(halves))
    batches = training_batches(source, SMALL, batch_size=1000, seed=0)
    assert [len(labels) for _, labels in batches] == [len(source.train)] == [batches.samples]


# ---- damaged images


def damage(folder, role_ids):
    """One image of every way to be damaged; returns their ids, which are among `role_ids`."""
    chosen = role_ids[:3]
    whole = (folder / chosen[0]).read_bytes()
    for sample, content in zip(chosen, (b"", b"no image", whole[: len(whole) // 2]), strict=True):
        (folder / sample).write_bytes(content)
    return chosen


@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("role", ["score", "test"])
def test_damaged_images_stop_or_are_left_out(folder, role, memory, monkeypatch):
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", memory)
    chosen = damage(folder, load_splits(open_source(str(folder)), SMALL).ids[role])
    with pytest.raises(DataError, match="--skip-corrupt") as caught:
        load_splits(open_source(str(folder)), SMALL)
    assert any(sample in str(caught.value) for sample in chosen)
    assert "\n" not in str(caught.value)
    splits = load_splits(open_source(str(folder), skip_corrupt=True), SMALL)
    assert set(splits.skipped) == set(chosen)
    assert not set(splits.ids[role]) & set(chosen)
    assert len(inputs_of(getattr(splits, role))) == getattr(splits, role).samples == len(splits.ids[role])


@pytest.mark.parametrize("cores", [1, 3])
def test_damaged_images_met_while_training(halves, lazy, cores, monkeypatch):
    monkeypatch.setattr(batches_module, "_cores", lambda: cores)
    monkeypatch.setattr(batches_module, "_WORKERS_FROM", 1)
    damage(halves, open_source(str(halves)).train.ids)
    with pytest.raises(DataError, match="--skip-corrupt") as caught:
        list(training_batches(open_source(str(halves)), SMALL, batch_size=4, seed=0))
    assert "\n" not in str(caught.value)
    source = open_source(str(halves), skip_corrupt=True)
    assert (
        len(labels_of(training_batches(source, SMALL, batch_size=len(source.train), seed=0))) == len(source.train) - 3
    )


def test_too_many_damaged_images(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="role 'score' has 0 readable images"):
        load_splits(open_source(str(folder), skip_corrupt=True), SMALL)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb_with_its_transparency(folder, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    image = Image.new("RGB", (9, 9), (200, 30, 60)).convert(mode)
    image.save(folder / "cat" / f"special.{suffix}", **({"transparency": b"\x00\x80"} if mode == "P" else {}))
    source = open_source(str(folder))
    for pool in (source.train, source.select, source.held_out):
        for index, sample in enumerate(pool.ids):
            if "special" in sample:
                assert pool.load(index).mode == ("RGBA" if mode in ("LA", "P", "RGBA") else "RGB")


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


def test_too_few_images(tmp_path):
    source = open_source(str(save_images(tmp_path, {"a": 4, "b": 4})))
    with pytest.raises(DataError, match="has 1 images for select; each needs at least 2"):
        load_splits(source, SMALL)


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


# ---- data sets of timm


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
