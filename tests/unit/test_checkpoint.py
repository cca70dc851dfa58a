"""Which weights of a file are taken: averaged ones first, whole ones only, and the choice is said."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.models.checkpoint import best_fit, load_state, read_checkpoint

State = dict[str, Tensor]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.fixture
def wanted() -> State:
    return {key: torch.randn(value.shape).to(value.dtype) for key, value in net().state_dict().items()}


@pytest.fixture
def raw(wanted: State) -> State:
    """Other weights of the same shapes."""
    return {key: value + 1 for key, value in wanted.items()}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def without_buffers(state: State) -> State:
    return {key: value for key, value in state.items() if "running" not in key and "num_batches" not in key}


CHOICES: dict[str, tuple[Callable[[State, State], object], str]] = {
    "ema in a module": (
        lambda want, raw: {"model": raw, "ema": {"module": want}, "epoch": 3},
        "'ema.module', averaged",
    ),
    "params_ema": (lambda want, raw: {"params": raw, "params_ema": want}, "'params_ema', averaged"),
    "timm": (lambda want, raw: {"state_dict": raw, "state_dict_ema": want}, "'state_dict_ema', averaged"),
    "flat": (lambda want, raw: {"state_dict": {**under("model.", raw), **under("ema_model.", want)}}, "averaged"),
    "averaged model": (
        lambda want, raw: {"net": raw, "swa": {"n_averaged": torch.tensor(3), **under("module.", want)}},
        "averaged",
    ),
    "beside a loss": (
        lambda want, raw: {**under("model.", want), "criterion.weight": torch.ones(2)},
        "1 tensor beside it is left out, such as 'criterion.weight'",
    ),
    "beside a loss, flat": (lambda want, raw: {**want, "criterion.weight": torch.ones(2)}, "'criterion.weight'"),
    "deep prefix": (
        lambda want, raw: {"state_dict": {**under("model.backbone.", want), "model.neck.weight": torch.ones(2)}},
        "weights are 'state_dict.model.backbone'; 1 tensor ",
    ),
    "half an average": (
        lambda want, raw: {"model": want, "ema": without_buffers(raw)},
        "the averaged 'ema' lacks 2 of the model's tensors",
    ),
    "student": (lambda want, raw: {"model": want, "teacher": raw}, "'teacher' fits as well and is not used"),
    "two usual names": (lambda want, raw: {"model": raw, "state_dict": want}, "'model' fits as well and is not used"),
    "an average of other classes": (
        lambda want, raw: {"model": want, "ema": {**raw, "3.weight": torch.ones(5, 4), "3.bias": torch.ones(5)}},
        "'ema' has other shapes and is not used",
    ),
    "optimizer": (lambda want, raw: {"model": want, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, ""),
    "profiled": (lambda want, raw: {**want, "0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}, "left out"),
}


@pytest.mark.parametrize("layout", CHOICES)
def test_the_right_weights_are_taken_and_said(wanted: State, raw: State, layout: str, tmp_path: Path) -> None:
    make, words = CHOICES[layout]
    torch.save(make(wanted, raw), tmp_path / "w.pth")
    model = net()
    fit, choice = best_fit(read_checkpoint(tmp_path / "w.pth"), model)
    load_state(model, fit.state, (), "w")
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    assert words in choice
    assert bool(words) == bool(choice)


def test_two_sets_that_nothing_tells_apart_are_refused(wanted: State, raw: State, tmp_path: Path) -> None:
    torch.save({"student": wanted, "teacher": raw}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="several sets of weights that fit: 'student' and 'teacher'"):
        best_fit(read_checkpoint(tmp_path / "w.pth"), net())
    torch.save({"student": wanted, "teacher": wanted}, tmp_path / "w.pth")
    best_fit(read_checkpoint(tmp_path / "w.pth"), net())


def test_a_deeper_network_is_another_one(wanted: State, tmp_path: Path) -> None:
    torch.save({**wanted, "0.1.weight": torch.ones(2), "4.weight": torch.ones(2)}, tmp_path / "w.pth")
    model = net()
    fit, _ = best_fit(read_checkpoint(tmp_path / "w.pth"), model)
    with pytest.raises(ModelError, match="2 keys unexpected"):
        load_state(model, fit.state, (), "w")


@pytest.mark.parametrize(
    "where",
    [
        {"class_names": ["b", "a"]},
        {"meta": {"classes": ("b", "a")}},
        {"class_to_idx": {"a": 1, "b": 0}},
        {"hyper_parameters": {"idx_to_class": {0: "b", 1: "a"}}},
        {"config": {"id2label": {"1": "a", "0": "b"}}},
        {"args": argparse.Namespace(class_names=["b", "a"])},
    ],
)
def test_class_names_are_read_wherever_they_are_kept(wanted: State, tmp_path: Path, where: dict[str, object]) -> None:
    torch.save({"state_dict": wanted, **where}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").class_names == ("b", "a")


@pytest.mark.parametrize(
    "where", [{"classes": 2}, {"classes": ["a", 1]}, {"class_to_idx": {"a": 0, "b": 2}}, {"labels": []}]
)
def test_what_names_no_classes_names_none(wanted: State, tmp_path: Path, where: dict[str, object]) -> None:
    torch.save({"state_dict": wanted, **where}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").class_names == ()


def test_class_names_of_safetensors(wanted: State, tmp_path: Path) -> None:
    save_file(wanted, tmp_path / "w.safetensors", {"classes": json.dumps(["b", "a"]), "format": "pt"})
    assert read_checkpoint(tmp_path / "w.safetensors").class_names == ("b", "a")
