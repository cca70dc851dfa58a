"""LRP rules against a matrix-form re-implementation from the papers (float64), and against zennit's own attributor."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from zennit import rules as zennit_rules
from zennit.attribution import Gradient
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import NameLayerMapComposite
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer
from zennit.types import Activation, AvgPool

from pxcompress.attribution import Composite, attributed, parse_composite
from pxcompress.attribution.layers import Layer, as_layer, bind
from pxcompress.attribution.rule_passes import apply_rule
from pxcompress.attribution.rules import (
    RULES,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Norm,
    Pass,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
    hook_multiplier,
)
from pxcompress.errors import InputError, ModelError

STAB = 1e-6

# name -> (function, input shape, weight shape, options)
LAYERS = {
    "linear": ("linear", (2, 6), (4, 6), {}),
    "linear, many inputs": ("linear", (3, 80), (5, 80), {}),
    "linear, tokens": ("linear", (2, 3, 6), (4, 6), {}),
    "conv1d": ("conv1d", (2, 3, 9), (4, 3, 3), {"stride": 2, "padding": 1}),
    "conv2d": ("conv2d", (2, 3, 5, 6), (4, 3, 3, 3), {"stride": 2, "padding": (1, 0)}),
    "conv2d, many inputs": ("conv2d", (1, 10, 3, 4), (3, 10, 3, 3), {"padding": 1}),
    "conv2d, dilated": ("conv2d", (2, 2, 7, 7), (3, 2, 3, 3), {"dilation": 2, "padding": 1}),
    "conv2d, grouped": ("conv2d", (2, 4, 4, 4), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "conv2d, depthwise": ("conv2d", (2, 3, 5, 5), (3, 1, 3, 3), {"groups": 3, "padding": "same"}),
    "conv2d, same, even kernel": ("conv2d", (2, 2, 5, 5), (3, 2, 2, 4), {"padding": "same"}),
    "conv3d": ("conv3d", (1, 2, 3, 4, 3), (3, 2, 2, 2, 2), {"stride": (1, 2, 1), "padding": "valid"}),
    "transposed 1d": ("conv_transpose1d", (2, 3, 4), (3, 2, 3), {"stride": 2}),
    "transposed 2d": (
        "conv_transpose2d",
        (2, 4, 3, 3),
        (4, 2, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    ),
    "transposed 3d": ("conv_transpose3d", (1, 2, 2, 3, 2), (2, 3, 2, 2, 2), {}),
}

RULE_CASES = [
    Epsilon(),
    Epsilon(0.25),
    Gamma(),
    Gamma(3.0),
    ZPlus(),
    AlphaBeta(),
    AlphaBeta(1.0, 0.0),
    AlphaBeta(1.5, 0.5),
    WSquare(),
    Flat(),
    ZBox(-3.0, 3.0),
    Norm(),
]

# w^2, flat and z-box give relevance to inputs that are 0, which a * m cannot hold: they are for images.
CASES = [(rule, True) for rule in RULE_CASES]
CASES += [(rule, False) for rule in RULE_CASES if not isinstance(rule, WSquare | Flat | ZBox)]


def stabilised(values: Tensor) -> Tensor:
    return values + STAB * torch.where(values >= 0, 1.0, -1.0)


def share(contributions: Tensor, bias: Tensor, relevance: Tensor) -> Tensor:
    """R_i = sum_j c_ji / (sum_i c_ji + b_j) R_j for contributions (outputs, inputs)."""
    return (contributions / stabilised(contributions.sum(1) + bias)[:, None] * relevance[:, None]).sum(0)


def reference(rule: Rule, weight: Tensor, bias: Tensor, a: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of one flat input a by a rule's definition; weight is the layer's matrix (outputs, inputs)."""
    z = weight @ a + bias
    c = weight * a
    if isinstance(rule, Epsilon | Norm):
        epsilon = rule.epsilon if isinstance(rule, Epsilon) else STAB
        return (c / (z + epsilon * torch.where(z >= 0, 1.0, -1.0))[:, None] * relevance[:, None]).sum(0)
    if isinstance(rule, Gamma):
        up = share(c + rule.gamma * c.clamp(min=0), bias + rule.gamma * bias.clamp(min=0), relevance * (z > 0))
        return up + share(c + rule.gamma * c.clamp(max=0), bias + rule.gamma * bias.clamp(max=0), relevance * (z < 0))
    if isinstance(rule, ZPlus):
        return share(c.clamp(min=0), bias.clamp(min=0), relevance)
    if isinstance(rule, AlphaBeta):
        negative = share(c.clamp(max=0), bias.clamp(max=0), relevance)
        return rule.alpha * share(c.clamp(min=0), bias.clamp(min=0), relevance) - rule.beta * negative
    if isinstance(rule, WSquare):
        return share(weight**2, bias**2, relevance)
    if isinstance(rule, Flat):
        return share((weight != 0).to(weight), torch.zeros_like(bias), relevance)
    assert isinstance(rule, ZBox)
    low, high = weight.clamp(min=0) * rule.low, weight.clamp(max=0) * rule.high
    return share(c - low - high, torch.zeros_like(bias), relevance)


def matrix(layer_forward: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    """The matrix of a linear map on inputs of `shape`, column by column."""
    columns = [layer_forward(unit.view(1, *shape)).flatten() for unit in torch.eye(shape.numel(), dtype=torch.float64)]
    return torch.stack(columns, 1)


def build(name: str, *, negative: bool, bias: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, str, dict]:
    function, input_shape, weight_shape, options = LAYERS[name]
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(input_shape, generator=generator, dtype=torch.float64)
    a = a if negative else a.relu()  # zeros among the inputs: what a ReLU leaves
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    outputs = weight.shape[1] * options.get("groups", 1) if "transpose" in function else weight.shape[0]
    return (
        a,
        weight,
        torch.randn(outputs, generator=generator, dtype=torch.float64) if bias else None,
        function,
        options,
    )


def multiplier(
    rule: Rule, a: Tensor, weight: Tensor, bias: Tensor | None, function: str, options: dict
) -> tuple[Tensor, ...]:
    """z, a random multiplier of it, and the multiplier that the rule gives a."""
    a = a.clone().requires_grad_()
    a, layer = as_layer(function, bind(function, (a, weight, bias), options))
    z = apply_rule(a, layer, rule)
    m = torch.randn(z.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(z, a, m)
    return z.detach(), m, gradient


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("rule", "negative"), CASES, ids=lambda value: {True: "any", False: ">= 0"}.get(value, str(value))
)
@pytest.mark.parametrize("name", LAYERS)
def test_rule_equals_its_definition_on_the_materialised_matrix(name, rule, negative, bias):
    a, weight, b, function, options = build(name, negative=negative, bias=bias)
    z, start, m = multiplier(rule, a, weight, b, function, options)
    relevance = start * z
    forward = getattr(F, function)
    torch.testing.assert_close(z, forward(a, weight, b, **options))
    tokens = function == "linear" and a.dim() == 3
    rows = a.flatten(0, 1) if tokens else a
    w = matrix(lambda x: forward(x, weight, None, **options), rows.shape[1:])
    b_full = (forward(torch.zeros_like(rows[:1]), weight, b, **options)).flatten()
    for row, r, got in zip(rows, relevance.reshape(len(rows), -1), (a * m).reshape(len(rows), -1), strict=True):
        torch.testing.assert_close(got, reference(rule, w, b_full, row.flatten(), r), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    "rule", [Epsilon(), Epsilon(0.5), Gamma(), ZPlus(), AlphaBeta(), AlphaBeta(3, 2), Norm()], ids=str
)
@pytest.mark.parametrize("name", LAYERS)
def test_fast_paths_equal_zennits_hooks_also_where_the_input_is_zero(name, rule, negative):
    a, weight, b, function, options = build(name, negative=negative, bias=True, seed=1)
    a.flatten()[::3] = 0
    z, start, m = multiplier(rule, a, weight, b, function, options)
    _, layer = as_layer(function, bind(function, (a, weight, b), options))
    expected = hook_multiplier(rule.hook(), layer, a, z, start)
    torch.testing.assert_close(m, expected, rtol=1e-6, atol=1e-8)
    assert (m[a == 0] != 0).any()


@pytest.mark.parametrize("rule", [Epsilon(), Gamma(), ZPlus(), AlphaBeta()], ids=str)
def test_fast_paths_hold_in_float32_with_many_inputs(rule):
    generator = torch.Generator().manual_seed(5)
    a, weight, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((32, 384), (64, 384), (64,))
    )
    a[:, ::2] = 0
    z = F.linear(a, weight, b)
    exact = hook_multiplier(rule.hook(), Layer(weight, b), a, z, torch.ones_like(z))
    x = a.float().requires_grad_()
    z = apply_rule(x, Layer(weight.float(), b.float()), rule)
    (m,) = torch.autograd.grad(z.sum(), x)
    assert (m - exact).abs().max() < 1e-4 * exact.abs().max()


def test_every_rule_of_the_table_is_tested_here():
    assert {type(rule) for rule in RULE_CASES} | {Pass} == set(RULES.values())


def test_pass_hands_relevance_through_and_refuses_other_shapes():
    a, weight, _, _, _ = build("linear", negative=True, bias=False)
    square = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z, start, m = multiplier(Pass(), a, square, None, "linear", {})
    torch.testing.assert_close(a * m, start * z, rtol=1e-4, atol=1e-6)
    with pytest.raises(ModelError, match="needs equal shapes"):
        multiplier(Pass(), a, weight, None, "linear", {})


@pytest.mark.parametrize(
    "rule", [Epsilon(0), Gamma(0.25), ZPlus(), AlphaBeta(), ZBox(-4, 4), WSquare(), Flat()], ids=str
)
def test_relevance_is_conserved_without_bias(rule):
    a, weight, _, function, options = build("conv2d", negative=True, bias=False)
    z, start, m = multiplier(rule, a, weight, None, function, options)
    torch.testing.assert_close((a * m).flatten(1).sum(1), (start * z).flatten(1).sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlphaBeta(2.0, 0.5), "alpha - beta = 1"),
        (lambda: AlphaBeta(0.5, -0.5), "beta"),
        (lambda: Gamma(-1.0), "gamma"),
        (lambda: Epsilon(float("nan")), "epsilon"),
        (lambda: ZBox(1.0, 2.0), "low <= 0 <= high"),
    ],
)
def test_impossible_parameters_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# --- against zennit's own attributor ----------------------------------------------------------------------------------


def randomise(model: nn.Module) -> nn.Module:
    """BatchNorm with statistics that matter, in eval mode.

    Its eps is negligible because zennit leaves it behind in the BatchNorm that it merged: a factor of 1 / sqrt(1 + eps)
    a layer, which epsilon amplifies to 1e-3 at outputs next to 0.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def vgg_bn() -> nn.Module:
    torch.manual_seed(0)
    layers, width = [], 3
    for outputs in (6, 8, 8):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        width = outputs
    model = nn.Sequential(
        OrderedDict(features=nn.Sequential(*layers), flat=nn.Flatten(), fc1=nn.Linear(8 * 4, 12), act=nn.ReLU())
    )
    model.fc2 = nn.Linear(12, 5)
    return randomise(model)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    return randomise(model)


def zennit_relevance(model: nn.Module, composite: Composite, canonizer: object, x: Tensor, start: Tensor) -> Tensor:
    """zennit's way: relevances, a canonizer for the architecture, Norm for sums and average pooling, Pass for ReLUs.

    Norm's stabiliser is made negligible: gradient form needs none there, and with 1e-6 small sums lose 1e-3 of theirs.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    rules = dict.fromkeys(names, composite.low.convolution)
    rules[names[0]] = composite.choice("first").convolution
    composite = NameLayerMapComposite(
        name_map=[([name], rule.hook()) for name, rule in rules.items()],
        layer_map=[
            (Sum, zennit_rules.Norm(1e-12)),
            (AvgPool, zennit_rules.Norm(1e-12)),
            (Activation, zennit_rules.Pass()),
        ],
        canonizers=[canonizer],
    )
    with Gradient(model, composite) as attributor:
        _, relevance = attributor(x, start)
    return relevance.detach()


def our_relevance(model: nn.Module, text: str, x: Tensor, start: Tensor) -> Tensor:
    with attributed(model, parse_composite(text), x) as ruled:
        a = x.clone().requires_grad_()
        out = ruled.model(a)
        (m,) = torch.autograd.grad(out, a, start / out.detach())
    return (a * m).detach()


@pytest.mark.parametrize(
    "text", ["epsilon", "gamma(0.25)", "zplus", "alpha2beta1", "gamma(0.25)|first=zbox(-4;4)", "epsilon|first=wsquare"]
)
@pytest.mark.parametrize("make", [vgg_bn, resnet])
def test_input_relevance_equals_zennits_attributor(make, text):
    model = make().double()
    x = torch.randn(2, 3, 16 if make is vgg_bn else 32, 16 if make is vgg_bn else 32, dtype=torch.float64)
    start = F.one_hot(torch.tensor([1, 3]), 5).double()
    canonizer = SequentialMergeBatchNorm() if make is vgg_bn else ResNetCanonizer()
    expected = zennit_relevance(model, parse_composite(text), canonizer, x, start)
    got = our_relevance(model, text, x, start)
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 1e-4 * scale, float((got - expected).abs().max() / scale)
