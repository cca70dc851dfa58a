"""Data with boxes in each format: what is read, where boxes land in the input, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from box_folders import HEIGHT, NAMES, WIDTH, WRITERS, draw, write_coco, write_voc, write_yolo
from PIL import Image

from pxcompress.data import load_splits, open_source
from pxcompress.data.items import Item, collect_items
from pxcompress.data.resizing import Resize
from pxcompress.errors import DataError
from pxcompress.models.signature import Signature
from pxcompress.tasks.agreement import Agreement
from pxcompress.types import Preprocessing

HALVES = (("train", range(24)), ("val", range(24, 40)))
BORDER = Preprocessing((3, 48, 48), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bilinear", crop_mode="border")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("halves", [HALVES, HALVES[:1]])
def test_a_folder_in_any_format_is_read(name: str, halves: tuple[tuple[str, range], ...], tmp_path: Path) -> None:
    source = open_source(str(WRITERS[name](tmp_path / "data", halves)))
    assert (source.layout, source.outputs) == ("boxes", 3)
    assert sorted(source.classes) == sorted(NAMES)
    pools = (source.train, source.select, source.held_out)
    assert sum(map(len, pools)) == sum(len(numbers) for _, numbers in halves)
    resize = Resize(Preprocessing((3, HEIGHT, WIDTH), (0.5,) * 3, (0.25,) * 3))
    for pool in pools:
        for place, sample in enumerate(pool.ids):
            _, expected = draw(int(Path(sample).stem))
            target = pool.targets(int(pool.positions[place]), (WIDTH, HEIGHT), resize).numpy()
            assert target[-1].tolist() == [-1, 0, 0, WIDTH, HEIGHT, 3]
            boxes = [(source.classes[int(row[0])], *row[1:5]) for row in target if row[0] >= 0]
            expected_boxes = [(NAMES[k], *corners) for k, *corners in expected]
            assert [row[0] for row in sorted(boxes)] == [row[0] for row in sorted(expected_boxes)]
            for one, other in zip(sorted(boxes), sorted(expected_boxes), strict=True):
                np.testing.assert_allclose(one[1:], other[1:], atol=1e-4)


def test_boxes_and_images_go_the_same_way(tmp_path: Path) -> None:
    """Inside the box of the input the pixels are the square's, around it they are not."""
    source = open_source(str(write_coco(tmp_path / "data", HALVES)))
    splits = load_splits(source, BORDER)
    inputs, targets = next(iter(splits.score))
    assert targets.shape == (len(inputs), 4, 6)
    assert targets[:, -1].unique(dim=0).tolist() == [[-1, 0, 0, 48, 48, 3]]
    border = round((48 - 48 * HEIGHT / WIDTH) / 2)
    assert inputs[:, :, : border - 1].abs().max() < 0.02  # the border is the input's zero
    last = targets[:, :-1][torch.arange(len(targets)), (targets[:, :-1, 0] >= 0).sum(1) - 1]
    for image, (label, x, y, right, bottom, _) in zip(inputs, last.tolist(), strict=True):
        if label < 0:
            continue
        inside = image[:, round(y) + 2 : round(bottom) - 2, round(x) + 2 : round(right) - 2]
        assert inside.mean((1, 2)).argmax() == label
        assert inside[int(label)].mean() > 1


def _mark_joints(root: Path) -> None:
    """Two joints for every object: the first corner of its box, and its middle, which is marked in every second one."""

    def change(content: dict) -> None:
        for category in content["categories"]:
            category["keypoints"] = ["corner", "middle"]
        for place, each in enumerate(content["annotations"]):
            x, y, width, height = each["bbox"]
            each.update(keypoints=[x, y, 2, x + width / 2, y + height / 2, place % 2], area=width * height / 2)

    _json(change)(root)


def test_joints_and_boxes_go_the_same_way(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "data", HALVES[:1])
    _mark_joints(root)
    (root / "annotations" / "instances_train.json").rename(root / "annotations" / "person_keypoints_train.json")
    source = open_source(str(root))
    assert (source.layout, source.outputs) == ("keypoints", 3)
    inputs, targets = next(iter(load_splits(source, BORDER).score))
    assert targets.shape == (len(inputs), 4, 6 + 1 + 3 * 2)
    rows = targets[:, :-1][targets[:, :-1, 0] >= 0]
    low, high = rows[:, 1:3], rows[:, 3:5]
    assert torch.allclose(rows[:, 7:9], low, atol=1e-3)
    assert torch.allclose(rows[:, 10:12], (low + high) / 2, atol=1e-3)
    assert torch.allclose(rows[:, 6], (high - low).prod(1) / 2, rtol=1e-3)
    assert rows[:, 9].eq(1).all()
    assert set(rows[:, 12].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize("size", [(40, 32), (32, 40), (33, 33), (90, 20), (20, 61)])
@pytest.mark.parametrize("sides", [(24, 24), (24, 36)])
def test_corners_move_as_pixels_do(crop_mode: str, size: tuple[int, int], sides: tuple[int, int]) -> None:
    resize = Resize(Preprocessing((3, *sides), (0.5,) * 3, (1.0,) * 3, "nearest", 0.9, crop_mode))
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    image = Image.fromarray(np.stack([columns, rows, np.full_like(rows, 255)], 2).astype(np.uint8))
    pixels = resize.image(image).numpy()
    ys, xs = np.nonzero(pixels[2] == 255)  # what is no border
    corners = np.stack([pixels[0, ys, xs], pixels[1, ys, xs]] * 2, 1) + 0.5
    resized = resize.corners(corners, size)
    step = max(1.0, max(sides) / min(size) * 1.2)
    assert np.abs(resized[:, 0] - xs - 0.5).max() <= step
    assert np.abs(resized[:, 1] - ys - 0.5).max() <= step


Spoil = Callable[[Path], None]


def _json(change: Callable[[dict], None]) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / "annotations" / "instances_train.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def _text(name: str, text: str) -> Spoil:
    return lambda root: (root / name).write_text(text) and None


def _items(targets: list[list[list[float]]]) -> list[Item]:
    images = np.zeros((len(targets), 3, 20, 30), np.float32)
    masks = np.ones((len(targets), 20, 30), np.int64)
    return [
        Item(str(number), {"pixel_values": image, "pixel_mask": mask}, np.array(target, np.float32))
        for number, (image, mask, target) in enumerate(zip(images, masks, targets, strict=True))
    ]


def test_boxes_may_come_with_inputs_of_ones_own() -> None:
    """Also with several inputs, such as padded images and their masks; an image may have no box."""
    data = collect_items("mine:data", {"all": _items([[[1, 2, 3, 9, 8], [0, 0, 0, 30, 20]], [], [[1, 5, 5, 6, 6]]])})
    assert (data.layout, data.classes, data.outputs) == ("boxes", ("0", "1"), 2)
    assert [each.name for each in data.inputs] == ["pixel_values", "pixel_mask"]
    targets = [data.train.targets(place, None, None) for place in range(3)]
    frame = [-1, 0, 0, 30, 20, 2]
    nothing = [-1, 0, 0, 0, 0, 0]
    assert targets[0].tolist() == [[1, 2, 3, 9, 8, 0], [0, 0, 0, 30, 20, 0], frame]
    assert targets[1].tolist() == [nothing, nothing, frame]
    blank = Signature(data.inputs).blank(data.native_size)
    values = Signature(data.inputs).unpack(blank)
    assert not values["pixel_values"].any()
    assert values["pixel_mask"].all()  # nothing is hidden


@pytest.mark.parametrize("row", [[0.5, 1, 1, 2, 2], [0, 5, 5, 4, 6], [0, 1, 1, 31, 5], [-1, 1, 1, 2, 2]])
def test_boxes_of_ones_own_that_cannot_be_are_named(row: list[float]) -> None:
    with pytest.raises(DataError, match=r"item 1: its target has the box \(.*\) in an input of 30x20; expected"):
        collect_items("mine:data", {"all": _items([[[1, 2, 3, 9, 8]], [row]])})


BAD: dict[str, tuple[str, Spoil, str]] = {
    "a box outside": ("coco", _json(lambda c: c["annotations"][0].update(bbox=[5, 5, 90, 4])), "lies outside of it"),
    "a box turned around": ("coco", _json(lambda c: c["annotations"][0].update(bbox=[9, 9, -4, 4])), "turned around"),
    "three numbers": ("coco", _json(lambda c: c["annotations"][0].update(bbox=[5, 5, 9])), "four numbers"),
    "an unknown category": ("coco", _json(lambda c: c["annotations"][0].update(category_id=7)), "box of category 7"),
    "an unknown image": ("coco", _json(lambda c: c["annotations"][0].update(image_id=777)), "box of image 777"),
    "a missing image": (
        "coco",
        lambda root: (root / "train" / "3.png").unlink(),
        r"instances_train.json names image '.*3.png', which is not there \(1 of 40",
    ),
    "an empty file": ("coco", _text("annotations/instances_train.json", ""), "cannot be read .* expected a COCO file"),
    "another file": ("coco", _text("annotations/instances_train.json", "[]"), "is something else; expected a COCO"),
    "no images": ("coco", _json(lambda c: c.update(images=[])), "has no images"),
    "no box at all": ("coco", _json(lambda c: c.update(annotations=[])), None),
    "other categories": ("coco", _json(lambda c: c["categories"].pop()), "has other categories than"),
    "the wrong size": (
        "coco",
        _json(lambda c: [each.update(width=50) for each in c["images"]]),
        "annotation says 50x32",
    ),
    "a joint too few": (
        "coco",
        _json(
            lambda c: (c["categories"][0].update(keypoints=["a", "b"]), c["annotations"][0].update(keypoints=[1, 1, 2]))
        ),
        "has an object with 3 numbers as keypoints; expected 3 for each of 2",
    ),
    "two columns": ("yolo", _text("labels/train/0.txt", "1 0.5"), "0.txt, line 1 has 2 columns; expected 5"),
    "a word": ("yolo", _text("labels/train/0.txt", "1 a b c d"), "line 1 is '1 a b c d'; expected numbers"),
    "a class above": ("yolo", _text("labels/train/0.txt", "3 .5 .5 .1 .1"), "has class 3; expected 0 to 2"),
    "shares above 1": ("yolo", _text("labels/train/0.txt", "1 50 50 9 9"), "lies outside of it"),
    "no names": ("yolo", _text("data.yaml", "train: images/train"), "has no names:"),
    "no such folder": (
        "yolo",
        _text("data.yaml", "train: pictures\nnames: [a, b]"),
        "says train: pictures, which is not",
    ),
    "an empty index": ("yolo", _text("data.yaml", ""), "data.yaml is something else"),
    "broken XML": ("voc", _text("Annotations/0.xml", "<annotation>"), "0.xml cannot be read"),
    "no bndbox": (
        "voc",
        _text(
            "Annotations/0.xml",
            "<annotation><size><width>9</width><height>9</height></size><object><name>red</name></object></annotation>",
        ),
        "an object without name or bndbox",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_end_in_one_line(case: str, tmp_path: Path) -> None:
    name, spoil, message = BAD[case]
    root = WRITERS[name](tmp_path / "data", HALVES)
    spoil(root)
    if message is None:
        assert open_source(str(root)).layout == "boxes"
        return
    with pytest.raises(DataError, match=message) as caught:
        load_splits(open_source(str(root)), BORDER)
    assert "\n" not in str(caught.value)


def test_images_alone_have_no_boxes(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "data", HALVES)
    for path in root.glob("labels/*/*.txt"):
        path.unlink()
    with pytest.raises(DataError, match="have 40 images and no box"):
        open_source(str(root))
    assert open_source(str(root), Agreement()).layout == "unlabelled"


def test_a_file_of_its_own_and_polygons(tmp_path: Path) -> None:
    source = open_source(str(write_coco(tmp_path / "coco", HALVES[:1]) / "annotations" / "instances_train.json"))
    assert source.layout == "boxes"
    root = write_yolo(tmp_path / "yolo", HALVES[:1])
    (root / "labels" / "train" / "0.txt").write_text("2 0.1 0.2 0.5 0.2 0.3 0.6")
    data = open_source(str(root / "data.yaml"))
    pool = next(each for each in (data.train, data.select, data.held_out) if "images/train/0.png" in each.ids)
    place = int(pool.positions[pool.ids.index("images/train/0.png")])
    np.testing.assert_allclose(pool.targets.rows[place], [[2, 0.1, 0.2, 0.5, 0.6, 0]])


def test_difficult_objects_do_not_count(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data", HALVES[:1])
    path = root / "Annotations" / "0.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    data = open_source(str(root))
    crowds = [rows[:, 5].any() for rows in data.train.targets.rows]
    assert sum(crowds) == 1
