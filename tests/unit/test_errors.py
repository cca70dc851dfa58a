from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from pxcompress import errors
from pxcompress.data import open_source
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import (
    BudgetError,
    DataError,
    InputError,
    ModelError,
    ParityError,
    PxError,
    ResultError,
    unknown,
)
from pxcompress.models.loading import load_model

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, PxError)]


@pytest.mark.parametrize(
    ("error", "parent", "code"),
    [
        (PxError, Exception, 1),
        (InputError, PxError, 2),
        (ModelError, InputError, 2),
        (DataError, InputError, 2),
        (ResultError, PxError, 3),
        (BudgetError, ResultError, 3),
        (ParityError, ResultError, 3),
    ],
)
def test_tree_and_exit_codes(error: type[PxError], parent: type[Exception], code: int) -> None:
    assert error.__bases__ == (parent,)
    assert error.exit_code == code
    assert str(error("one line")) == "one line"


def test_the_drawn_tree_is_complete() -> None:
    assert all(error.__name__ in (errors.__doc__ or "") for error in ALL)
    assert len(ALL) == 11


def test_unknown_names_suggest_the_nearest() -> None:
    error = unknown("scorer", "magnitud", ["random", "magnitude", "taylor"])
    assert isinstance(error, InputError)
    assert str(error) == "unknown scorer 'magnitud'; did you mean magnitude? known: magnitude, random, taylor"


def test_names_are_near_whatever_their_case() -> None:
    assert "did you mean ResNet18?" in str(unknown("model", "RESNET18", ["ResNet18", "vit"]))


def test_unknown_names_list_all_when_none_is_near() -> None:
    assert str(unknown("scorer", "zzz", ["taylor", "random"])) == "unknown scorer 'zzz'; known: random, taylor"


def test_unknown_takes_any_iterable_and_any_text() -> None:
    assert str(unknown("option", "gama", iter(["gamma"]))) == "unknown option 'gama'; did you mean gamma? known: gamma"
    assert "\n" not in str(unknown("scorer", "two\nlines", ["random"]))
    assert str(unknown("scorer", "", ["b", "a"])) == "unknown scorer ''; known: a, b"


def test_only_few_known_names_are_listed_beside_the_near_ones() -> None:
    many = [f"name{n}" for n in range(20)]
    assert "known:" not in str(unknown("model", "name99", many))
    assert str(unknown("target", "int4", ["fp32", "fp16", "int8"])).endswith("known: fp16, fp32, int8")


@pytest.mark.parametrize(
    ("neighbour", "use"),
    [
        ("photos", lambda folder: open_source(f"{folder}/photso")),
        ("texts.csv", lambda folder: open_source(f"{folder}/text.csv")),
        ("rows.npz", lambda folder: open_source(f"{folder}/row.npz")),
        ("net.onnx", lambda folder: load_model(f"{folder}/nets.onnx", classes=10)),
        ("net.onnx", lambda folder: open_session(folder / "nets.onnx", "cpu")),
        ("net.pth", lambda folder: load_model("resnet10t", classes=10, checkpoint=folder / "nets.pth")),
    ],
)
def test_a_missing_file_is_told_with_what_is_spelt_like_it(
    neighbour: str, use: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / neighbour).touch()
    with pytest.raises(InputError) as caught:
        use(tmp_path)
    assert f"; did you mean {str(tmp_path / neighbour)!r}?" in str(caught.value)


def test_a_path_that_exists_or_lies_nowhere_has_no_suggestion(tmp_path: Path) -> None:
    (tmp_path / "photos").touch()
    assert errors.suggest_path(tmp_path / "photos") == ""
    assert errors.suggest_path(tmp_path / "quite another") == ""
    assert errors.suggest_path(tmp_path / "missing" / "photos") == ""


def test_a_folder_is_no_model_and_a_name_of_timm_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("exported", "test_resnet"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="'exported' is a folder; give a model file in it, hf:exported or"):
        load_model("exported", classes=10)
    assert isinstance(load_model("test_resnet", classes=10).model, nn.Module)
