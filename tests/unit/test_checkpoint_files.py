"""Checkpoints in the forms that people have, and files that are none."""

import argparse
import pickle
from pathlib import Path

import pytest
import timm
import torch
from loading import SMALL, Evil, equal, load, refusal
from safetensors.torch import save_file
from torch import Tensor, nn


@pytest.fixture
def trained() -> nn.Module:
    model = timm.create_model(SMALL, num_classes=4)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    "bare": lambda state: state,
    "lightning": lambda state: {"epoch": 3, "state_dict": wrapped(state, "model.")},
    "data parallel": lambda state: {"model": wrapped(state, "module."), "optimizer": {"state": {}}},
    "compiled": lambda state: wrapped(state, "module._orig_mod."),
    "timm": lambda state: {"arch": "x", "args": argparse.Namespace(lr=0.1), "state_dict": state},
    "averaged": lambda state: {
        "model": {key: torch.zeros_like(value) for key, value in state.items()},
        "model_ema": {"n_averaged": torch.tensor(3), **wrapped(state, "module.")},
    },
    "nested twice": lambda state: {"model": {"state_dict": state}},
    "old": lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar"])
def test_checkpoint_layouts(trained: nn.Module, tmp_path: Path, layout: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(LAYOUTS[layout](trained.state_dict()), path)
    loaded = load(SMALL, checkpoint=path, pretrained=True)
    assert loaded.weights == "checkpoint"
    assert equal(loaded.model, trained)


def test_checkpoint_in_safetensors_and_half_precision(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(trained.half().state_dict(), path)
    loaded = load(SMALL, checkpoint=path)
    assert equal(loaded.model, trained.float())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_checkpoint_tells_the_class_count_when_nobody_else_does(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    loaded = load(SMALL, classes=None, checkpoint=tmp_path / "w.safetensors")
    assert loaded.classes == 4
    assert loaded.architecture.kwargs["num_classes"] == 4


def test_checkpoint_with_other_classes(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    message = refusal(SMALL, classes=5, checkpoint=tmp_path / "w.safetensors")
    assert "4 classes, expected 5" in message
    assert "keys" not in message


def test_checkpoint_of_another_architecture(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    message = refusal("test_vit", checkpoint=tmp_path / "w.safetensors")
    own = timm.create_model("test_vit", num_classes=4).state_dict()
    assert f"{len(own)} keys missing (first: {next(iter(own))})" in message
    assert f"{len(trained.state_dict())} keys unexpected (first: {min(trained.state_dict())})" in message


def test_checkpoint_with_one_other_shape(trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict() | {"fc.weight": torch.zeros(9, 3), "bn1.weight": torch.zeros(3)}
    save_file(state, tmp_path / "w.safetensors")
    message = refusal(SMALL, checkpoint=tmp_path / "w.safetensors")
    width = trained.bn1.weight.shape[0]
    assert f"2 keys of another shape (first: bn1.weight is (3,), not ({width},))" in message
    assert "it has 9 classes, expected 4" in message


def test_checkpoint_missing(tmp_path: Path) -> None:
    assert "does not exist" in refusal(SMALL, checkpoint=tmp_path / "none.pth")
    assert "is a folder; use --model local-dir:" in refusal(SMALL, checkpoint=tmp_path)


RUBBISH = {
    "empty": b"",
    "text": b"hello world, this is text",
    "json": b'{"a": 1}',
    "image": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "truncated zip": b"PK\x03\x04" + bytes(200),
    "pickled number": pickle.dumps(3, protocol=2),
    "pickled dict": pickle.dumps({"epoch": 3}, protocol=4),
}


@pytest.mark.parametrize("kind", RUBBISH)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_file_that_is_no_checkpoint(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(RUBBISH[kind])
    message = refusal(SMALL, checkpoint=path)
    assert "is not a checkpoint" in message
    assert "save a state_dict or safetensors" in message


def test_checkpoint_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "metrics": {"top1": 0.5}}, tmp_path / "w.pth")
    assert "it holds epoch, metrics, no weights" in refusal(SMALL, checkpoint=tmp_path / "w.pth")
    torch.save([torch.zeros(3)], tmp_path / "w.pth")
    assert "no weights" in refusal(SMALL, checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [{"state_dict": {}, "hook": Evil()}, nn.Linear(2, 2)])
def test_pickle_with_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(SMALL, checkpoint=tmp_path / "w.pth")
    assert "would execute code" in message
    assert "save a state_dict or safetensors" in message
    assert not Path("executed").exists()
