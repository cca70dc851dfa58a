"""Batches: timm's own numbers, the same every time, and damaged images."""

from pathlib import Path

import pytest
import torch
from image_data import ROLES, SMALL, inputs_of, labels_of
from PIL import Image
from timm.data.transforms_factory import create_transform

from pxcompress.data import batches as batches_module
from pxcompress.data import load_splits, open_source, training_batches
from pxcompress.errors import DataError
from pxcompress.types import Preprocessing

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


def damage(folder, role_ids):
    """One image of every way to be damaged; returns their ids, which are among `role_ids`."""
    chosen = role_ids[:3]
    whole = (folder / chosen[0]).read_bytes()
    for sample, content in zip(chosen, (b"", b"no image", whole[: len(whole) // 2]), strict=True):
        (folder / sample).write_bytes(content)
    return chosen


# ---- damaged images


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
