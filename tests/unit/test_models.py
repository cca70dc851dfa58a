"""Models of timm: built for the data, described, and known by their classifier."""

import json
from pathlib import Path

import pytest
import timm
import torch
from loading import SMALL, equal, load, refusal

from pxcompress.errors import ModelError
from pxcompress.models.inputs import preprocessing_of
from pxcompress.models.loading import Architecture, classifier_names, load_model
from pxcompress.state import seeded

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
    preprocessing = loaded.preprocessing
    assert (preprocessing.input_size, preprocessing.mean, preprocessing.std) == (
        config["input_size"],
        config["mean"],
        config["std"],
    )
    assert (preprocessing.interpolation, preprocessing.crop) == (config["interpolation"], config["crop_pct"])
    assert loaded.classes == 1000


@pytest.mark.parametrize(
    ("name", "words"),
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
def test_unknown_name(name: str, words: str) -> None:
    message = refusal(name)
    assert repr(name) in message or name.partition(".")[0] in message
    assert words in message


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


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_timm_model_takes_images_of_as_many_channels_as_its_first_convolution_reads(channels: int) -> None:
    model = timm.create_model("resnet10t", in_chans=channels)
    preprocessing = preprocessing_of(model)
    assert preprocessing.input_size[0] == len(preprocessing.mean) == len(preprocessing.std) == channels
