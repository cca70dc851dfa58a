"""Weights from timm's folders and its hub."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from loading import SMALL, Evil, equal, load, refusal, saved
from safetensors.torch import save_file

from pxcompress.models.loading import Architecture, load_model


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(("name", "options"), [(SMALL, {}), ("test_vit", {"img_size": 32})])
def test_local_dir_brings_its_weights(
    tmp_path: Path, name: str, options: dict[str, int], pretrained: bool, safe: bool
) -> None:
    model = saved(tmp_path, name, safe=safe, **options)
    loaded = load(f"local-dir:{tmp_path}", pretrained=pretrained)
    assert loaded.weights == "pretrained"
    assert equal(loaded.model, model)
    again = Architecture.from_json(loaded.architecture.to_json())  # needs the folder no more
    assert str(tmp_path) not in again.to_json()
    again.build().load_state_dict(model.state_dict())


def test_local_dir_configuration_is_honoured(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {
        "input_size": [3, 48, 48], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear",
        "crop_pct": 0.9,
    }  # fmt: skip
    config["label_names"] = ["a", "b", "c", "d"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(f"local-dir:{tmp_path}", classes=None, device="cpu")
    preprocessing = loaded.preprocessing
    assert (preprocessing.input_size, preprocessing.mean, preprocessing.std) == (
        (3, 48, 48),
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
    )
    assert (preprocessing.interpolation, preprocessing.crop) == ("bilinear", 0.9)
    assert (loaded.classes, loaded.class_names) == (4, ("a", "b", "c", "d"))
    assert load(f"local-dir:{tmp_path}").preprocessing.input_size == (3, 32, 32)


def test_local_dir_with_a_fixed_size_and_grey_images(tmp_path: Path) -> None:
    model = saved(tmp_path, "vit_tiny_patch16_224", img_size=48, in_chans=1, depth=1)
    loaded = load_model(f"local-dir:{tmp_path}", classes=4, device="cpu")
    assert loaded.preprocessing.input_size == (1, 48, 48)
    again = Architecture.from_json(loaded.architecture.to_json()).build()
    again.load_state_dict(model.state_dict())
    assert again(torch.zeros(1, 1, 48, 48)).shape == (1, 4)


def test_local_dir_without_weights_is_untrained(tmp_path: Path) -> None:
    saved(tmp_path)
    for file in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")):
        file.unlink()
    assert load(f"local-dir:{tmp_path}").weights == "untrained"
    assert load(f"local-dir:{tmp_path}", classes=9).classes == 9
    assert "could not be loaded" in refusal(f"local-dir:{tmp_path}", pretrained=True)


def test_class_counts_of_weights_and_data_differ(tmp_path: Path) -> None:
    saved(tmp_path, classes=6)
    message = refusal(f"local-dir:{tmp_path}", classes=4)
    assert "6 classes" in message
    assert "the data has 4" in message
    assert "1000 classes, the data has 4" in refusal("test_resnet.r160_in1k", pretrained=True)


def test_checkpoint_takes_precedence_over_the_folders_weights(tmp_path: Path) -> None:
    saved(tmp_path / "folder", classes=6)
    other = timm.create_model(SMALL, num_classes=4)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    loaded = load(f"local-dir:{tmp_path / 'folder'}", checkpoint=tmp_path / "other.safetensors")
    assert loaded.weights == "checkpoint"
    assert equal(loaded.model, other)


def test_local_dir_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": Evil()}, tmp_path / "pytorch_model.bin")
    assert "would execute code" in refusal(f"local-dir:{tmp_path}")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no config.json"),
        ("{", "config.json is not timm's"),
        ('{"architectures": ["ResNet"]}', "expected 'architecture'"),
        ('{"architecture": "resnet9000"}', "unknown model 'resnet9000'"),
        ('{"architecture": "test_resnet", "pretrained_cfg": {"colour": 1}}', "cannot be built"),
    ],
)
def test_local_dir_that_timm_did_not_write(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert words in refusal(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k"])
def test_weights_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(name, classes=None, pretrained=True)
    assert name in message
    assert "could not be fetched" in message
