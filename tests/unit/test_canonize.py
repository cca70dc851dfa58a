"""BatchNorm folding on a copy, and that the model itself is left alone."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import FrozenBatchNormAct2d, SyncBatchNormAct
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from pxcompress.attribution import attributed, parse_composite
from pxcompress.attribution.canonize import fold_batchnorm, is_batchnorm
from pxcompress.errors import ModelError

EPSILON = parse_composite("epsilon")


def randomised(model: nn.Module) -> nn.Module:
    """Statistics and weights that matter, in eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if is_batchnorm(module):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.5)
    return model.eval()


class Block(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        return self.norm(self.layer(x))


FOLDED = {
    "conv2d": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "no bias, grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "no affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (2, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "with activation": (nn.Conv2d(4, 6, 3), BatchNormAct2d(6, act_layer=nn.SiLU), (2, 4, 5, 5)),
    "frozen": (nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), (2, 4, 5, 5)),
    "frozen, with activation": (nn.Conv2d(4, 6, 3), FrozenBatchNormAct2d(6), (2, 4, 5, 5)),
    "synced": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 5, 5)),
    "synced, with activation": (nn.Conv2d(4, 6, 3), SyncBatchNormAct(6), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_keeps_the_function_and_the_names(name):
    layer, norm, shape = FOLDED[name]
    if name == "synced, with activation":
        norm.act = nn.ReLU()
    model = randomised(Block(copy.deepcopy(layer), copy.deepcopy(norm)))
    x = torch.randn(shape)
    expected, names = model(x), {key for key, _ in model.named_modules()}
    layer_before = model.layer
    assert fold_batchnorm(model, x[:1]) == ()
    assert not any(is_batchnorm(module) for module in model.modules())
    assert names <= {key for key, _ in model.named_modules()}
    assert model.layer is layer_before
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class PreActivation(nn.Module):
    """Its BatchNorms read: the input, a layer's output that a sum reads too, a standardised layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(3), timm.layers.StdConv2d(3, 3, 1)
        self.norm3, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.conv1(self.norm1(x))
        x = x + self.conv2(self.norm2(x).relu())
        return self.fc(self.norm3(x).mean((2, 3)))


def test_what_cannot_be_folded_stays_and_is_counted():
    model = randomised(PreActivation())
    x = torch.randn(2, 3, 4, 4)
    twin = copy.deepcopy(model)
    assert fold_batchnorm(twin, x) == ("norm1", "norm2", "norm3")
    torch.testing.assert_close(twin(x), model(x))
    with attributed(model, EPSILON, x) as ruled:
        rows = {(row.module, row.kind, row.function) for row in ruled.unruled}
        assert [layer.name for layer in ruled.layers] == ["conv1", "conv2", "fc"]
    assert rows == {(f"norm{i}", "BatchNorm2d", "batch_norm, not folded") for i in (1, 2, 3)}


class Twice(nn.Module):
    """One convolution before two BatchNorms: folding either would change the other path."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.a(self.conv(x)) + self.b(self.conv(x * 2))


def test_shared_layers_are_not_folded():
    model = randomised(Twice())
    assert fold_batchnorm(model, torch.randn(1, 3, 4, 4)) == ("a", "b")


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "regnetx_002", "resnext50_32x4d", "ghostnet_050"]
)
def test_timm_networks_fold_whole_and_compute_the_same(name):
    torch.manual_seed(0)
    model = randomised(timm.create_model(name, num_classes=3))
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    assert fold_batchnorm(model, x) == ()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))


# --- the model itself -------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    modules = [
        (name, type(module), module.training, getattr(module, "inplace", None), "forward" in module.__dict__)
        for name, module in model.named_modules()
    ]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    return state, flags, modules, hooks


def assert_same(before: tuple, after: tuple) -> None:
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def fail_inside(model: nn.Module, x: torch.Tensor) -> None:
    with attributed(model, parse_composite("gamma"), x) as ruled:
        assert not ruled.model.training
        assert not any(parameter.requires_grad for parameter in ruled.model.parameters())
        ruled.model(x.clone().requires_grad_())[:, 0].sum().backward()
        raise KeyError


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_the_model_is_left_as_it_was_also_after_an_exception(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **({"img_size": 32, "depth": 1} if "vit" in name else {}))
    model.train()
    next(model.parameters()).requires_grad_(False)
    model.get_classifier().eval()
    x = torch.randn(2, 3, 32, 32)
    before = snapshot(model)
    with pytest.raises(KeyError):
        fail_inside(model, x)
    assert_same(before, snapshot(model))
    with pytest.raises(RuntimeError), attributed(model, EPSILON, x[:, :2]):
        pass
    assert_same(before, snapshot(model))


def test_hooks_by_name_see_tensors_whose_gradients_are_multipliers():
    torch.manual_seed(0)
    model = randomised(timm.create_model("resnet18", num_classes=3))
    x = torch.randn(2, 3, 32, 32)
    with attributed(model, EPSILON, x) as ruled:
        seen = {}
        for name, module in ruled.model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
        out = ruled.model(x.clone().requires_grad_())
        multipliers = torch.autograd.grad(out[:, 1].sum(), list(seen.values()))
    assert len(seen) == len(ruled.layers) == 21
    a, m = seen["fc"], dict(zip(seen, multipliers, strict=True))["fc"]
    bias = model.fc.bias[1]
    torch.testing.assert_close((a * m).sum(1), out[:, 1].detach() - bias.detach(), rtol=1e-4, atol=1e-5)


def test_epsilon_on_a_residual_network_is_gradient_times_input_and_sums_to_the_logit_without_its_biases():
    torch.manual_seed(0)
    model = randomised(timm.create_model("resnet18", num_classes=3)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    a = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(a)[:, 1].sum(), a)
    with attributed(model, parse_composite("epsilon(1e-9)"), x) as ruled:
        a = x.clone().requires_grad_()
        outputs, biases = {}, {}
        for layer in ruled.layers:
            module = ruled.model.get_submodule(layer.name)
            biases[layer.name] = module.bias
            module.register_forward_hook(lambda module, args, z, name=layer.name: outputs.update({name: z}))
        out = ruled.model(a)
        m = torch.autograd.grad(out[:, 1].sum(), [a, *outputs.values()])
    torch.testing.assert_close(x * m[0], x * gradient, rtol=1e-4, atol=1e-4 * float((x * gradient).abs().max()))
    absorbed = sum(
        (multiplier.flatten(2).sum(2) if multiplier.dim() > 2 else multiplier) @ biases[name]
        for name, multiplier in zip(outputs, m[1:], strict=True)
    )
    torch.testing.assert_close((x * m[0]).flatten(1).sum(1) + absorbed, out[:, 1].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("in_place", ["sum", "relu_", "functional", "relu module"])
def test_in_place_operations_on_a_layers_output_do_not_change_relevance(in_place):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Linear(3, 2)
            self.kind = in_place

        def forward(self, x):
            y = self.conv(x)
            if self.kind == "sum":
                y += x
                y = y.relu()
            elif self.kind == "relu_":
                y.relu_()
            elif self.kind == "functional":
                y = nn.functional.relu(y, inplace=True)
            elif self.kind == "relu module":
                y = self.act(y)
            elif self.kind == "out of place sum":
                y = (y + x).relu()
            else:
                y = y.relu()
            return self.fc(y.mean((2, 3)))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 3, 4, 4)
    results = []
    for kind in (in_place, "out of place sum" if in_place == "sum" else "out of place"):
        model.kind = kind
        with attributed(model, parse_composite("gamma(1)"), x) as ruled:
            a = x.clone().requires_grad_()
            results.append(torch.autograd.grad(ruled.model(a).sum(), a)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["tokens += places", "view += places", "border = 0"])
@pytest.mark.parametrize("composite", ["gamma(1)", None])
def test_views_of_a_layers_output_may_change_in_place(kind, composite):
    class Model(nn.Module):
        def __init__(self, changes: bool) -> None:
            super().__init__()
            self.conv, self.linear, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 4), nn.Linear(4, 2)
            self.places = nn.Parameter(torch.randn(16, 4))
            self.changes = changes

        def forward(self, x):
            y = self.conv(x)
            if kind == "border = 0":
                border = torch.zeros_like(y)
                border[:, :, 0] = 1
                if self.changes:
                    y[:, :, 0] = 0
                else:
                    y = y * (1 - border)
            tokens = self.linear(y.flatten(2).transpose(1, 2))
            if kind == "view += places":
                tokens = tokens.view(len(x), 16, 4)
            if self.changes and kind != "border = 0":
                tokens += self.places
            else:
                tokens = tokens + self.places
            return self.fc(tokens.relu().mean(1))

    torch.manual_seed(0)
    model, x = Model(True), torch.randn(2, 3, 4, 4)
    other = Model(False)
    other.load_state_dict(model.state_dict())
    results = []
    for each in (model, other):
        with attributed(each, parse_composite(composite) if composite else None, x) as ruled:
            a = x.clone().requires_grad_()
            results.append(torch.autograd.grad(ruled.model(a).sum(), a)[0])
    torch.testing.assert_close(*results)


class Nothing(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) + torch.randn(2)


class Tuple(Random):
    def forward(self, x):
        return self.conv(x).mean((2, 3)), x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Nothing(), "no convolution or linear layer"),
        (Random(), "deterministic"),
        (Tuple(), "returns a tensor of logits"),
    ],
)
def test_models_that_cannot_be_attributed_get_one_clear_line(model, message):
    with pytest.raises(ModelError, match=message) as error, attributed(model, EPSILON, torch.randn(1, 3, 4, 4)):
        pass
    assert "\n" not in str(error.value)


def test_without_an_example_a_timm_model_says_its_size_and_others_ask_for_one():
    model = timm.create_model("test_vit", num_classes=3)
    with attributed(model, EPSILON, None) as ruled:
        assert ruled.layers
    with pytest.raises(ModelError, match="give an example input"), attributed(Nothing(), EPSILON, None):
        pass


def test_functions_without_a_rule_are_named_with_the_module_they_run_in():
    class Odd(nn.Module):
        def forward(self, x):
            return x.exp()

    model = nn.Sequential(nn.Conv2d(3, 2, 1), Odd(), nn.Flatten(), nn.Linear(32, 2))
    with attributed(model, EPSILON, torch.randn(1, 3, 4, 4)) as ruled:
        assert [(row.module, row.kind, row.function, row.calls) for row in ruled.unruled] == [("1", "Odd", "exp", 1)]


def test_flow_shows_what_every_layer_passes_on_and_what_biases_absorb():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.skip = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            y = self.conv(x)
            y += self.skip(x)
            return self.fc(y.exp().mean((2, 3)))

    model, x = Model(), torch.randn(2, 3, 4, 4)
    with attributed(model, parse_composite("epsilon(0)"), x) as ruled:
        rows = {row.name or row.kind: row for row in ruled.flow(x, lambda out: torch.eye(2)[:1].expand_as(out))}
        again = ruled.flow(x, torch.ones_like)
    assert list(rows) == ["conv", "skip", "exp", "fc"]
    assert len(again) == 4
    assert [row.function for row in ruled.unruled] == ["exp"]
    out = model(x)[:, 0].sum().item()
    assert rows["fc"].relevance_out == pytest.approx(1)
    assert rows["fc"].relevance_out - rows["fc"].relevance_in == pytest.approx(
        2 * model.fc.bias[0].item() / out, rel=1e-4
    )
    assert rows["exp"].relevance_out == pytest.approx(rows["fc"].relevance_in, rel=1e-4)
    assert rows["exp"].rule is None
    for name in ("conv", "skip"):  # no bias: all of it goes on
        assert rows[name].relevance_in == pytest.approx(rows[name].relevance_out, rel=1e-4)
        assert rows[name].size >= abs(rows[name].relevance_out)


@pytest.mark.parametrize("text", ["epsilon", "gamma", "alpha2beta1"])
def test_autocast_gives_nearly_the_same_relevance(text):
    torch.manual_seed(0)
    model, x = timm.create_model("test_vit", num_classes=3).eval(), torch.randn(2, 3, 160, 160)
    results = []
    for enabled in (False, True):
        with attributed(model, parse_composite(text), x) as ruled:
            a = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out = ruled.model(a)
            results.append(torch.autograd.grad(out[:, 0].float().sum(), a)[0] * x)
    exact, low = (result.flatten(1).norm(dim=1) for result in results)
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0)
    assert (results[0] - results[1]).norm() < 0.2 * results[0].norm()
