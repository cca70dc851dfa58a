"""What a group is held to: everything that comes out, in the example's range, and layers that the example misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import OUTPUTS, Answer, Block, Opaque, conv
from models import CLASSES, extreme_plan, plan_of, random_plan
from torch import Tensor, nn

from pxcompress import InputError, compress_module
from pxcompress.errors import BudgetError, ModelError
from pxcompress.graph import dependencies, find_groups, prune, removal_error
from pxcompress.state import seeded

IMAGES = (3, 12, 12)


def _drawn(model: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    """`model` in eval mode with weights of a fixed seed, and four inputs."""
    with seeded(0):
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model.eval(), torch.randn(4, *(shape or IMAGES))


def _net(step: Callable[..., Any], **layers: nn.Module) -> Block:
    return Block(step, c1=conv(3, 16), c2=conv(16, 16), h=nn.Linear(16, CLASSES), **layers)


def _pooled(s: Any, x: Tensor) -> Tensor:
    return s.h(F.relu(s.c2(x)).mean((2, 3)))


def _simple(s: Any, x: Tensor) -> Tensor:
    return _pooled(s, F.relu(s.c1(x)))


def _reasons(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    return {layer.name: layer.reason for layer in find_groups(model, inputs[:1]).fixed}


def _units(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Units of the groups of `model`, which can be removed exactly."""
    groups = find_groups(model, inputs[:1]).groups
    for plan in (random_plan(groups, 0), random_plan(groups, 1), extreme_plan(groups)):
        assert removal_error(prune(model, groups, plan), inputs) < 1e-5
    return {group.name: group.units for group in groups}


def test_a_wrong_removal_shows_where_outputs_hardly_depend_on_the_input() -> None:
    def faint(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.c1(x))
        return 1 + 1e-3 * _pooled(s, x - x.mean(1, keepdim=True))

    model, inputs = _drawn(_net(faint))
    assert _units(model, inputs) == {"c2": 16}
    assert _reasons(model, inputs)["c1"].startswith("removing its units is not the same as zeroing them")


# --- everything that comes out ---


@pytest.mark.parametrize("output", ["features", "a mask", "a record"])
def test_channels_that_come_out_stay(output: str) -> None:
    def forward(s: Any, x: Tensor) -> Any:
        x = F.relu(s.c2(F.relu(s.c1(x))))
        return Answer(s.h(x.mean((2, 3))), x) if output == "a record" else OUTPUTS[output](x, s.h(x.mean((2, 3))))

    model, inputs = _drawn(_net(forward))
    assert set(_units(model, inputs)) == {"c1"}
    assert "a shape or type changes" in _reasons(model, inputs)["c2"]


def test_numbers_that_follow_a_width_hold_it() -> None:
    """A count of channels keeps its shape when they go, and is wrong."""

    def forward(s: Any, x: Tensor) -> Any:
        x = F.relu(s.c1(x))
        return _pooled(s, x), (x > 0).sum(1), x.shape[1]

    model, inputs = _drawn(_net(forward))
    assert set(_units(model, inputs)) == {"c2"}


def test_classes_as_whole_numbers_hold_nothing() -> None:
    model, inputs = _drawn(_net(lambda s, x: {"logits": _simple(s, x), "class": _simple(s, x).argmax(1)}))
    assert set(_units(model, inputs)) == {"c1", "c2"}


def test_complex_numbers_are_compared() -> None:
    model, inputs = _drawn(_net(lambda s, x: torch.fft.fft(F.relu(s.c2(F.relu(s.c1(x)))).mean((2, 3)))))
    assert set(_units(model, inputs)) == {"c1"}


def test_an_object_is_refused_by_name() -> None:
    model, inputs = _drawn(_net(lambda s, x: (_simple(s, x), Opaque(x))))
    with pytest.raises(ModelError, match="returns a Opaque, which cannot be looked into"):
        find_groups(model, inputs[:1])
    with pytest.raises(InputError, match="Opaque"):
        compress_module(model, inputs[:1], [inputs], 0.3, scorer="random", logits=lambda out: out[0])


# --- the example ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_trial_has_the_type_of_the_example(dtype: torch.dtype) -> None:
    model, inputs = _drawn(_net(_simple))
    assert set(_units(model.to(dtype), inputs.to(dtype))) == {"c1", "c2"}


def test_the_default_type_makes_no_difference() -> None:
    model, inputs = _drawn(_net(_simple))
    torch.set_default_dtype(torch.float64)
    try:
        slim = compress_module(model, inputs[:1], [inputs], 0.3, scorer="random", repair=(), round_to=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(slim.structure.groups) == 2


@pytest.mark.parametrize("domain", [torch.log, torch.acos, lambda x: (1 - x) ** 0.45])
def test_the_trial_has_the_range_of_the_example(domain: Callable[[Tensor], Tensor]) -> None:
    model, inputs = _drawn(_net(lambda s, x: _simple(s, domain(x))))
    assert set(_units(model, inputs.sigmoid())) == {"c1", "c2"}


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda s, x: _simple(s, F.dropout(x, 0.5)), "another output for the same input each time"),
        (lambda s, x: _simple(s, x.abs().neg().log()), "returns NaN for the example"),
        (lambda s, x: _simple(s, x.reshape(1, *IMAGES)), "runs on one sample, but not on two at once: RuntimeError"),
        (lambda s, x: _simple(s, x[:, :2]), "does not run on the example: RuntimeError: Given groups=1"),
    ],
)
def test_what_is_wrong_with_the_dense_model_is_said(forward: Callable[..., Any], message: str) -> None:
    model, inputs = _drawn(_net(forward))
    with pytest.raises(ModelError, match=message):
        find_groups(model, inputs[:1])


def test_infinities_at_fixed_places_do_not_matter() -> None:
    model, inputs = _drawn(_net(lambda s, x: _simple(s, x).masked_fill(torch.arange(CLASSES) == 2, -torch.inf)))
    assert set(_units(model, inputs)) == {"c1", "c2"}


def test_a_model_without_units_says_why() -> None:
    model, inputs = _drawn(nn.Sequential(nn.Flatten(), nn.Linear(432, CLASSES)))
    with pytest.raises(BudgetError, match="no removable units: 1: the classifier's outputs are the classes"):
        compress_module(model, inputs[:1], [inputs], 0.3)


# --- modules as they are ---


def test_integer_parameters_and_a_train_that_returns_nothing() -> None:
    class Frozen(Block):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    model, inputs = _drawn(Frozen(_simple, c1=conv(3, 16), c2=conv(16, 16), h=nn.Linear(16, CLASSES)))  # type: ignore[func-returns-value]
    assert model is None  # `eval` hands on what `train` returns
    model = Frozen(_simple, c1=conv(3, 16), c2=conv(16, 16), h=nn.Linear(16, CLASSES))
    model.steps = nn.Parameter(torch.tensor(0), requires_grad=False)
    model.eval()
    assert set(_units(model, inputs)) == {"c1", "c2"}


@pytest.mark.parametrize("scorer", ["random", "taylor", "magnitude"])
def test_tensors_of_a_subclass_and_inference_mode(scorer: str) -> None:
    class Picture(Tensor):
        pass

    model, inputs = _drawn(_net(_simple))
    labels = torch.arange(4) % CLASSES
    pictures = inputs.as_subclass(Picture)
    slim = compress_module(model, pictures[:1], [(pictures, labels)], 0.3, scorer=scorer)
    assert all(type(value) in (Tensor, nn.Parameter) for value in slim.pruned.model.state_dict(keep_vars=True).values())
    with torch.inference_mode():
        model, inputs = _drawn(_net(_simple))
        slim = compress_module(model, inputs[:1], [(inputs, labels)], 0.3, scorer=scorer)
    assert len(slim.structure.groups) == 2


# --- gates and depthwise layers ---


def _gated(s: Any, x: Tensor) -> Tensor:
    x = F.relu(s.c1(x))
    return s.h(F.relu(s.c2(x * torch.sigmoid(s.gate(x)))).mean((2, 3)))


@pytest.mark.parametrize("width", [4, 12, 16, 20, 24, 33, 64])
def test_a_gate_of_one_channel_is_no_part_of_the_group(width: int) -> None:
    layers = {"c1": conv(3, width), "c2": conv(width, 6), "h": nn.Linear(6, CLASSES), "gate": conv(width, 1)}
    model, inputs = _drawn(Block(_gated, **layers))
    assert _units(model, inputs) == {"c1": width, "c2": 6}
    assert _reasons(model, inputs)["gate"] == "its one output is broadcast over those of c1"


@pytest.mark.parametrize("width", [6, 16, 18])
def test_attention_gates_of_a_u_net(width: int) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        skip = F.relu(s.a(x))
        deep = F.interpolate(F.relu(s.b(F.max_pool2d(skip, 2))), scale_factor=2)
        gate = torch.sigmoid(s.psi(F.relu(s.wg(deep) + s.wx(skip))))
        return s.o(F.relu(s.c(torch.cat([skip * gate, s.up(deep)], 1))))

    half, twice = width // 2, 2 * width
    layers = {
        **{"a": conv(3, width), "b": conv(width, twice), "wg": conv(twice, half, 1), "wx": conv(width, half, 1)},
        **{"psi": conv(half, 1, 1), "up": conv(twice, width, 1), "c": conv(twice, width), "o": conv(width, 2, 1)},
    }
    model, inputs = _drawn(Block(forward, **layers))
    assert _units(model, inputs) == {"a": width, "b": twice, "wg": half, "up": width, "c": width}


@pytest.mark.parametrize("pooled", ["sum", "product"])
def test_pooling_by_a_learnt_weight_for_every_token(pooled: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        t = F.relu(s.embed(x))
        weights = s.weight(t).softmax(1)
        return s.h((t * weights).sum(1) if pooled == "sum" else (weights.transpose(1, 2) @ t).squeeze(1))

    layers = {"weight": nn.Linear(14, 1), "embed": nn.Linear(6, 14), "h": nn.Linear(14, CLASSES)}
    model, inputs = _drawn(Block(forward, **layers), 5, 6)
    assert _units(model, inputs) == {"embed": 14}


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_a_depthwise_layer_has_a_unit_for_every_input(multiplier: int) -> None:
    wide = 8 * multiplier
    layers = [conv(3, 8), nn.ReLU(), conv(8, wide, groups=8), nn.BatchNorm2d(wide), nn.ReLU(), conv(wide, 6, 1)]
    model, inputs = _drawn(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)))
    assert _units(model, inputs) == {"0": 8, "5": 6}
    groups = find_groups(model, inputs[:1]).groups
    slim = prune(model, groups, plan_of({"0": (0, 3, 7)})).model
    assert (slim[2].in_channels, slim[2].groups, slim[2].out_channels) == (5, 5, 5 * multiplier)
    labels = torch.arange(4) % CLASSES
    for repair in ("fold", "least-squares", "batchnorm", "variance-matching"):
        repaired = compress_module(model, inputs[:1], [(inputs, labels)] * 2, 0.4, round_to=1, repair=(repair,))
        assert all(value.isfinite().all() for value in repaired.pruned.model.state_dict().values())


# --- reasons are true ---


@pytest.mark.parametrize(
    ("step", "layer", "reason"),
    [
        (lambda s, x: _pooled(s, F.relu(s.t(F.relu(s.c1(x))))), nn.ConvTranspose2d(16, 16, 2, 2), "ConvTranspose2d t"),
        (
            lambda s, x: s.h(s.t(F.relu(s.c1(x)).flatten(2).transpose(1, 2))[0].mean(1)),
            nn.LSTM(16, 16, batch_first=True),
            "LSTM t reads or writes them",
        ),
        (lambda s, x: _pooled(s, s.t(s.c1(x))), nn.GroupNorm(4, 16), "GroupNorm t takes its statistics"),
        (lambda s, x: _pooled(s, s.t(F.relu(s.c1(x)))), nn.Conv2d(16, 16, 1, groups=16), ""),
    ],
)
def test_reasons_name_what_holds_a_layer(step: Callable[..., Any], layer: nn.Module, reason: str) -> None:
    model, inputs = _drawn(_net(step, t=layer))
    assert reason in _reasons(model, inputs).get("c1", "")
    assert _reasons(model, inputs)["h"] == "its outputs reach the model's output"


def test_an_exception_is_the_reason() -> None:
    model, inputs = _drawn(_net(lambda s, x: _pooled(s, F.relu(s.c1(x)).reshape(len(x), 16, 12, 12))))
    reason = _reasons(model, inputs)["c1"]
    assert reason.startswith("its units cannot be removed: RuntimeError: shape '[2, 16, 12, 12]' is invalid")
    assert "\n" not in reason


def test_what_torch_pruning_stumbles_over_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "MOST_VISITS", 0)
    model, inputs = _drawn(_net(_simple))
    reasons = {layer.name: layer.reason for layer in find_groups(model, inputs[:1]).fixed}
    assert reasons["c1"] == "its units cannot be followed: RecursionError: torch-pruning does not come to an end"


def test_the_only_unit_of_a_layer_stays() -> None:
    model, inputs = _drawn(Block(_simple, c1=conv(3, 1), c2=conv(1, 16), h=nn.Linear(16, CLASSES)))
    assert _reasons(model, inputs)["c1"] == "it has one unit"
    slim = compress_module(model, inputs[:1], [(inputs, torch.arange(4) % CLASSES)] * 2, 0.3, round_to=1)
    assert {group.name for group in slim.structure.groups} == {"c2"}


def test_a_shared_weight_is_the_reason() -> None:
    net = _net(lambda s, x: _pooled(s, F.relu(s.t(F.relu(s.c1(x))))), t=conv(16, 16))
    net.t.weight = net.c2.weight
    model, inputs = _drawn(net)
    reasons = _reasons(model, inputs)
    assert reasons["t"] == "t has a weight that c2 has as well"
    assert reasons["c2"] == "c2 has a weight that t has as well"
    assert "has a weight that" in reasons["c1"]


# --- layers that the example does not reach ---


def _early_exit(s: Any, x: Tensor) -> Tensor:
    x = F.relu(s.c1(x))
    return s.out(x.mean((2, 3))) if x.mean() > 1e6 else _pooled(s, x)


def _auxiliary(s: Any, x: Tensor) -> Any:
    x = F.relu(s.c1(x))
    return (_pooled(s, x), s.out(x.mean((2, 3)))) if s.training else _pooled(s, x)


@pytest.mark.parametrize("step", [_early_exit, _auxiliary])
def test_what_an_idle_layer_could_read_stays(step: Callable[..., Any]) -> None:
    model, inputs = _drawn(
        Block(step, c1=conv(3, 16), c2=conv(16, 24), h=nn.Linear(24, CLASSES), out=nn.Linear(16, CLASSES))
    )
    assert _units(model, inputs) == {"c2": 24}
    reasons = _reasons(model, inputs)
    assert reasons["out"].startswith("the example does not reach it")
    assert "out" in reasons["c1"]
    groups = find_groups(model, inputs[:1]).groups
    slim = prune(model, groups, extreme_plan(groups)).model
    slim.train()
    assert slim(inputs) is not None
    assert slim.out(F.relu(slim.c1(inputs)).mean((2, 3))).shape == (4, CLASSES)


def test_a_layer_that_no_code_names_holds_nothing() -> None:
    model, inputs = _drawn(_net(_simple, dead=nn.Linear(16, 16)))
    assert set(_units(model, inputs)) == {"c1", "c2"}
    assert "dead" in _reasons(model, inputs)


def test_a_branch_for_another_size_can_still_run() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stems = nn.ModuleDict({"small": conv(3, 16), "large": conv(3, 16, 5)})
            self.c2, self.h = conv(16, 24), nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stems["small" if x.shape[-1] < 20 else "large"](x))
            return self.h(F.relu(self.c2(x)).mean((2, 3)))

    model, inputs = _drawn(Sized())
    assert _units(model, inputs) == {"c2": 24}
    groups = find_groups(model, inputs[:1]).groups
    slim = prune(model, groups, extreme_plan(groups)).model
    assert slim(torch.randn(1, 3, 24, 24)).shape == (1, CLASSES)


def test_experts_that_are_not_chosen_stay_and_the_others_do_not() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.h = nn.Linear(6, 16), nn.Linear(16, CLASSES)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in "abc")

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.embed(x))
            return self.h(x + self.experts[int(x.sum() * 0)](x))

    model, inputs = _drawn(Experts(), 6)
    assert _units(model, inputs) == {"experts.0.0": 24}
    assert {name for name, reason in _reasons(model, inputs).items() if reason.startswith("the example")} == {
        *("experts.1.0", "experts.1.2", "experts.2.0", "experts.2.2")
    }
