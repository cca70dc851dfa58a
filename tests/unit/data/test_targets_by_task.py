"""The named task decides how targets are read that could be of several kinds, from every source of data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from image_layouts import batches_by_id, error_of, save_images, save_table

from pxcompress.data import open_source
from pxcompress.data.items import Item, collect_items
from pxcompress.data.samples import UserData, choose_layout, cut
from pxcompress.errors import DataError
from pxcompress.proof import Metric
from pxcompress.tasks import TASKS
from pxcompress.tasks.regression import Regression
from pxcompress.tasks.task import Layout, Task

AGES = [30 + k % 7 for k in range(20)]
BITS = [[k % 2, k // 2 % 2] for k in range(20)]
MAPS = np.arange(20 * 6).reshape(20, 2, 3)
BOXES = [[[1.0, 0, 0, 2, 2 + k % 2]] for k in range(20)]


@dataclass(frozen=True)
class Density(Task):
    """A map of numbers for every sample."""

    metric = Metric("error", unit="number", higher_is_better=False)
    layouts = ("numbers",)


def read(targets: object, *layouts: Layout) -> UserData:
    items = [
        Item(str(k), np.zeros((3, 4, 4), dtype=np.float32), np.asarray(target))
        for k, target in enumerate(targets)  # type: ignore[arg-type]
    ]
    return collect_items("mine:data", {"all": items}, layouts=layouts)


@pytest.mark.parametrize(
    ("targets", "layouts"),
    [
        (AGES, ["classes", "numbers"]),
        ([k % 2 for k in AGES], ["classes", "labels", "numbers"]),
        ([float(age) for age in AGES], ["numbers", "classes"]),
        ([age + 0.5 for age in AGES], ["numbers"]),
        (BITS, ["labels", "numbers"]),
        ([[age, 0] for age in AGES], ["numbers"]),
        (MAPS + 0.5, ["numbers"]),
        ([-age for age in range(20)], ["classes", "numbers"]),
        (np.ones((20, 4, 4), dtype=np.int64), ["masks", "numbers"]),
        (BOXES, ["boxes", "numbers", "masks"]),
    ],
    ids=str,
)
def test_targets_are_read_as_the_task_says_and_keep_their_values(targets: object, layouts: list[Layout]) -> None:
    """Without a task the first kind is taken; one that is impossible is read as if there were no task."""
    every: tuple[Layout, ...] = ("classes", "labels", "masks", "boxes", "numbers")
    for layout in every:
        expected = layout if layout in layouts else layouts[0]
        if (expected in ("masks", "classes") and np.min(targets) < 0) or (layout == "masks" and targets is BOXES):
            with pytest.raises(DataError):
                read(targets, layout)
            continue
        data = read(targets, layout)
        assert data.layout == expected
        if expected == "classes":
            assert data.train.labels.tolist() == list(targets)  # type: ignore[call-overload]
        elif expected != "boxes":
            values = np.stack([data.train.targets(k, None, None).numpy() for k in range(20)])  # type: ignore[misc]
            expected_values = np.asarray(targets)
            assert np.array_equal(values, expected_values.reshape(20, -1) if expected_values.ndim < 3 else targets)
            assert values.dtype == (np.int64 if expected == "masks" else np.float32)
            assert not data.train.labels.any()
    assert read(targets, "unlabelled").layout == "unlabelled"


def test_the_first_possible_layout_that_is_wanted_is_chosen() -> None:
    assert choose_layout(["classes", "numbers"], ()) == "classes"
    assert choose_layout(["classes", "numbers"], ("boxes", "numbers", "classes")) == "classes"
    assert choose_layout(["classes", "numbers"], ("boxes", "numbers")) == "numbers"
    assert choose_layout(["classes", "numbers"], ("boxes",)) == "classes"


def test_targets_that_no_task_reads_are_not_looked_at() -> None:
    targets = [np.nan, *range(19)]
    with pytest.raises(DataError, match="NaN"):
        read(targets)
    assert read(targets, "unlabelled").layout == "unlabelled"


@pytest.mark.parametrize(
    ("header", "row", "layouts"),
    [
        ("path,label", lambda k: f"{AGES[k % 20]}", {"": "classes", "regression": "numbers", "embedding": "classes"}),
        ("path,age", lambda k: f"{AGES[k % 20]}", {"": "numbers", "classification": "classes"}),
        ("path,cat,dog", lambda k: f"{k % 2},{k // 2 % 2}", {"": "numbers", "multi-label": "labels"}),
        ("path,kind", lambda k: "ab"[k % 2], {"classification": "classes", "embedding": "classes"}),
        ("path,labels,age", lambda k: f"a;b,{k}.5", {"": "labels", "regression": "numbers", "agreement": "unlabelled"}),
        ("path", lambda k: "", {"": "unlabelled", "agreement": "unlabelled"}),
    ],
)
def test_columns_of_tables(tmp_path: Path, header: str, row: Callable[[int], str], layouts: dict[str, Layout]) -> None:
    table = save_table(tmp_path, header, lambda index, name: ",".join(filter(None, (name, row(index)))))
    for task, layout in layouts.items():
        source = open_source(str(table), TASKS.build(task) if task else None)
        assert source.layout == layout
        if layout == "numbers":
            columns = [name for name in header.split(",") if name not in ("path", "labels")]
            assert source.classes == tuple(columns)
            read_target, pool = source.train.targets, source.train
            assert read_target is not None
            for name, position in zip(pool.ids, pool.positions, strict=True):
                cells = row(int(Path(name).stem)).split(",")
                assert read_target(position, None, None).tolist() == [float(cell) for cell in cells[-len(columns) :]]


@pytest.mark.parametrize(
    ("header", "cell", "task", "expected"),
    [
        ("path,age", "3.5", "classification", "task 'classification' reads classes, data .* have numbers"),
        ("path,age", "3", "multi-label", "task 'multi-label' reads labels, data .* have numbers"),
        ("path,label", "cat", "regression", "task 'regression' reads numbers, data .* have classes"),
        ("path,x,y", "1,2", "classification", "reads classes, data .* have numbers"),
        ("path", "", "regression", "have unlabelled; give other data, or --task agreement, which"),
    ],
)
def test_wrong_pairs_end_in_one_line(tmp_path: Path, header: str, cell: str, task: str, expected: str) -> None:
    table = save_table(tmp_path, header, lambda _, name: ",".join(filter(None, (name, cell))))
    assert re.search(expected, error_of(table, TASKS.build(task)))


def test_folders_named_by_numbers_are_numbers_for_a_regression(tmp_path: Path) -> None:
    """The halves need not have the same ones."""
    for half, ages in (("train", ("20", "31.5", "-4")), ("val", ("20", "7"))):
        for age in ages:
            save_images(tmp_path / half / age)
    assert "class '7'" in error_of(tmp_path)
    source = open_source(str(tmp_path), Regression())
    assert (source.layout, source.classes, source.outputs) == ("numbers", ("0",), 1)
    for sample, target in batches_by_id(source).items():
        assert target == float(sample.split("/")[1])
    save_images(tmp_path / "train" / "old")
    save_images(tmp_path / "val" / "old")
    save_images(tmp_path / "train" / "7")
    assert "reads numbers, data" in error_of(tmp_path, Regression())
    assert open_source(str(tmp_path), TASKS.build("agreement")).layout == "unlabelled"


def test_a_map_of_numbers_is_no_vector_for_the_users_task() -> None:
    data = read(MAPS + 0.25, *Density.layouts)
    assert data.train.targets is not None
    assert data.train.targets(3, None, None).shape == (2, 3)
    assert data.classes == ()
    assert data.outputs is None
    assert torch.equal(data.train.targets(0, None, None), torch.from_numpy(MAPS[0] + 0.25).float())


@pytest.mark.parametrize(("size", "limit"), [(20, 128), (7, 7), (7, 3)])
def test_a_part_larger_than_the_samples_is_all_of_them(size: int, limit: int) -> None:
    samples = read(AGES[:size], "classes").train
    (part,) = cut(samples, (limit,), np.random.default_rng(0), balanced=True)
    assert len(set(part.ids)) == len(part) == min(size, limit)
