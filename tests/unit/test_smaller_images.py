"""Where the dense model on smaller images does better than the pruned one, a run says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from command import image_folder
from models import CLASSES
from torch import Tensor, nn

from pxcompress.cost.count import count_macs
from pxcompress.deploy.predictions import predictions
from pxcompress.proof import Warning
from pxcompress.recipe import ModelAndData
from pxcompress.run_folder.smaller_images import ResizedInputs, recommend_smaller_images
from pxcompress.workload import Workload, load_workload

SIDE = 32
BRIGHTNESS = torch.tensor([(40.0 + 40.0 * label) / 255.0 for label in range(CLASSES)])
"""Of the images of each class, on average."""


class BrightnessNet(nn.Module):
    """Names the class whose brightness is nearest, of images of any size; `wide` channels do what one could."""

    def __init__(self, wide: int, stride: int = 1) -> None:
        super().__init__()
        self.mean = nn.Conv2d(3, wide, 1, stride, bias=False)
        self.classes = nn.Linear(wide, CLASSES)
        with torch.no_grad():
            self.mean.weight.fill_(1 / 3)
            self.classes.weight.copy_(2 * BRIGHTNESS[:, None].expand(-1, wide) / wide)
            self.classes.bias.copy_(-BRIGHTNESS.square())

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.mean(x).mean((2, 3)))


class OneSize(BrightnessNet):
    """The same for images of one size only, as a flatten before a linear layer asks for."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (SIDE, SIDE):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return super().forward(x)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = image_folder(tmp_path_factory.mktemp("data"), {"train": 12, "val": 30}, CLASSES, SIDE)
    request = ModelAndData("models:FlattenCNN", data=str(folder), input_size=(SIDE, SIDE), input_mean="0-1")
    return load_workload(request)


def recommend(workload: Workload, dense: nn.Module, slim: nn.Module) -> tuple[Warning, ...]:
    of_dense = replace(workload, loaded=replace(workload.loaded, model=dense))
    as_file = ResizedInputs(slim, (SIDE, SIDE), workload.task.output_name)
    judged = predictions({"slim": as_file}, "slim", "slim", workload.splits.test, workload.task)
    macs = count_macs(dense, workload.splits.example), count_macs(slim, workload.splits.example)
    return recommend_smaller_images(macs, judged["slim"], of_dense)


def ruined(model: BrightnessNet) -> BrightnessNet:
    nn.init.zeros_(model.classes.weight)
    return model


def test_it_is_said_with_the_size_and_both_figures(workload: Workload) -> None:
    (warning,) = recommend(workload, BrightnessNet(8), ruined(BrightnessNet(6)))
    assert warning.code == "smaller-images"
    assert "give --input-size 24x24" in warning.text, "27.7 pixels and fewer have no more MACs"
    assert "0.56 of the MACs with top-1 100.0%" in warning.text
    assert f"the pruned model has {1 / CLASSES:.1%}" in warning.text


def test_images_shrink_until_the_model_has_no_more_macs(workload: Workload) -> None:
    """Of images of 32, 28, 24 and 20 pixels a stride of 16 leaves 2 x 2 places, of 16 pixels one."""
    (warning,) = recommend(workload, BrightnessNet(8, stride=16), ruined(BrightnessNet(6, stride=16)))
    assert "give --input-size 16x16" in warning.text


@pytest.mark.parametrize(
    ("dense", "slim"),
    [
        (lambda: BrightnessNet(8), lambda: BrightnessNet(6)),  # which does as well
        (lambda: OneSize(8), lambda: ruined(BrightnessNet(6))),  # smaller images cannot be tried
        (lambda: BrightnessNet(8), lambda: ruined(BrightnessNet(8))),  # nothing was removed
        (lambda: BrightnessNet(8), lambda: ruined(BrightnessNet(1))),  # too small a size
        (lambda: ruined(BrightnessNet(8)), lambda: ruined(BrightnessNet(6))),  # which is not better
    ],
)
def test_otherwise_nothing_is_said(
    workload: Workload, dense: Callable[[], nn.Module], slim: Callable[[], nn.Module]
) -> None:
    assert recommend(workload, dense(), slim()) == ()


def test_outputs_that_follow_the_size_of_the_image_are_not_compared(workload: Workload) -> None:
    class Map(nn.Module):
        def __init__(self, wide: int) -> None:
            super().__init__()
            self.inner, self.outer = nn.Conv2d(3, wide, 1), nn.Conv2d(wide, CLASSES, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x)).flatten(1)

    assert recommend(workload, Map(8), ruined(BrightnessNet(6))) == ()
