"""Folders of images: a sample is a real file, and copies and roles are said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_data import ROLES, SMALL
from PIL import Image

from pxcompress.data import load_splits, open_source, restrict_classes
from pxcompress.data.samples import MIN_HELD_OUT_TO_SPLIT, Source
from pxcompress.errors import DataError
from pxcompress.recipe import Recipe
from pxcompress.workload import load_workload, with_baseline


def write(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng([seed, index]).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, (half, count) in enumerate((("train", 20), ("val", 10))):
        for number, name in enumerate(("cat", "dog")):
            write(tmp_path / "data" / half / name, count, 10 * seed + number)
    return tmp_path / "data"


def samples(source: Source) -> list[str]:
    return sorted((*source.train.ids, *source.select.ids, *source.held_out.ids))


def link_to_itself(root: Path) -> None:
    (root / "train/cat/all").symlink_to(".")


def link_to_a_file(root: Path) -> None:
    (root / "train/cat/0a.png").symlink_to("3.png")


def link_to_a_folder(root: Path) -> None:
    (root / "train/cat/again").symlink_to(root / "train/cat")


def hard_link(root: Path) -> None:
    os.link(root / "train/cat/3.png", root / "train/cat/more.png")


@pytest.mark.parametrize("link", [link_to_itself, link_to_a_file, link_to_a_folder, hard_link])
def test_a_file_counts_once_however_it_is_reached(root: Path, link) -> None:
    plain = samples(open_source(str(root)))
    link(root)
    source = open_source(str(root))
    assert len(samples(source)) == len(plain)
    assert link is hard_link or samples(source) == plain, "files are named, not links to them"
    assert any(note.startswith("1 link below") for note in source.notes)


def test_links_to_images_elsewhere_are_images(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "store", 3, seed=99)
    (root / "train/cat/more").symlink_to(tmp_path / "store")
    (root / "train/dog/one.png").symlink_to(root.parent / "other.png")
    Image.new("RGB", (4, 4)).save(root.parent / "other.png")
    assert len(samples(open_source(str(root)))) == 64
    assert load_splits(open_source(str(root)), SMALL).notes[0].startswith("the select split is cut from the training")


@pytest.mark.parametrize(
    ("place", "target", "words"),
    [
        ("train/dog/x.png", "train/cat/0.png", "'train/cat/0.png' and 'train/dog/x.png' are one file, in two classes"),
        ("train/dog/x", "train/cat", "in two classes"),
        ("train/eel", "train/cat", "in two classes"),
        ("val/cat/x.png", "train/cat/0.png", "are one file, in both train/ and val/"),
        ("val/cat/x", "train/cat", "in both train/ and val/"),
        ("val/cat/x.png", "train/dog/0.png", "in both train/ and val/"),
    ],
)
def test_a_file_in_two_places_is_refused(root: Path, place: str, target: str, words: str) -> None:
    (root / place).symlink_to(root / target)
    with pytest.raises(DataError, match=words) as caught:
        open_source(str(root))
    assert "\n" not in str(caught.value)


def test_one_half_that_is_a_link_to_the_other_is_refused(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("train")
    with pytest.raises(DataError, match="in both train/ and val/"):
        open_source(str(root))


def test_broken_links_are_damaged_images(root: Path) -> None:
    (root / "train/cat/dead.png").symlink_to("nowhere.png")
    (root / "train/cat/round").symlink_to("round")
    with pytest.raises(DataError, match=r"dead\.png' cannot be read"):
        load_splits(open_source(str(root)), SMALL)
    splits = load_splits(open_source(str(root), skip_corrupt=True), SMALL)
    assert splits.skipped == ("train/cat/dead.png",)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
@pytest.mark.parametrize("name", ["train/cat/{}.png", "train/{}/a.png"])
def test_names_that_are_no_text_are_refused(root: Path, name: str) -> None:
    """They could stand in no report, and only the end of a run would tell."""
    path = root / name.format(os.fsdecode(b"caf\xe9"))
    path.parent.mkdir(exist_ok=True)
    shutil.copy(root / "train/cat/3.png", path)
    with pytest.raises(DataError, match=r"caf\\udce9.* is not in UTF-8; rename it"):
        open_source(str(root))


def test_hidden_folders_hold_no_images(root: Path) -> None:
    shutil.copytree(root / "train/dog", root / "train/cat/.ipynb_checkpoints")
    assert len(samples(open_source(str(root)))) == 60


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(root: Path) -> None:
    (root / "train/cat/shut").mkdir(mode=0)
    with pytest.raises(DataError, match="shut' cannot be read"):
        open_source(str(root))


# ---- copies


def test_copies_are_counted_and_certify_has_none(root: Path) -> None:
    shutil.copy(root / "train/cat/3.png", root / "val/dog/stray.png")
    for index in range(7):
        Image.open(root / "val/cat/0.png").save(root / f"val/cat/copy{index}.bmp")  # other bytes, the same pixels
    splits = load_splits(open_source(str(root)), SMALL)
    (note,) = [note for note in splits.notes if "copies" in note]
    assert note.startswith("8 images are copies of others")
    assert "1 have another class" in note
    originals = {"val/cat/0.png", *(f"val/cat/copy{index}.bmp" for index in range(7))}
    assert len(originals & set(splits.ids["certify"])) == 1
    assert "val/dog/stray.png" not in splits.ids["certify"]
    assert len(splits.ids["certify"]) == splits.certify.samples == sum(len(labels) for _, labels in splits.certify)


def test_copies_are_found_in_data_that_do_not_fit_into_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(root / "val/cat/3.png", root / "val/cat/again.png")
    stored = load_splits(open_source(str(root)), SMALL)
    monkeypatch.setattr("pxcompress.data.batches._MEMORY_BYTES", 0)
    lazy = load_splits(open_source(str(root)), SMALL)
    assert (lazy.notes, lazy.ids) == (stored.notes, stored.ids)
    assert sum(len(labels) for _, labels in lazy.certify) == len(lazy.ids["certify"])


def test_data_without_copies_say_nothing_of_them(root: Path) -> None:
    assert not any("copies" in note for note in load_splits(open_source(str(root)), SMALL).notes)


def test_calibration_images_that_are_all_alike_are_said(tmp_path: Path) -> None:
    for half, count in (("train", 20), ("val", 10)):
        for name in ("cat", "dog"):
            write(tmp_path / half / name, count, seed=ord(name[0]) + count)
    for path in (tmp_path / "train").rglob("*.png"):
        Image.new("RGB", (4, 4), (255, 255, 255)).save(path)
    notes = load_splits(open_source(str(tmp_path)), SMALL).notes
    assert sum("IMAGES OF ROLE" in note and "ARE ALIKE" in note for note in notes) == 2


# ---- where select comes from


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("large")
    for seed, (half, count) in enumerate((("train", 20), ("val", MIN_HELD_OUT_TO_SPLIT // 2))):
        for number, name in enumerate(("cat", "dog")):
            write(place / half / name, count, 10 * seed + number)
    return place


def halves(source: Source) -> dict[str, set[str]]:
    splits = load_splits(source, SMALL)
    apart = [{*splits.ids["score"], *splits.ids["repair"]}, *(set(splits.ids[role]) for role in ROLES[2:])]
    assert len(set().union(*apart)) == sum(map(len, apart))
    return {role: {sample.split("/")[0] for sample in splits.ids[role]} for role in ROLES}


def test_select_is_held_out_where_there_are_enough(large: Path) -> None:
    source = open_source(str(large))
    assert len(source.select) == MIN_HELD_OUT_TO_SPLIT // 5
    assert len(source.train) == 40
    assert halves(source) == {role: {"train" if role in ("score", "repair") else "val"} for role in ROLES}
    assert load_splits(source, SMALL).notes == ()


def test_what_there_is_to_know_of_data_is_told(root: Path) -> None:
    recipe = Recipe("models:AnyClasses", 0.5, data=str(root), input_size=16)
    notes: list[str] = []
    workload = load_workload(recipe)
    assert with_baseline(workload, 0, notes.append) is workload
    assert notes == [*workload.splits.notes]
    assert len(notes) == 1


def test_select_is_cut_from_training_data_and_said_where_there_are_few(root: Path) -> None:
    source = open_source(str(root))
    assert halves(source)["select"] == {"train"}
    (note,) = load_splits(source, SMALL).notes
    assert "cut from the training data, since the held-out data are only 20" in note


def test_data_in_one_piece_need_no_such_note(large: Path) -> None:
    source = open_source(str(large / "val"))
    assert source.select_from == "everything"
    assert load_splits(source, SMALL).notes == ()


def test_a_task_cuts_select_from_where_it_came_from(tmp_path: Path, large: Path) -> None:
    shutil.copytree(large, tmp_path / "data", copy_function=os.link)
    write(tmp_path / "data/train/eel", 20, 77)
    write(tmp_path / "data/val/eel", MIN_HELD_OUT_TO_SPLIT // 2, 78)
    task = restrict_classes(open_source(str(tmp_path / "data")), ("eel", "cat"))
    assert len(task.select) == MIN_HELD_OUT_TO_SPLIT // 5
    assert halves(task) == {role: {"train" if role in ("score", "repair") else "val"} for role in ROLES}


def test_another_order_of_all_classes_keeps_the_pools(large: Path) -> None:
    source = open_source(str(large))
    turned = restrict_classes(source, ("dog", "cat"))
    assert turned.select.ids == source.select.ids
    assert (turned.select.labels == 1 - source.select.labels).all()
