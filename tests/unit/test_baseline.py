from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pxcompress.demo import baseline
from pxcompress.demo.baseline import BaselineInfo, Problem, baseline_key, train_baseline
from pxcompress.errors import DataError, ModelError
from pxcompress.models.loading import Architecture
from pxcompress.state import seeded
from pxcompress.types import Batch, Preprocessing

KEY = "0123abcd"


class Shuffled:
    """Batches in a new order every epoch, like those that baselines are trained on."""

    def __init__(self, inputs: Tensor, labels: Tensor, size: int = 64) -> None:
        self.inputs, self.labels, self.size, self.epoch = inputs, labels, size, 0

    def __len__(self) -> int:
        return len(self.inputs) // self.size

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += 1
        for part in order[: len(self) * self.size].split(self.size):
            yield self.inputs[part], self.labels[part]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8.0 - 1.0
    return images, torch.from_numpy(bunch.target).long()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    return tmp_path / "baselines" / f"{KEY}.safetensors"


@pytest.fixture
def notes() -> list[str]:
    return []


def small_net(seed: int = 0) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 16, 10),
        ).eval()  # fmt: skip


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], notes: list[str], seed: int = 0, key: str = KEY
) -> BaselineInfo:
    inputs, labels = data
    select = [(inputs[1000:1150], labels[1000:1150])]
    problem = Problem(Shuffled(inputs[:1000], labels[:1000]), select)
    return train_baseline(model, problem, key=key, seed=seed, note=notes.append)


def equal(one: nn.Module, other: nn.Module) -> bool:
    right = other.state_dict()
    return all(torch.equal(value, right[key]) for key, value in one.state_dict().items())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch instead of many."""
    schedules = {name: replace(schedule, steps=1, epochs=1) for name, schedule in baseline.SCHEDULES.items()}
    monkeypatch.setattr(baseline, "SCHEDULES", schedules)


def test_baseline_learns(digits: tuple[Tensor, Tensor], notes: list[str]) -> None:
    model = small_net()
    info = train(model, digits, notes)
    test, labels = digits[0][1150:], digits[1][1150:]
    with torch.no_grad():
        top1 = float((model(test).argmax(1) == labels).float().mean())
    assert top1 >= 0.9  # written by other people than the images it was trained on
    assert info.quality >= 0.9
    assert not info.cached
    assert len(notes) == info.epochs
    assert not any(module.training for module in model.modules())
    assert all(value.is_contiguous() for value in model.state_dict().values())


@pytest.mark.usefixtures("short")
def test_same_seed_same_weights(digits: tuple[Tensor, Tensor], notes: list[str]) -> None:
    models = [small_net() for _ in range(3)]
    state = torch.random.get_rng_state()
    for index, (model, seed) in enumerate(zip(models, (3, 3, 4), strict=True)):
        torch.rand(index)  # whatever happened before does not matter
        train(model, digits, notes, seed=seed, key=str(index))
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])
    torch.random.set_rng_state(state)


@pytest.mark.usefixtures("short")
def test_global_generator_is_left_alone(digits: tuple[Tensor, Tensor], notes: list[str]) -> None:
    before = torch.random.get_rng_state()
    train(small_net(), digits, notes)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("short")
def test_second_time_is_read(digits: tuple[Tensor, Tensor], notes: list[str], cache: Path) -> None:
    first, second = small_net(0), small_net(1)
    info = train(first, digits, notes)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    again = train(second, digits, notes)
    assert equal(first, second)
    assert again == replace(info, cached=True)
    assert str(cache) in notes[-1]
    assert not any(module.training for module in second.modules())
    other = small_net(1)
    assert not train(other, digits, notes, key="another").cached


def damage_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def damage_facts(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


def damage_model(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    save_file({key: value for key, value in load_file(path).items() if "7" not in key}, path, metadata=facts)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("damage", [damage_bytes, damage_facts, damage_model])
def test_damaged_file_is_replaced(digits: tuple[Tensor, Tensor], notes: list[str], cache: Path, damage) -> None:
    first, second = small_net(), small_net()
    train(first, digits, notes)
    damage(cache)
    assert not train(second, digits, notes).cached
    assert any("cannot be used" in note for note in notes)
    assert equal(first, second)
    assert train(small_net(1), digits, notes).cached


@pytest.mark.usefixtures("short")
def test_cache_that_cannot_be_written_costs_only_the_cache(
    digits: tuple[Tensor, Tensor], notes: list[str], cache: Path
) -> None:
    cache.parent.write_text("a file where the folder should be")
    info = train(small_net(), digits, notes)
    assert info.epochs == 1
    assert "is not kept" in notes[-1]


@pytest.mark.usefixtures("short")
def test_single_batch_is_enough(digits: tuple[Tensor, Tensor], notes: list[str]) -> None:
    batches = [(digits[0][:8], digits[1][:8])]
    info = train_baseline(small_net(), Problem(iter_again(batches), batches), key=KEY, note=notes.append)
    assert 0.0 <= info.quality <= 1.0


def iter_again(batches: list[Batch]) -> object:
    """Re-iterable without a length."""

    class Again:
        def __iter__(self) -> Iterator[Batch]:
            return iter(batches)

    return Again()


def test_no_images(notes: list[str]) -> None:
    with pytest.raises(DataError, match="no image"):
        train_baseline(small_net(), Problem([], []), key=KEY, note=notes.append)


def test_divergence_is_told_and_nothing_is_kept(digits: tuple[Tensor, Tensor], notes: list[str], cache: Path) -> None:
    inputs, labels = digits
    broken = [(torch.full_like(inputs[:64], float("nan")), labels[:64])]
    with pytest.raises(ModelError, match="diverged in epoch 1"):
        train_baseline(small_net(), Problem(broken, broken), key=KEY, note=notes.append)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("resnet18", "batch norm"),
        ("mobilenetv2_035", "depthwise"),
        ("vgg11", "plain"),
        ("vgg11_bn", "plain"),
        ("vit_tiny_patch16_224", "layer norm"),
        ("convnext_atto", "layer norm"),
    ],
)
def test_schedule_depends_on_the_layers(model: str, name: str) -> None:
    with torch.device("meta"):
        assert baseline._choose_schedule(timm.create_model(model)) is baseline.SCHEDULES[name]


def test_key_follows_everything_that_changes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Architecture("resnet18", {"num_classes": 10})
    shown = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    keys = {
        baseline_key(one, "digits", shown, 0),
        baseline_key(replace(one, name="resnet34"), "digits", shown, 0),
        baseline_key(replace(one, kwargs={"num_classes": 9}), "digits", shown, 0),
        baseline_key(one, "glyphs", shown, 0),
        baseline_key(one, "digits", replace(shown, input_size=(3, 64, 64)), 0),
        baseline_key(one, "digits", replace(shown, mean=(0.4,) * 3), 0),
        baseline_key(one, "digits", shown, 1),
    }
    assert len(keys) == 7
    assert baseline_key(one, "digits", shown, 0) in keys
    assert all(key.isalnum() for key in keys)
    monkeypatch.setattr(baseline, "TRAINER_VERSION", baseline.TRAINER_VERSION + 1)
    assert baseline_key(one, "digits", shown, 0) not in keys
