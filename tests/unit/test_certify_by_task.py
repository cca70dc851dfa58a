"""Samples to certify on are read as the task of the files says, with or without names in the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from image_layouts import save_table
from linear_files import LEVELS, classifier_file

from pxcompress.certify.path import RiskLimit
from pxcompress.errors import InputError
from pxcompress.run_folder.certificate import Draw, judge_files, reserve_samples

ONE_AGE: Callable[[int, str], str] = lambda index, name: f"{name},{20 + index}"  # noqa: E731
THREE_BITS: Callable[[int, str], str] = lambda index, name: f"{name},{index % 2},1,0"  # noqa: E731
AGES = "path,label"
BITS = "path,a,b,c"


def certify(folder: Path, names: tuple[str, ...], task: str, header: str, row: object, outputs: int) -> tuple[str, ...]:
    """Outcomes of two linear models of `outputs` numbers, whose files have these names and task, on a table."""
    files = [classifier_file(folder / f"{k}.onnx", LEVELS[:outputs], 100 * k, names=names, task=task) for k in range(2)]
    samples = reserve_samples(files, Draw(str(save_table(folder, header, row))))
    path = [(str(file), 1.0, file) for file in files]
    certificate = judge_files(path, samples, RiskLimit("loss-increase", 0.9))
    assert len(samples.ids) == 5
    assert list(samples.counts) == [""]
    return tuple(row.name for row in certificate.rows)


@pytest.mark.parametrize("names", [(), ("age",), ("0",)])
def test_whole_numbers_are_no_classes_of_a_regression(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A number alone needs no name, nor do files that were saved without any."""
    assert len(certify(tmp_path, names, "regression", AGES, ONE_AGE, 1)) == 2


@pytest.mark.parametrize("names", [(), ("a", "b", "c")])
@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_vectors_of_bits_are_what_the_files_are_for(tmp_path: Path, names: tuple[str, ...], task: str) -> None:
    assert len(certify(tmp_path, names, task, BITS, THREE_BITS, 3)) == 2


@pytest.mark.parametrize(
    ("names", "task", "header", "row", "expected"),
    [
        (("c", "b", "a"), "regression", BITS, THREE_BITS, r"data .* has 3 classes \(a, b, c\), .* has 3 \(c, b, a\)"),
        (("a",), "regression", BITS, THREE_BITS, r"has 3 classes \(a, b, c\), .* has 1"),
        ((), "regression", AGES, ONE_AGE, "the data have 1 numbers a sample, the model returns 3"),
        ((), "multi-label", AGES, ONE_AGE, "task 'multi-label' reads labels, data .* have classes"),
        (("20", "21", "x"), "classification", AGES, ONE_AGE, r"has 30 classes"),
    ],
)
def test_data_of_another_kind_are_refused_in_one_line(
    tmp_path: Path, names: tuple[str, ...], task: str, header: str, row: object, expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        certify(tmp_path, names, task, header, row, 3)
    assert "\n" not in str(caught.value)
