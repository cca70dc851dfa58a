"""Models of a user's own: factories, and which layer is their classifier."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from loading import SMALL, equal, load, refusal
from safetensors.torch import save_file

from pxcompress.guard import terminate
from pxcompress.models.factories import own_code
from pxcompress.models.loading import Architecture, classifier_names, load_model

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
def ending(): raise SystemExit(0)
def printing():
    print("loading")
    return Net(4)
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
    ("function", "words"),
    [
        ("plian", "did you mean plain?"),
        ("constant", "is a int; expected a callable"),
        ("number", "returned a int; expected an nn.Module"),
        ("needy", "missing 1 required positional argument: 'path'"),
        ("broken", "KeyError: 'weights.bin'"),
        ("ending", "it ends the process with exit code 0"),
        ("nan", "NaN"),
    ],
)
def test_bad_factory(factory: str, function: str, words: str) -> None:
    message = refusal(f"{factory}:{function}")
    assert words in message
    assert f"{factory}:{function}" in message


def test_what_a_factory_prints_is_no_result(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(f"{factory}:printing")
    out, err = capsys.readouterr()
    assert (out, set(err.split())) == ("", {"loading"})


def test_the_end_of_the_process_is_not_taken_for_a_bad_factory() -> None:
    with pytest.raises(SystemExit, match="143"), own_code():
        terminate(15, None)


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


def test_checkpoint_of_a_factory(factory: str, tmp_path: Path) -> None:
    model = Architecture(f"{factory}:plain").build()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert equal(load(f"{factory}:plain", checkpoint=tmp_path / "w.safetensors").model, model)
