"""Data beyond class folders: masks, tables of labels or numbers, images without targets, a user's own data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pxcompress.data import batches as batches_module
from pxcompress.data import load_splits, open_source, restrict_classes
from pxcompress.data.samples import Source
from pxcompress.data.tables import read_words
from pxcompress.errors import DataError
from pxcompress.types import Preprocessing

SMALL = Preprocessing((3, 8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
ROLES = ("score", "repair", "select", "certify", "test")
COUNT = 30


def save_images(folder: Path, count: int = COUNT, size: tuple[int, int] = (8, 8)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        pixels = np.random.default_rng([index, *folder.name.encode()]).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def mask_of(index: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """Values 0 to 2, and 255 in one corner."""
    mask = np.random.default_rng(index).integers(0, 3, size, np.uint8)
    mask[0, 0] = 255
    return mask


def save_masked(root: Path, count: int = COUNT, size: tuple[int, int] = (8, 8)) -> Path:
    (root / "masks").mkdir(parents=True)
    for index, name in enumerate(save_images(root / "images", count, size)):
        Image.fromarray(mask_of(index, size)).save(root / "masks" / name)
    return root


def save_table(folder: Path, header: str, row: object, *, suffix: str = "csv") -> Path:
    """A table of images; `row` gives the cells beside the path, by the image's number."""
    names = save_images(folder / "files")
    lines = [header] if header else []
    lines += [row(index, f"files/{name}") for index, name in enumerate(names)]  # type: ignore[operator]
    path = folder / f"table.{suffix}"
    path.write_text("\n".join(lines))
    return path


def batches_by_id(source: Source, preprocessing: Preprocessing = SMALL) -> dict[str, torch.Tensor]:
    """Targets of all roles by sample id; the roles are disjoint, but for score and repair."""
    splits = load_splits(source, preprocessing, batch_size=4)
    targets: dict[str, torch.Tensor] = {}
    for role in ROLES:
        rows = torch.cat([batch for _, batch in getattr(splits, role)])
        assert len(rows) == len(splits.ids[role])
        assert role == "repair" or not targets.keys() & set(splits.ids[role])
        targets.update(zip(splits.ids[role], rows, strict=True))
    return targets


def error_of(spec: object, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        load_splits(open_source(str(spec), **options), SMALL)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("memory", [10**9, 0], ids=["stored", "lazy"])
def test_masks(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", memory)
    source = open_source(str(save_masked(tmp_path / "d")))
    assert (source.layout, source.classes, source.outputs) == ("masks", ("0", "1", "2"), 3)
    targets = batches_by_id(source)
    assert len(targets) == COUNT
    for name, target in targets.items():
        assert target.dtype == torch.int64
        np.testing.assert_array_equal(target, mask_of(int(Path(name).stem)))


def test_masks_are_cropped_as_images(tmp_path):
    """An image whose values are those of its mask stays equal to it, where both are resized by nearest neighbour."""
    root = tmp_path / "d"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
        for index in range(COUNT):
            Image.fromarray(mask_of(index, (20, 31))).save(root / name / f"{index}.png")
    nearest = Preprocessing((1, 8, 10), (0.0,), (1.0,), interpolation="nearest", crop=0.8)
    for inputs, targets in load_splits(open_source(str(root)), nearest).score:
        np.testing.assert_array_equal((inputs[:, 0] * 255).round().long(), targets)


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_modes_of_masks(tmp_path, mode):
    root = save_masked(tmp_path / "d")
    for path in (root / "masks").iterdir():
        values = mask_of(int(path.stem))
        if mode == "P":
            image = Image.frombytes("P", (8, 8), values.tobytes())
            image.putpalette([7, 8, 9] * 256)
        else:
            image = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values == 1)
        image.save(path)
    for name, target in batches_by_id(open_source(str(root))).items():
        values = mask_of(int(Path(name).stem))
        np.testing.assert_array_equal(target, values == 1 if mode == "1" else values)


def test_masks_in_halves_with_class_names(tmp_path):
    save_masked(tmp_path / "train")
    save_masked(tmp_path / "val", 12)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\nbus\n")
    source = open_source(str(tmp_path))
    assert source.classes == ("sky", "road", "car", "bus")
    assert all(name.startswith("val/") for name in source.held_out.ids)
    assert len(source.held_out) == 12
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert "value 2, which is no class" in error_of(tmp_path)


def test_bad_masks(tmp_path):
    root = save_masked(tmp_path / "d")
    Image.new("L", (8, 9)).save(root / "masks/3.png")
    message = error_of(root)
    assert "'masks/3.png' is 8x9" in message
    assert "'images/3.png' 8x8" in message
    Image.new("RGB", (8, 8)).save(root / "masks/3.png")
    assert "mode RGB" in error_of(root)
    (root / "masks/3.png").write_bytes(b"nothing")
    assert "'masks/3.png' cannot be read" in error_of(root)
    (root / "masks/3.png").unlink()
    assert "'images/3.png'" in error_of(root)
    (root / "images/3.png").unlink()
    (root / "images/4.png").unlink()
    assert "'masks/4.png'" in error_of(root)


def test_images_without_masks(tmp_path):
    save_images(tmp_path / "images")
    assert "masks/" in error_of(tmp_path)
    assert open_source(str(tmp_path), layout="unlabelled").layout == "unlabelled"


def test_masks_of_one_class(tmp_path):
    root = save_masked(tmp_path / "d")
    for path in (root / "masks").iterdir():
        Image.fromarray(np.array([[0, 255]], np.uint8)).save(path)
    assert "fewer than two classes" in error_of(root)


def test_a_table_with_a_class_for_every_image_is_a_classification(tmp_path):
    words = ("dog", "cat", "ant")
    path = save_table(tmp_path, "path,label,camera", lambda index, name: f"{name},{words[index % 3]},{index % 2}")
    source = open_source(str(path))
    assert (source.layout, source.classes, source.outputs) == ("classes", ("ant", "cat", "dog"), 3)
    for name, label in batches_by_id(source).items():
        assert source.classes[label] == words[int(Path(name).stem) % 3]
    assert read_words(str(path), "camera") == {f"files/{index}.png": str(index % 2) for index in range(COUNT)}
    (tmp_path / "numbers").mkdir()
    numbers = save_table(tmp_path / "numbers", "path,label", lambda index, name: f"{name},{index / 2}")
    assert open_source(str(numbers)).layout == "numbers"


@pytest.mark.parametrize("json_list", [False, True])
def test_table_of_labels(tmp_path, json_list):
    def row(index: int, name: str) -> str:
        labels = [label for place, label in enumerate("abc") if index >> place & 1]
        cell = json.dumps(labels).replace('"', '""') if json_list else ";".join(labels)
        return f'{name},"{cell}"'

    source = open_source(str(save_table(tmp_path, "path,labels", row)))
    assert (source.layout, source.classes, source.outputs) == ("labels", ("a", "b", "c"), 3)
    for name, target in batches_by_id(source).items():
        assert target.dtype == torch.float32
        assert target.tolist() == [int(Path(name).stem) >> place & 1 for place in range(3)]


def test_table_of_numbers_with_halves(tmp_path):
    def row(index: int, name: str) -> str:
        half = "val" if index % 3 == 0 else "train"
        return json.dumps({"image": name, "age": index, "size": index / 4, "split": half})

    source = open_source(str(save_table(tmp_path, "", row, suffix="jsonl")))
    assert (source.layout, source.classes, source.outputs) == ("numbers", ("age", "size"), 2)
    assert {int(Path(name).stem) % 3 for name in source.held_out.ids} == {0}
    for name, target in batches_by_id(source).items():
        assert target.tolist() == [int(Path(name).stem), int(Path(name).stem) / 4]


def test_columns_of_words_beside_numbers_are_no_targets(tmp_path):
    cameras = ("front", "cam 2")
    table = save_table(tmp_path, "path,age,camera", lambda index, name: f"{name},{index},{cameras[index % 2]}")
    source = open_source(str(table))
    assert (source.classes, source.outputs) == (("age",), 1)
    words = read_words(str(table), "camera")
    assert {name: words[name] for name in source.held_out.ids} == {
        name: cameras[int(Path(name).stem) % 2] for name in source.held_out.ids
    }
    assert "holds '0,5', which" in error_of(
        save_table(tmp_path, "path,age,size", lambda index, name: f'{name},{index},"0,5"')
    ), "a number that is written in another way"


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (("A", "2", "b"), ("2", "A", "b")),
        (("10", "9", "0"), ("0", "9", "10")),
        (("A", "-1", "0.5"), ("-1", "0.5", "A")),
    ],
)
def test_a_column_label_holds_classes_by_name_or_whole_number(tmp_path, cells, classes):
    table = save_table(tmp_path, "path,label", lambda index, name: f"{name},{cells[index % 3]}")
    source = open_source(str(table))
    assert (source.layout, source.classes) == ("classes", classes)
    for part in (source.train, source.select, source.held_out):
        assert [classes[label] for label in part.labels] == [cells[int(Path(name).stem) % 3] for name in part.ids]


@pytest.mark.parametrize("column", ["Label", "class", "CLASS"])
def test_other_names_of_the_column(tmp_path, column):
    source = open_source(
        str(save_table(tmp_path, f"path,{column},age", lambda index, name: f"{name},{index % 3},{index}"))
    )
    assert (source.layout, source.classes) == ("classes", ("0", "1", "2"))


def test_an_empty_label_is_said(tmp_path):
    table = save_table(tmp_path, "path,label", lambda index, name: f"{name},{'' if index == 9 else index % 3}")
    assert "row 10: column 'label' is empty; expected a class in every row" in error_of(table)


@pytest.mark.parametrize(("value", "is_noted"), [("{0}", False), ("{1}", True), ("{1}.5", False)])
def test_few_whole_numbers_could_be_classes(tmp_path, value, is_noted):
    table = save_table(tmp_path, "path,kind", lambda index, name: f"{name},{value.format(index, index % 3)}")
    source = open_source(str(table))
    assert source.layout == "numbers"
    assert any("for classes call it 'label'" in note for note in source.notes) == is_noted


def test_a_column_label_of_other_numbers_is_a_regression(tmp_path):
    source = open_source(str(save_table(tmp_path, "path,label", lambda index, name: f"{name},{index / 2}")))
    assert (source.layout, source.classes) == ("numbers", ("label",))


@pytest.mark.parametrize(
    ("header", "cells", "expected"),
    [
        ("path,age", "x", "column 'age' holds 'x', which is no finite number"),
        ("path,age", "nan", "'nan', which is no finite number"),
        ("path,age", "1,2", "row 1: 3 columns; expected 2"),
        ("path,split,age", "middle,1", "split 'middle'"),
        ("name,age", "1", "expected one of path, image, file"),
        ("path,path", "1", "two columns of one name"),
        ("path,labels", "", "column 'labels' is empty"),
        ("path,labels", '"[a"', "no JSON list"),
    ],
)
def test_bad_tables(tmp_path, header, cells, expected):
    assert expected in error_of(save_table(tmp_path, header, lambda index, name: f"{name},{cells}"))


def test_tables_without_rows_targets_or_images(tmp_path):
    table = tmp_path / "t.csv"
    assert "cannot be read" in error_of(table)
    table.write_text("path,age\n")
    assert "is empty" in error_of(table)
    table.write_text("path,age\nno.png,1\n")
    assert "no image 'no.png'" in error_of(table)
    save_images(tmp_path, 1)
    table.write_text("path\n0.png\n")
    assert "has no targets" in error_of(table)
    table.write_text("path,age\n0.png,1\n0.png,2\n")
    assert "row 2: image '0.png' is in row 1 already" in error_of(table)


def test_unlabelled_images(tmp_path):
    save_images(tmp_path / "flat")
    source = open_source(str(tmp_path / "flat"))
    assert (source.layout, source.classes, source.outputs) == ("unlabelled", (), None)
    assert len(batches_by_id(source)) == COUNT
    assert restrict_classes(source, ()) is source


def test_any_folder_as_unlabelled(tmp_path):
    for name in ("cat", "dog/deep"):
        save_images(tmp_path / name)
    assert open_source(str(tmp_path)).layout == "classes"
    source = open_source(str(tmp_path), layout="unlabelled")
    assert len(batches_by_id(source)) == 2 * COUNT
    assert "no folder" in error_of("digits", layout="unlabelled")
    assert "expected 'unlabelled'" in error_of(tmp_path, layout="masks")


def test_no_classes_to_choose_from(tmp_path):
    assert restrict_classes(open_source("digits"), ("3", "1")).outputs == 2
    assert open_source("digits").outputs == 10
    with pytest.raises(DataError, match="no class per image"):
        restrict_classes(open_source(str(save_masked(tmp_path / "d"))), ("0", "1"))


FACTORIES = """
import numpy as np, torch
from torch.utils.data import Dataset

X = np.arange(30 * 12, dtype=np.float32).reshape(30, 3, 2, 2)

class Own(Dataset):
    def __len__(self): return 30
    def __getitem__(self, index): return torch.from_numpy(X[index % 30]), index % 3

def classes(): return Own()
def masks(): return [(x, np.full((2, 2), i % 4)) for i, x in enumerate(X)]
def numbers(): return ((x, float(i)) for i, x in enumerate(X))
def labels(): return [(x, [i % 2, 1, 0]) for i, x in enumerate(X)]
def unlabelled(): return iter(X)
def halves(): return {"val": [(x, 0) for x in X[20:]], "train": [(x, 1) for x in X[:20]]}

def broken(): raise KeyError("no such file")
def nothing(): return None
def empty(): return []
def ragged(): return [X[0], X[0][:2]]
def ragged_targets(): return [(X[0], [1.0]), (X[0], [1.0, 2.0])]
def texts(): return [("a", 1)]
def text_targets(): return [(X[0], "cat")]
def holes(): return [(X[0], 1.0), (X[0], float("nan"))]
def other_size(): return [(X[0], np.zeros((3, 2), int))]
def some_targets(): return [(X[0], 1), X[0]]
def strange_keys(): return {"trian": []}
def negative(): return [(X[0], -1), (X[1], 1)]
not_callable = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """Name of a module of factories in the current folder, another one for each test."""
    monkeypatch.chdir(tmp_path)
    name = f"factories_{abs(hash(tmp_path))}"
    Path(f"{name}.py").write_text(FACTORIES)
    return name


@pytest.mark.parametrize(
    ("layout", "classes", "target_of"),
    [
        ("classes", ("0", "1", "2"), lambda i: i % 3),
        ("masks", ("0", "1", "2", "3"), lambda i: [[i % 4] * 2] * 2),
        ("numbers", ("0",), lambda i: [float(i)]),
        ("labels", ("0", "1", "2"), lambda i: [float(i % 2), 1.0, 0.0]),
        ("unlabelled", (), lambda i: 0),
    ],
)
def test_factories(factories, layout, classes, target_of):
    source = open_source(f"{factories}:{layout}")
    assert (source.layout, source.classes, source.outputs) == (layout, classes, len(classes) or None)
    assert source.native_size == (3, 2, 2)
    targets = batches_by_id(source, Preprocessing((3, 2, 2)))
    assert len(targets) == COUNT
    for name, target in targets.items():
        assert target.tolist() == target_of(int(name.partition("/")[2]))
        assert target.dtype == (torch.float32 if layout in ("numbers", "labels") else torch.int64)


def test_factory_with_halves(factories):
    source = open_source(f"{factories}:halves")
    assert set(source.train.labels) == {1}
    assert set(source.held_out.labels) == {0}
    assert all(name.startswith("val/") for name in source.held_out.ids)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("broken", "calling it failed: KeyError"),
        ("nothing", "returned a NoneType; expected an iterable"),
        ("empty", "returned no items"),
        ("ragged", "item 1: inputs have shapes (3, 2, 2) and (2, 2, 2)"),
        ("ragged_targets", "item 1: targets have shapes (1,) and (2,)"),
        ("texts", "a str holds no numbers"),
        ("text_targets", "a str holds no numbers"),
        ("holes", "item 1: its target holds NaN"),
        ("other_size", "masks are 3x2, their inputs 2x2"),
        ("some_targets", "only 1 of 2 items have targets"),
        ("strange_keys", "'trian'"),
        ("negative", "class -1"),
        ("not_callable", "is a int; expected a callable"),
        ("classses", "did you mean classes"),
    ],
)
def test_bad_factories(factories, factory, expected):
    assert expected in error_of(f"{factories}:{factory}")


def test_factory_without_a_module(factories):
    assert "importing 'no_such_module' failed" in error_of("no_such_module:data")
