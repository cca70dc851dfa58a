"""Tables of images with labels or numbers, and images without targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_layouts import COUNT, batches_by_id, error_of, save_images, save_masked, save_table

from pxcompress.data import open_source, restrict_classes
from pxcompress.data.tables import read_words
from pxcompress.errors import DataError


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


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_spreadsheets(tmp_path, separator):
    """With a byte-order mark, semicolons or tabs between columns, and Windows's ends of lines."""
    table = save_table(tmp_path, f"\ufeffpath{separator}label", lambda index, name: f"{name}{separator}a,{index % 3}")
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    assert open_source(str(table)).classes == ("a,0", "a,1", "a,2")


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
