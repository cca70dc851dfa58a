import argparse
import json
import os
import pickle
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.models.inputs import preprocessing_of
from pxcompress.models.loading import Architecture, Loaded, classifier_names, load_model
from pxcompress.state import seeded

SMALL = "test_resnet"
FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(8, classes)  # registered first, runs last
        self.body = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

def plain(): return Net(4)
def counted(num_classes=7): return Net(num_classes)
def anything(**options): return Net(options["num_classes"])
def sized(num_classes, img_size): return nn.Sequential(nn.Flatten(), nn.Linear(3 * img_size * img_size, num_classes))
def needy(path): return Net(2)
def number(): return 3
def features(): return nn.Conv2d(3, 8, 3)
def broken(): raise KeyError("weights.bin")
def nan():
    net = Net(4)
    nn.init.constant_(net.head.bias, float("nan"))
    return net
def configured():
    net = Net(4)
    net.default_cfg = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}
    return net
constant = 5
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the current directory that nobody has imported yet."""
    name = f"user_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return name


def load(name: str, **options: object) -> Loaded:
    return load_model(name, **{"classes": 4, "input_size": 32, "device": "cpu", **options})


def refusal(name: str, **options: object) -> str:
    """The message of the error that loading gives: one line."""
    with pytest.raises(ModelError) as caught:
        load(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def saved(folder: Path, name: str = SMALL, classes: int = 4, safe: bool = True, **options: object) -> nn.Module:
    """A timm model with random weights and statistics, in `folder` as timm saves it: safetensors, or a pickle."""
    model = timm.create_model(name, num_classes=classes, **options)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    save_for_hf(model, folder, safe_serialization=safe)
    return model


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SMALL, "test_resnet.r160_in1k", "test_vit", "test_convnext"])
def test_timm_model_is_built_for_the_data(name: str) -> None:
    loaded = load(name)
    assert loaded.weights == "untrained"
    assert loaded.classes == 4
    assert not loaded.model.training
    assert loaded.preprocessing.input_size == (3, 32, 32)
    with torch.no_grad():
        assert loaded.model(torch.zeros(3, 3, 32, 32)).shape == (3, 4)


def test_initial_weights_come_from_the_global_generator() -> None:
    models = []
    for seed in (1, 1, 2):
        with seeded(seed):
            models.append(load(SMALL).model)
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


def test_only_architectures_with_a_fixed_size_are_given_it() -> None:
    assert dict(load("test_vit").architecture.kwargs) == {"num_classes": 4, "img_size": 32}
    assert dict(load(SMALL).architecture.kwargs) == {"num_classes": 4}


def test_preprocessing_is_timms() -> None:
    loaded = load_model("test_resnet.r160_in1k", classes=None, device="cpu")
    config = timm.data.resolve_model_data_config(loaded.model)
    found = loaded.preprocessing
    assert (found.input_size, found.mean, found.std) == (config["input_size"], config["mean"], config["std"])
    assert (found.interpolation, found.crop) == (config["interpolation"], config["crop_pct"])
    assert loaded.classes == 1000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_resnt", "did you mean test_resnet"),
        ("qqqqqqqq", "package.module:factory"),
        ("timm/resnet18", "hf-hub:OWNER/NAME"),
        ("s3:bucket/model", "local-dir:PATH"),
        ("local-dir:", "local-dir:PATH"),
        ("test_resnet.in21k", "r160_in1k"),
        ("", "package.module:factory"),
        ("mynet.py:make_net", "--model mynet:make_net"),
        ("./nets/mynet.py:make_net", "--model nets.mynet:make_net"),
    ],
)
def test_unknown_name(name: str, said: str) -> None:
    message = refusal(name)
    assert repr(name) in message or name.partition(".")[0] in message
    assert said in message


def test_input_that_the_model_cannot_take() -> None:
    assert "positive" in refusal(SMALL, input_size=0)
    message = refusal("test_vit", input_size=40)
    assert "40" in message
    assert "3x40x40" in message


# --- architecture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SMALL, "test_vit"])
def test_architecture_survives_json_and_takes_the_weights(name: str) -> None:
    loaded = load(name)
    again = Architecture.from_json(loaded.architecture.to_json())
    assert again == loaded.architecture
    model = again.build()
    assert not equal(model, loaded.model)
    model.load_state_dict(loaded.model.state_dict())
    assert equal(model, loaded.model)


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"name": "x", "kwargs": 3}'])
def test_architecture_from_other_text(text: str) -> None:
    with pytest.raises(ModelError, match="expected JSON"):
        Architecture.from_json(text)


def test_architecture_with_arguments_it_does_not_take() -> None:
    with pytest.raises(ModelError, match=r"cannot be built.*depth_of_field"):
        Architecture(SMALL, {"depth_of_field": 3}).build()
    for key in ("pretrained", "checkpoint_path", "cache_dir"):
        with pytest.raises(ModelError, match=f"refused: argument '{key}' would read weights"):
            Architecture(SMALL, {key: True}).build()


def test_architecture_calls_no_function_with_arguments_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = json.dumps({"name": "os:system", "kwargs": {"command": "touch executed"}})
    with pytest.raises(ModelError, match="refused: argument 'command'"):
        Architecture.from_json(text).build()
    assert not Path("executed").exists()


# --- classifiers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet18", ("fc",)),
        ("vgg11", ("head.fc",)),
        ("dla34", ("fc",)),  # a convolution
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("caformer_s18", ("head.fc.fc2",)),
        ("repvit_m0_9", ("head.head.l", "head.head_dist.l")),
        ("efficientvim_m1", ("heads.0", "heads.1", "heads.2", "heads.3")),
    ],
)
def test_classifiers_of_timm_models(name: str, names: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    assert classifier_names(model) == names
    for layer in names:
        assert next(iter(model.get_submodule(layer).parameters())).shape[0] == 3


def test_classifier_of_other_modules_is_the_layer_that_runs_last(factory: str) -> None:
    model = Architecture(f"{factory}:plain").build().train()
    assert [name for name, _ in model.named_children()] == ["head", "body"]
    assert classifier_names(model) == ("head",)
    assert classifier_names(model, torch.zeros(1, 3, 9, 9)) == ("head",)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_features_are_no_classifier(factory: str) -> None:
    assert classifier_names(timm.create_model(SMALL, num_classes=0)) == ()
    assert "expected class scores" in refusal(f"{factory}:features", classes=None)


# --- factories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "kwargs"),
    [
        ("plain", {}),
        ("counted", {"num_classes": 4}),
        ("anything", {"num_classes": 4}),
        ("sized", {"num_classes": 4, "img_size": 32}),
    ],
)
def test_factory_gets_what_it_takes(factory: str, function: str, kwargs: dict[str, int]) -> None:
    path = list(sys.path)
    loaded = load(f"{factory}:{function}")
    assert loaded.architecture == Architecture(f"{factory}:{function}", kwargs)
    assert (loaded.classes, loaded.weights) == (4, "untrained")
    assert sys.path == path
    loaded.architecture.build().load_state_dict(loaded.model.state_dict())


def test_factory_of_a_library() -> None:
    loaded = load("torchvision.models:squeezenet1_1")
    assert (loaded.classes, classifier_names(loaded.model)) == (4, ("classifier.1",))


def test_factory_brings_its_own_weights(factory: str) -> None:
    assert load(f"{factory}:plain", pretrained=True).weights == "factory"
    assert load_model(f"{factory}:counted", classes=None, device="cpu").classes == 7


def test_factory_preprocessing(factory: str) -> None:
    plain = load_model(f"{factory}:plain", classes=None, device="cpu").preprocessing
    assert (plain.input_size, plain.mean) == ((3, 224, 224), (0.485, 0.456, 0.406))
    own = load_model(f"{factory}:configured", classes=None, device="cpu").preprocessing
    assert (own.input_size, own.mean, own.crop) == ((3, 48, 48), (0.1, 0.2, 0.3), 1.0)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("plian", "did you mean plain?"),
        ("constant", "is a int; expected a callable"),
        ("number", "returned a int; expected an nn.Module"),
        ("needy", "missing 1 required positional argument: 'path'"),
        ("broken", "KeyError: 'weights.bin'"),
        ("nan", "NaN"),
    ],
)
def test_bad_factory(factory: str, function: str, said: str) -> None:
    message = refusal(f"{factory}:{function}")
    assert said in message
    assert f"{factory}:{function}" in message


def test_factory_with_another_class_count(factory: str) -> None:
    assert "has 4 classes, the data has 5" in refusal(f"{factory}:plain", classes=5)
    assert load(f"{factory}:plain", classes=2, data_classes=("0", "3")).classes == 4
    for names in (("0", "4"), ("0", "b")):
        assert "the data has 2" in refusal(f"{factory}:plain", classes=2, data_classes=names)


@pytest.mark.usefixtures("factory")
def test_factory_module_missing_or_broken(tmp_path: Path) -> None:
    assert "No module named 'no_such_package'" in refusal("no_such_package.models:net")
    (tmp_path / "user_broken.py").write_text("1 / 0\n")
    assert "ZeroDivisionError" in refusal("user_broken:net")


# --- pretrained weights ---------------------------------------------------------------------------------------------


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
    found = loaded.preprocessing
    assert (found.input_size, found.mean, found.std) == ((3, 48, 48), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.interpolation, found.crop) == ("bilinear", 0.9)
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


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


def test_local_dir_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"state_dict": Evil()}, tmp_path / "pytorch_model.bin")
    assert "would execute code" in refusal(f"local-dir:{tmp_path}")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no config.json"),
        ("{", "config.json is not timm's"),
        ('{"architectures": ["ResNet"]}', "expected 'architecture'"),
        ('{"architecture": "resnet9000"}', "unknown model 'resnet9000'"),
        ('{"architecture": "test_resnet", "pretrained_cfg": {"colour": 1}}', "cannot be built"),
    ],
)
def test_local_dir_that_timm_did_not_write(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert said in refusal(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "hf-hub:timm/test_resnet.r160_in1k"])
def test_weights_that_cannot_be_fetched(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal(name, classes=None, pretrained=True)
    assert name in message
    assert "could not be fetched" in message


# --- checkpoints ----------------------------------------------------------------------------------------------------


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


def test_checkpoint_of_a_factory(factory: str, tmp_path: Path) -> None:
    model = Architecture(f"{factory}:plain").build()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert equal(load(f"{factory}:plain", checkpoint=tmp_path / "w.safetensors").model, model)


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


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_timm_model_takes_images_of_as_many_channels_as_its_first_convolution_reads(channels: int) -> None:
    model = timm.create_model("resnet10t", in_chans=channels)
    preprocessing = preprocessing_of(model)
    assert preprocessing.input_size[0] == len(preprocessing.mean) == len(preprocessing.std) == channels
