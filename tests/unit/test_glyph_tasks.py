"""Embedded data for tasks other than classification, and the baselines that are trained on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Px
from torch import Tensor, nn

from pxcompress.data import EMBEDDED, Source, load_splits, open_source
from pxcompress.demo import baseline
from pxcompress.demo.baseline import Problem, train_baseline
from pxcompress.demo.glyph_tasks import COUNT_NAMES, KINDS, LABELS, SCENE_SIDE, draw_scene, draw_scenes
from pxcompress.demo.glyphs import CLASSES
from pxcompress.demo.losses import Loss, loss_for
from pxcompress.demo.nets import UNet, scene_cnn, scene_vit
from pxcompress.state import seeded
from pxcompress.tasks import TASKS
from pxcompress.tasks.choice import BY_LAYOUT
from pxcompress.tasks.task import Task
from pxcompress.types import Batch, Preprocessing

NAMES = ("glyph-masks", "glyph-counts", "glyph-labels", "glyph-identities")
TINY = ":train=48,select=16,held_out=20"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PXCOMPRESS_CACHE", str(folder))
        yield folder


def preprocessing(side: int) -> Preprocessing:
    return Preprocessing((3, side, side), (0.5,) * 3, (0.5,) * 3)


def batch_of(source: Source, side: int | None = None) -> Batch:
    assert isinstance(source.native_size, int)
    return next(iter(load_splits(source, preprocessing(side or source.native_size)).repair))


def net_for(source: Source) -> nn.Module:
    if source.layout == "masks":
        return UNet(len(source.classes), (4, 6, 8, 10))
    return scene_cnn(8 if source.layout == "identities" else len(source.classes))


def problem_of(source: Source) -> tuple[Task, nn.Module, Loss, Batch]:
    batch, task = batch_of(source), TASKS.build(BY_LAYOUT[source.layout])
    with seeded(0):
        model = net_for(source)
        outputs = {task.output_name: model.eval()(batch[0])}
        return task, model, loss_for(task, source, outputs), batch


@pytest.mark.parametrize("name", NAMES)
def test_samples_depend_on_their_number_only(name: str) -> None:
    long, short = open_source(name + TINY), open_source(name + ":train=20,select=8,held_out=8")
    for pool in ("train", "select", "held_out"):
        more, fewer = getattr(long, pool), getattr(short, pool)
        assert more.ids[: len(fewer)] == fewer.ids
        for index in range(len(fewer)):
            assert more.load(index).tobytes() == fewer.load(index).tobytes()
            if more.targets is not None:
                assert torch.equal(more.targets(index, None, None), fewer.targets(index, None, None))
    ids = [*long.train.ids, *long.select.ids, *long.held_out.ids]
    assert len({long.train.load(index).tobytes() for index in range(48)}) == 48
    assert len(set(ids)) == len(ids)


def test_second_time_is_read(cache: Path) -> None:
    before = open_source("glyph-counts" + TINY)
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = open_source("glyph-counts" + TINY)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    assert all(before.train.load(index) == again.train.load(index) for index in range(48))


def test_kinds_are_all_characters_once() -> None:
    assert sorted("".join(KINDS.values())) == sorted(CLASSES)
    assert set(LABELS) < set(CLASSES)


def test_scenes_show_each_character_where_the_mask_says() -> None:
    kinds = tuple(KINDS.values())
    for seed in range(30):
        image, owners, shown = draw_scene(kinds, np.random.default_rng(seed))
        assert image.shape == (SCENE_SIDE, SCENE_SIDE, 3)
        assert 1 <= len(shown) <= 4
        for number in range(1, len(shown) + 1):
            mask = owners == number
            grown = sum(np.roll(mask, (down, right), (0, 1)) for down in (-2, 0, 2) for right in (-2, 0, 2)) > 0
            assert mask.sum() > 5
            assert np.abs(image[mask].mean(0) - image[grown & (owners == 0)].mean(0)).max() > 10


def test_targets_say_what_is_shown() -> None:
    masks, counts = open_source("glyph-masks" + TINY), open_source("glyph-counts" + TINY)
    labels = open_source("glyph-labels" + TINY)
    _, owners, characters = draw_scenes("train", 48, tuple(KINDS.values()))
    for index in range(48):
        mask = masks.train.targets(index, None, None)
        assert torch.equal(mask > 0, torch.from_numpy(owners[index]) > 0)
        first = 1 + [characters[index, 0] in kind for kind in KINDS.values()].index(True)
        assert (mask[torch.from_numpy(owners[index]) == 1] == first).all()
    digits = KINDS["digit"]
    _, _, characters = draw_scenes("train", 48, (digits, "".join(CLASSES[len(digits) :])))
    for index, row in enumerate(characters.tolist()):
        shown = "".join(row)
        expected = [len(shown), sum(each in digits for each in shown)]
        assert counts.train.targets(index, None, None).tolist() == expected
    _, _, characters = draw_scenes("train", 48, LABELS)
    for index, row in enumerate(characters.tolist()):
        assert labels.train.targets(index, None, None).tolist() == [float(each in row) for each in LABELS]
    assert (masks.classes, counts.classes, labels.classes) == (("background", *KINDS), COUNT_NAMES, LABELS)


def test_identities_to_be_found_again_are_not_trained_on() -> None:
    source = open_source("glyph-identities" + TINY)
    parts = [set(pool.labels.tolist()) for pool in (source.train, source.select, source.held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(CLASSES)
    assert source.outputs == 0


def test_masks_are_resized_as_images_are() -> None:
    source = open_source("glyph-masks" + TINY)
    small, large = batch_of(source)[1], batch_of(source, 2 * SCENE_SIDE)[1]
    assert large.shape[1:] == (2 * SCENE_SIDE, 2 * SCENE_SIDE)
    assert (large[:, ::2, ::2] == small).double().mean() > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_goes_down(name: str) -> None:
    task, model, loss, (inputs, targets) = problem_of(open_source(name + TINY))
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], 3e-3)
    model.train()
    values: list[Tensor] = []
    for _ in range(12):
        value = loss({task.output_name: model(inputs)}, targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.detach())
    assert values[-1] < 0.9 * values[0]
    assert np.isfinite([float(value) for value in values]).all()


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = {key: replace(schedule, steps=1, epochs=1) for key, schedule in baseline.SCHEDULES.items()}
    monkeypatch.setattr(baseline, "SCHEDULES", schedules)
    source, weights = open_source(name + TINY), []
    for number, seed in enumerate((3, 3, 4)):
        task, model, loss, batch = problem_of(source)
        before = torch.cat([value.detach().flatten() for value in model.parameters()])
        notes: list[str] = []
        info = train_baseline(
            model, Problem([batch], [batch], task, loss), key=f"{name}{number}", seed=seed, note=notes.append
        )
        assert task.metric.name in notes[-1]
        assert np.isfinite(info.quality)
        weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
        assert not torch.equal(weights[-1], before)
    assert torch.equal(weights[0], weights[1])
    moves = loss.moves  # with the same batch, only how images are moved can differ
    assert torch.equal(weights[0], weights[2]) != moves


def test_nets_have_an_output_for_what_they_are_asked() -> None:
    images = torch.zeros(2, 3, SCENE_SIDE, SCENE_SIDE)
    assert UNet(5).eval()(images).shape == (2, 5, SCENE_SIDE, SCENE_SIDE)
    assert scene_cnn(2).eval()(images).shape == (2, 2)
    assert scene_vit(10).eval()(images).shape == (2, 10)


def test_all_are_named() -> None:
    assert set(NAMES) <= set(EMBEDDED)


@pytest.mark.slow
def test_a_segmentation_net_goes_the_whole_way(px: Px, tmp_path: Path) -> None:
    data = "glyph-masks:train=128,select=32,held_out=64"
    options = ["--model", "pxcompress.demo.nets:unet", "--data", data, "--ratio", 0.5, "--out", tmp_path / "run"]
    result = px("run", *options)
    assert result.code == 0, result.err
    assert "mIoU" in result.out
