from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from models import CLASSES, plan_of, random_plan, snapshot
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import l1_unstructured

from pxcompress.graph import find_groups, prune, removal_error
from pxcompress.models.rewrite import ExplicitAttention, rewrite_plain, unwrap
from pxcompress.state import evaluating, seeded


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def _compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def _drawn(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0, 0.5)
    return attention.eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}, {"bias": False}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_explicit_attention_has_the_numbers_of_multihead_attention(
    batch_first: bool, sizes: dict[str, int], need_weights: bool
) -> None:
    with seeded(0):
        attention = _drawn(nn.MultiheadAttention(12, 3, batch_first=batch_first, **sizes))
        query = torch.randn(2, 4, 12)
        key, value = torch.randn(2, 6, sizes.get("kdim", 12)), torch.randn(2, 6, sizes.get("vdim", 12))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    parts = [query, key, value] if batch_first else [part.transpose(0, 1) for part in (query, key, value)]
    explicit = ExplicitAttention(attention)
    for mask in (None, torch.arange(6)[None] > torch.arange(4)[:, None] + 1, torch.arange(24.0).reshape(4, 6) / 10):
        arguments = {"attn_mask": mask, "need_weights": need_weights}
        if mask is None or mask.dtype == torch.bool:
            arguments["key_padding_mask"] = padding
        expected, weights = attention(*parts, **arguments)
        result, result_weights = explicit(*parts, **arguments)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        assert (weights is None) == (result_weights is None)
        if weights is not None:
            torch.testing.assert_close(result_weights, weights, rtol=1e-5, atol=1e-6)


def test_heads_of_multihead_attention_can_go() -> None:
    with seeded(1):
        model, inputs = Encoder().eval(), torch.randn(4, 5, 6)
    _drawn(model.attention)
    before = snapshot(model)
    twin = rewrite_plain(model)
    assert snapshot(model) == before
    assert torch.allclose(twin(inputs), model(inputs), atol=1e-6)
    groups = {group.name: group for group in find_groups(twin, inputs[:1], ("head",)).groups}
    assert (groups["attention"].kind, groups["attention"].units) == ("head", 3)
    pruned = prune(twin, tuple(groups.values()), plan_of({"attention": (0, 2)}))
    assert pruned.model.attention.num_heads == 1
    assert pruned.model.attention.q.weight.shape == (4, 12)
    assert removal_error(pruned, inputs) < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        StdConv2d(4, 6, 3, bias=True),
        ScaledStdConv2d(4, 6, 3, stride=2),
        ScaledStdConv2dSame(4, 6, 3, stride=2),
        StdConv2d(4, 6, 3, dilation=2, groups=2),
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_convolutions_hold_the_weights_they_compute_with(layer: nn.Module) -> None:
    """Weight standardisation: without it no channel could go, since every weight depends on all of its row."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), copy.deepcopy(layer), nn.ReLU(), nn.Conv2d(6, CLASSES, 3)).eval()
    inputs = torch.randn(2, 3, 19, 19)
    twin = rewrite_plain(model)
    assert type(twin[1]).forward is nn.Conv2d.forward or "Same" in type(twin[1]).__name__
    assert torch.allclose(twin(inputs), model(inputs), atol=1e-5)
    structure = find_groups(twin, inputs[:1], ("3",))
    assert {group.name for group in structure.groups} == {"0", "1"}


def test_a_linear_layer_with_a_parametrization_is_plain_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES)).eval()
    inputs = torch.randn(2, 3)
    assert torch.allclose(rewrite_plain(model)(inputs), model(inputs), atol=1e-6)
    assert {group.name for group in find_groups(rewrite_plain(model), inputs[:1]).groups} == {"0", "1"}


def test_a_model_in_plain_layers_is_the_same_object() -> None:
    model = timm.create_model("resnet10t")
    assert rewrite_plain(model) is model


# --- after every rewrite: the outputs of eval mode, and no more parameters than before ---


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _assert_plain(model: nn.Module, inputs: Tensor) -> nn.Module:
    """The plain version of `model`, which is as it was: same outputs as in eval mode, no more parameters."""
    with torch.no_grad(), evaluating(model):
        expected = model(inputs)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    twin = rewrite_plain(model, lambda each: each(inputs))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad(), evaluating(twin):
        torch.testing.assert_close(twin(inputs), expected, rtol=1e-5, atol=1e-6)
    assert _size(twin) <= _size(model)
    return twin


def _hooked(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return make(nn.Conv2d(8, 8, 3, padding=1))


DERIVED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
    "old weight norm": lambda: _hooked(nn.utils.weight_norm),
    "old spectral norm": lambda: _hooked(nn.utils.spectral_norm),
    "masks": lambda: _hooked(lambda layer: l1_unstructured(layer, "weight", 0.5)),
    "masks of weight and bias": lambda: _hooked(
        lambda layer: l1_unstructured(l1_unstructured(layer, "weight", 0.5), "bias", 2)
    ),
    "standardised": lambda: StdConv2d(8, 8, 3, padding=1),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", DERIVED)
def test_weights_are_those_of_eval_mode_under_every_name(name: str, training: bool) -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first = nn.Conv2d(3, 8, 3), DERIVED[name]()
            self.second, self.head = self.first, nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(torch.relu(self.first(torch.relu(self.stem(x))))).mean((2, 3)))

    with seeded(0):
        model, inputs = Aliased().train(training), torch.randn(4, 3, 9, 9)
    model(inputs)  # a hook leaves a weight with a graph behind, spectral norm takes a step in training mode
    twin = _assert_plain(model, inputs)
    assert twin.first is twin.second
    assert type(twin.first).forward is nn.Conv2d.forward
    assert not twin.first._forward_pre_hooks
    assert isinstance(twin.first.weight, nn.Parameter)


def test_attention_under_two_names_is_rewritten_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(12, 3, batch_first=True)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x, x, x)[0]
            return x + self.second(x, x, x)[0]

    twin = _assert_plain(Twice(), torch.randn(2, 5, 12))
    assert isinstance(twin.first, ExplicitAttention)
    assert twin.first is twin.second


def test_layers_that_share_a_parameter_are_not_untied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(2))
            self.second.in_proj_weight = self.first.in_proj_weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(*[self.first(x, x, x)[0]] * 3)[0]

    model = Tied()
    assert _assert_plain(model, torch.randn(2, 5, 12)) is model


class Encoding(nn.Module):
    def __init__(self, batch_first: bool, padded: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 4, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head = nn.Linear(12, CLASSES)
        self.batch_first, self.padded = batch_first, padded

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([[False, False, False, True, True]] * len(x)) if self.padded else None
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_explicit_attention_serves_an_encoder(batch_first: bool) -> None:
    with seeded(0):
        model, inputs = Encoding(batch_first, padded=False).eval(), torch.randn(4, 5, 12)
    twin = _assert_plain(model, inputs)
    groups = find_groups(twin, inputs[:1], ("head",)).groups
    assert [group.kind for group in groups] == ["head", "neuron"] * 2
    assert removal_error(prune(twin, groups, random_plan(groups, 0)), inputs) < 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_drops_padding_keeps_its_numbers() -> None:
    """Its fused kernel leaves padded places zero, which layers one by one do not."""
    with seeded(0):
        model, inputs = Encoding(True, padded=True).eval(), torch.randn(4, 5, 12)
    _assert_plain(model, inputs)


def test_a_model_that_reads_the_weights_of_attention_keeps_it() -> None:
    class Reading(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.attention.in_proj_weight.sum()

    model, inputs = Reading(), torch.randn(4, 5, 6)
    assert isinstance(_assert_plain(model, inputs).attention, nn.MultiheadAttention)


def test_a_subclass_of_attention_stays() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args: Tensor, **options: bool) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
            return super().forward(*args, **options)[0] * 2, None

    model = Encoder()
    model.attention = Doubled(12, 3, batch_first=True)
    assert type(_assert_plain(model, torch.randn(4, 5, 6)).attention) is Doubled


@pytest.mark.parametrize("need_weights", [True, False])
def test_explicit_attention_takes_one_sequence(need_weights: bool) -> None:
    with seeded(0):
        attention, x = _drawn(nn.MultiheadAttention(12, 3)), torch.randn(4, 12)
    mask, padding = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1), torch.tensor([False, False, False, True])
    options = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
    results, expected = (each(x, x, x, **options) for each in (ExplicitAttention(attention), attention))
    for value, other in zip(results, expected, strict=True):
        if other is None:
            assert value is None
        else:
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel, _compiled_in_place])
def test_compiled_and_parallel_modules_are_the_module_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with seeded(0):
        net, inputs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 9, 9)
        expected = net.eval()(inputs)
    inside = unwrap(wrap(copy.deepcopy(net)))
    assert type(inside) is nn.Sequential
    assert inside._compiled_call_impl is None
    torch.testing.assert_close(inside(inputs), expected)
    inner = rewrite_plain(nn.Sequential(wrap(copy.deepcopy(net)), nn.Flatten()))
    assert type(inner[0]) is nn.Sequential


class Scaled(nn.Conv2d):
    """More than a convolution: what it adds behind cannot be seen in its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 2, self.bias) + 1


class Odd(nn.Conv2d):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * scale, self.bias)


@pytest.mark.parametrize("kind", [Scaled, Odd])
def test_a_convolution_that_does_something_else_stays(kind: type[nn.Conv2d]) -> None:
    layer = kind(3, 4, 3)
    assert type(rewrite_plain(nn.Sequential(layer))[0]) is kind
