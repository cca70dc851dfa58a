"""Tiny models of every family, with their groups: built once, shared by all tests, never to be modified.

Weights, biases and normalisation statistics are drawn, so that no normalisation and no layer scale is the identity.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import timm
import torch
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.vgg import VGG
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.graph import find_groups
from pxcompress.state import seeded
from pxcompress.types import Batch, Group, Plan, Structure

CLASSES = 5


class FlattenCNN(nn.Module):
    """Convolutions, then a flatten: every channel owns nine inputs of the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.fc1 = nn.Linear(54, 10)
        self.fc2 = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


class AnyClasses(FlattenCNN):
    """The same for as many classes as the data has."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.fc2 = nn.Linear(10, num_classes)


class Conv1dNet(nn.Module):
    """A residual network on sequences of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 5, padding=2)
        self.bn = nn.BatchNorm1d(8)
        self.inner = nn.Conv1d(8, 12, 3)
        self.outer = nn.Conv1d(12, 8, 3, padding=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean(-1))


class GroupedNet(nn.Module):
    """A grouped convolution between two plain ones, without normalisation; no padding anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3)
        self.conv2 = nn.Conv2d(12, 8, 3, groups=4)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(torch.relu(self.conv3(x)).mean((2, 3)))


def _timm(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=CLASSES, **kwargs)


def _vgg(norm_layer: type[nn.Module] | None) -> nn.Module:
    model = VGG([8, "M", 12, "M", 16, 12, "M", 8, "M"], CLASSES, mlp_ratio=1 / 256, norm_layer=norm_layer)
    model.pre_logits.fc2 = nn.Conv2d(16, 24, 1)  # 4096 in timm
    model.head.fc = nn.Linear(24, CLASSES)
    return model


def _regnet() -> nn.Module:
    return RegNet(RegNetCfg(depth=5, w0=8, wa=10.0, wm=2.0, group_size=4, se_ratio=0.25, stem_width=8), 3, CLASSES)


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    "flatten_cnn": FlattenCNN,
    "conv1d": Conv1dNet,
    "grouped": GroupedNet,
    "resnet_basic": _timm("resnet18", layers=(1, 2, 1, 1), channels=(8, 12, 16, 24), stem_width=16),
    "resnet_bottleneck": _timm("resnet26", layers=(1, 2, 1, 1), channels=(4, 6, 8, 10)),
    "resnext": _timm("resnext50_32x4d", layers=(1, 1, 1, 1), cardinality=4, base_width=8, channels=(16, 16, 16, 16)),
    "vgg": functools.partial(_vgg, None),
    "vgg_bn": functools.partial(_vgg, nn.BatchNorm2d),
    "mobilenetv2": _timm("mobilenetv2_035"),
    "mobilenetv3": _timm("mobilenetv3_small_050"),
    "efficientnet": _timm("test_efficientnet"),
    "densenet": _timm("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    "regnet": _regnet,
    "vit": _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=4),
    "deit_distilled": _timm(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=16, depth=1, embed_dim=24, num_heads=3
    ),
    "convnext": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 24)),
}
CLASSIFIERS: Mapping[str, tuple[str, ...]] = {
    "flatten_cnn": ("fc2",),
    "conv1d": ("head",),
    "grouped": ("fc",),
    "resnet_basic": ("fc",),
    "resnet_bottleneck": ("fc",),
    "resnext": ("fc",),
    "vgg": ("head.fc",),
    "vgg_bn": ("head.fc",),
    "mobilenetv2": ("classifier",),
    "mobilenetv3": ("classifier",),
    "efficientnet": ("classifier",),
    "densenet": ("classifier",),
    "regnet": ("head.fc",),
    "vit": ("head",),
    "deit_distilled": ("head", "head_dist"),
    "convnext": ("head.fc",),
}
SMALL = ("flatten_cnn", "conv1d", "grouped", "resnet_basic", "vit")
"""Cheap to run and different in geometry: flattened, 1-D, grouped, residual, heads."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in eval mode, its structure, one input (1, ...) and a few more (n, ...). Read only."""

    name: str
    model: nn.Module
    structure: Structure
    example: Tensor
    inputs: Tensor

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.structure.groups


@functools.cache
def subject(name: str) -> Subject:
    """The subject `name` of `FAMILIES`."""
    with seeded(1):
        model = randomised(FAMILIES[name]()).eval()
        inputs = torch.randn(6, 4, 20) if name == "conv1d" else torch.randn(6, 3, 32, 32)
    return Subject(name, model, find_groups(model, inputs[:1], CLASSIFIERS[name]), inputs[:1], inputs)


def randomised(model: nn.Module) -> nn.Module:
    """`model` with drawn weights, normalisations, layer scales and biases; its outputs depend on its inputs."""
    with torch.no_grad():
        for _, layer in conv_like(model):
            nn.init.kaiming_normal_(layer.weight)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)
                else:
                    parameter.uniform_(0.5, 1.5)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.5, 2)
    return model


def batches_of(inputs: Tensor, size: int) -> list[Batch]:
    """`inputs` (n, ...) with labels 0, 1, 2, ... in batches of `size`."""
    labels = torch.arange(len(inputs)) % CLASSES
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def plan_of(removed: Mapping[str, Sequence[int]]) -> Plan:
    """A plan without costs."""
    return Plan({name: tuple(units) for name, units in removed.items()}, "channels", "units", 0.0, 0.0, 0.0)


def random_plan(groups: Sequence[Group], seed: int) -> Plan:
    """Removes a random part of every group, from nothing to all but one unit."""
    draw = random.Random(seed)
    return plan_of(
        {group.name: sorted(draw.sample(range(group.units), draw.randrange(group.units))) for group in groups}
    )


def extreme_plan(groups: Sequence[Group]) -> Plan:
    """Removes all but one unit of every group: the second, where there are two."""
    return plan_of(
        {group.name: [unit for unit in range(group.units) if unit != min(1, group.units - 1)] for group in groups}
    )


def kept_counts(groups: Sequence[Group], plan: Plan) -> dict[str, int]:
    """Group name -> units that stay: what a meter is asked."""
    return {group.name: len(plan.kept(group)) for group in groups}


def snapshot(model: nn.Module) -> tuple[object, ...]:
    """Everything about a model that must not change behind its owner's back, as a comparable value."""
    return (
        tuple((name, _digest(value)) for name, value in model.state_dict().items()),
        tuple((name, value.requires_grad, value.grad is None) for name, value in model.named_parameters()),
        tuple(_module_state(name, module) for name, module in model.named_modules()),
    )


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _module_state(name: str, module: nn.Module) -> tuple[object, ...]:
    hooks = [
        value
        for key, value in sorted(vars(module).items())
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    ]
    plain = sorted(
        (key, repr(value))
        for key, value in vars(module).items()
        if isinstance(value, int | float | str) and not key.startswith("_")
    )
    return name, type(module), tuple(tuple(hook) for hook in hooks), tuple(plain), "forward" in vars(module)


def conv_like(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and linear layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            yield name, module


def without_inplace(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


def silenced(model: nn.Module, groups: tuple[Group, ...], plan: Plan, inputs: Tensor) -> Tensor:
    """Outputs of `model` while hooks zero the removed units where they are read: an oracle that touches no weight."""
    twin = copy.deepcopy(model)
    for group in groups:
        removed = plan.removed.get(group.name, ())
        for member in group.consumers if removed else ():
            module = twin.get_submodule(member.module)
            rows = member.index[list(removed)].flatten()

            def zero(layer: nn.Module, args: tuple[Tensor, ...], rows: Tensor = rows) -> tuple[Tensor]:
                value = args[0].clone()
                if isinstance(layer, nn.Linear):
                    value[..., rows] = 0
                else:
                    value[:, rows] = 0
                return (value,)

            module.register_forward_pre_hook(zero)
    with torch.no_grad():
        return twin(inputs)


def count_rows(module: nn.Module, axis: str) -> int:
    return module.weight.shape[0] if axis == "out" else module.weight.shape[1] * getattr(module, "groups", 1)
