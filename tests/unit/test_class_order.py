"""Which output stands for which class: names decide, else both usual orders are tried."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pxcompress.data import Source, match_class_order, open_source, restrict_classes
from pxcompress.errors import ModelError
from pxcompress.models.class_names import imagenet_classes
from pxcompress.models.loading import Architecture, LoadedModel, load_model
from pxcompress.recipe import Recipe
from pxcompress.types import Preprocessing
from pxcompress.workload import load_workload

NAMES = ("ant", "Bee", "c10", "c2")
BY_CODE, AS_TIMM = ("Bee", "ant", "c10", "c2"), ("ant", "Bee", "c2", "c10")
SHADES = Preprocessing((3, 4, 4), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Shade(nn.Module):
    """Knows a class of `NAMES` by how bright the image is; output i stands for `order[i]`."""

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__()
        self.register_buffer("shades", torch.tensor([NAMES.index(name) / 4 for name in order]))

    def forward(self, inputs: Tensor) -> Tensor:
        return -(inputs.mean((1, 2, 3))[:, None] - self.shades).abs()


def loaded(order: Sequence[str], names: Sequence[str] = ()) -> LoadedModel:
    return LoadedModel(Shade(order).eval(), Architecture("x"), SHADES, "checkpoint", 4, tuple(names))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("data")
    for half, count in (("train", 40), ("val", 10)):
        for number, name in enumerate(NAMES):
            (root / half / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([number, index, count]).normal(64 * number, 4, (4, 4, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / half / name / f"{index}.png")
    return open_source(str(root))


def test_folders_know_both_orders(data: Source) -> None:
    assert (data.classes, data.other_order) == (BY_CODE, AS_TIMM)


def right(source: Source, model: nn.Module) -> float:
    inputs = [np.asarray(source.held_out.load(index)).mean() / 255 for index in range(len(source.held_out))]
    values = torch.tensor(inputs, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 4, 4)
    return float((model(values).argmax(1).numpy() == source.held_out.labels).mean())


@pytest.mark.parametrize(
    ("order", "names", "classes", "words"),
    [
        (AS_TIMM, (), AS_TIMM, "numbered in timm's order, which fits the weights"),
        (BY_CODE, (), BY_CODE, "numbered by code point, which fits the weights"),
        (("c2", "ant", "Bee", "c10"), ("c2", "ant", "bee", "C10"), ("c2", "ant", "Bee", "c10"), "as the weights name"),
        (AS_TIMM, AS_TIMM, AS_TIMM, "as the weights name them: ant, Bee, c2, c10"),
        (AS_TIMM, ("w", "x", "y", "z"), AS_TIMM, "name other classes than the data, such as 'w'"),
    ],
)
def test_classes_are_numbered_as_the_outputs_are(
    data: Source, order: Sequence[str], names: Sequence[str], classes: Sequence[str], words: str
) -> None:
    model = loaded(order, names)
    source = match_class_order(data, model)
    assert source.classes == tuple(classes)
    assert right(source, model.model) > 0.95
    assert any(words in note for note in source.notes)
    assert all("\n" not in note for note in source.notes)


def test_names_in_the_data_s_own_order_say_nothing(data: Source) -> None:
    assert match_class_order(data, loaded(BY_CODE, BY_CODE)) is data


def test_what_cannot_be_told_is_a_warning(data: Source) -> None:
    model = loaded(AS_TIMM)
    model.model.shades.fill_(0.5)  # always the first output
    source = match_class_order(data, model)
    assert source.classes == BY_CODE
    assert source.notes[-1].startswith("THE ORDER OF THE CLASSES IS NOT KNOWN, code point is taken")


def test_one_order_needs_no_trial(tmp_path: Path, data: Source) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    source = open_source(str(tmp_path))
    assert source.other_order == ()
    assert match_class_order(source, loaded(AS_TIMM)) is source


def test_a_part_of_the_classes_is_found_by_name_and_the_model_keeps_all(data: Source) -> None:
    order = ("x", "c2", "BEE", "y", "ant", "c10")
    torch_order = tuple(name if name in ("x", "y") else {"BEE": "Bee"}.get(name, name) for name in order)
    model = Shade([{"x": "c10", "y": "c10"}.get(name, name) for name in torch_order])
    model.shades[[0, 3]] = 9.0
    extended = match_class_order(data, LoadedModel(model.eval(), Architecture("x"), SHADES, "checkpoint", 6, order))
    assert extended.classes == torch_order
    assert extended.outputs == 6
    assert right(extended, model) == 1.0
    assert any("4 of the model's 6 classes" in note for note in extended.notes)


@pytest.mark.parametrize(
    ("count", "names", "is_imagenet"),
    [
        (1000, ("n01440764", "n15075141"), True),
        (1000, ("n01440764", "n99999999"), False),
        (1000, ("tench", "bolete"), False),
        (100, ("n01440764", "n15075141"), False),
        (1000, (), False),
    ],
)
def test_folders_named_as_in_imagenet_say_which_outputs_they_are(
    count: int, names: Sequence[str], is_imagenet: bool
) -> None:
    classes = imagenet_classes(count, names)
    assert bool(classes) == is_imagenet
    assert not is_imagenet or (classes[0], classes[-1], len(classes)) == ("n01440764", "n15075141", 1000)


def test_weights_of_more_classes_serve_data_of_some(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t", num_classes=1000).state_dict(), tmp_path / "weights.safetensors")
    options = {"classes": 2, "checkpoint": tmp_path / "weights.safetensors", "input_size": 32}
    loaded_model = load_model("resnet10t", **options, data_classes=("n01440764", "n01443537"))
    assert (loaded_model.classes, loaded_model.class_names[1]) == (1000, "n01443537")
    with pytest.raises(ModelError, match="1000"):
        load_model("resnet10t", **options, data_classes=("tench", "goldfish"))


def test_a_factory_is_told_how_many_classes_the_data_have() -> None:
    """Its own default, where it has one, says nothing of the data."""
    loaded_model = load_model(
        "models:AnyClasses",
        classes=3,
        pretrained=True,
        input_size=16,
        data_classes=("n01440764", "n01443537", "n01484850"),
    )
    assert loaded_model.classes == 3


def test_numbers_are_outputs_where_the_data_have_some_of_them(data: Source) -> None:
    model = loaded(BY_CODE)
    some = replace(restrict_classes(data, ("Bee", "c10")), classes=("00", "2"), other_order=())
    source = match_class_order(some, model)
    assert (source.classes, source.outputs) == (("00", "1", "2", "3"), 4)
    assert "numbers, taken for the model's outputs: 2 of 4" in source.notes[-1]
    assert right(source, model.model) > 0.95


@pytest.mark.parametrize("names", [("0", "4"), ("0", "x"), ("0", "00")])
def test_other_names_are_no_numbers_of_outputs(data: Source, names: Sequence[str]) -> None:
    some = replace(restrict_classes(data, ("Bee", "c10")), classes=tuple(names), other_order=())
    assert match_class_order(some, loaded(BY_CODE)).classes == tuple(names)


def test_numbers_that_do_not_begin_at_0_are_noted(data: Source) -> None:
    numbered = replace(data, classes=("1", "2", "3", "4"), other_order=())
    assert (
        match_class_order(numbered, loaded(BY_CODE)).notes[-1] == "class '1' is output 0, class '2' output 1, and so on"
    )
    numbered = replace(data, classes=("0", "1", "2", "3"), other_order=())
    assert match_class_order(numbered, loaded(BY_CODE)) is numbered


def test_embedded_data_are_no_part_of_a_model_s_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten digits are numbers; a user's folder of such names would be taken for some of twelve outputs."""

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12))

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(net=net))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="has 12 classes, the data has 10"):
        load_workload(Recipe("mine:net", 0.5, data="digits"))
