"""What is refused before any work, and models that a run folder can hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from models import CLASSES, FlattenCNN, plan_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pxcompress import compress_module
from pxcompress.errors import ModelError
from pxcompress.graph import find_groups
from pxcompress.models.checkpoint import load_state
from pxcompress.models.loading import Architecture
from pxcompress.models.rebuilding import check_rebuilds, unregistered_tensors
from pxcompress.models.suited import check_suited, count_classes
from pxcompress.planning.plan_file import plan_to_json
from pxcompress.run_folder import saved, written
from pxcompress.state import evaluating, seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Preprocessing

INPUTS = torch.zeros(2, 3, 12, 12)


def _quantised(*, trained: bool) -> nn.Module:
    net = nn.Sequential(quantization.QuantStub(), nn.Conv2d(3, 4, 3), quantization.DeQuantStub()).train(trained)
    net.qconfig = quantization.get_default_qat_qconfig("x86") if trained else quantization.get_default_qconfig("x86")
    prepared = quantization.prepare_qat(net) if trained else quantization.prepare(net)
    prepared(INPUTS)
    return prepared if trained else quantization.convert(prepared)


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return FlattenCNN()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_on_meta, "has no values: conv1.weight is on the meta device"),
        (lambda: FlattenCNN().half(), "half precision: conv1.weight is torch.float16"),
        (lambda: FlattenCNN().bfloat16(), "half precision"),
        (lambda: _quantised(trained=True), "is quantised"),
        (lambda: _quantised(trained=False), "is quantised"),
        (lambda: torch.jit.trace(FlattenCNN().eval(), INPUTS), "holds TorchScript: it has its graph"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_pruned_is_refused_in_one_line(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    for refused in (lambda: check_suited(model), lambda: compress_module(model, INPUTS[:1], [INPUTS], 0.3)):
        with pytest.raises(ModelError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: (value * 10).to(torch.int8), "conv1.weight has type torch.int8"),
        (lambda value: value.to("meta"), "no values"),
    ],
)
def test_checkpoints_without_floating_point_values_are_refused(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    model = FlattenCNN()
    state = {name: change(value) if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_state(model, state, (), "checkpoint")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_off_while_a_model_is_observed(reentrant: bool) -> None:
    class Saving(FlattenCNN):
        def inner(self, x: Tensor) -> Tensor:
            return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))))

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.inner, x, use_reentrant=reentrant)
            return self.fc2(self.relu(self.fc1(self.pool(x).flatten(1))))

    with seeded(0):
        model, inputs = Saving().eval(), torch.randn(4, 3, 12, 12)
    calls: list[object] = []
    model.conv1.register_forward_hook(lambda *_: calls.append(_))
    with evaluating(model):
        model(inputs.requires_grad_()).sum().backward()
    assert len(calls) == 1
    model.conv1._forward_hooks.clear()
    assert {group.name for group in find_groups(model, inputs[:1]).groups} == {"conv1", "conv2", "fc1"}
    slim = compress_module(model, inputs[:1], [(inputs, torch.arange(4) % CLASSES)], 0.3)
    assert slim.pruned.plan.removed
    model.conv1.register_forward_hook(lambda *_: calls.append(_))
    model.train()(inputs).sum().backward()
    assert len(calls) == 3, "outside, layers run again in the backward pass"


# --- inputs that a model does not take ---


class Strict(FlattenCNN):
    channels, side = 3, 12

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (self.channels, self.side, self.side), f"got {tuple(x.shape)}"
        return super().forward(x[:, :1].expand(-1, 3, -1, -1))


def _strict(**values: int) -> nn.Module:
    return type("Strict", (Strict,), values)()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_strict(side=64), "AssertionError: got .*; set --input-size 64"),
        (_strict(side=12, channels=1), "takes images of 1 channels: give the module pretrained_cfg"),
        (nn.Sequential(nn.Embedding(3, 3)), "compress_module takes modules with any inputs"),
    ],
)
def test_only_what_was_tried_is_advised(model: nn.Module, message: str) -> None:
    preprocessing = Preprocessing((3, 12, 12), mean=(0.0,), std=(1.0,))
    with pytest.raises(ModelError, match=message) as error:
        count_classes(model.eval(), preprocessing, "mine")
    assert ("--input-size" in str(error.value)) == ("--input-size" in message)


# --- models that are built again ---


class Permuted(FlattenCNN):
    """Draws while it is built: into a buffer that does not persist, an attribute, or where no tensor holds it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        order = torch.randperm(6)
        if where == "buffer":
            self.register_buffer("order", order, persistent=False)
        self.order = order.tolist() if where == "list" else order

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.fc2(self.relu(self.fc1(self.pool(x)[:, self.order].flatten(1))))


class Built:
    """Stands for an architecture: its `build` makes a new model each time."""

    name = "module:factory"
    is_file = in_python = False

    def __init__(self, where: str) -> None:
        self.where = where

    def build(self) -> nn.Module:
        return Permuted(self.where)


@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_state_outside_the_state_dict_is_carried(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with seeded(0):
        model, inputs = Permuted(where).eval(), torch.randn(2, 3, 12, 12)
    assert list(unregistered_tensors(model)) == ["order"]
    check_rebuilds(model, Built(where), (3, 12, 12))  # type: ignore[arg-type]
    monkeypatch.setattr(Architecture, "from_json", classmethod(lambda cls, text: Built(where)))
    architecture = SimpleNamespace(to_json=lambda: "{}")
    loaded = SimpleNamespace(architecture=architecture, preprocessing=Preprocessing((3, 12, 12)))
    splits = SimpleNamespace(example=inputs[:1])
    subject: Any = SimpleNamespace(loaded=loaded, splits=splits, task=Classification(), whole=None)
    written._save_weights(model, subject, tmp_path / "model.safetensors")
    with saved.safe_open(tmp_path / "model.safetensors", "pt") as file:
        facts, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    again = saved._rebuild(facts, plan_to_json(plan_of({}), ()), state, tmp_path).model
    assert torch.equal(again.eval()(inputs), model(inputs))


def test_a_factory_that_draws_elsewhere_is_refused() -> None:
    with seeded(0), pytest.raises(ModelError, match="another one each time it is built"):
        check_rebuilds(Permuted("list").eval(), Built("list"), (3, 12, 12))  # type: ignore[arg-type]
