"""Rules between the linear layers against slow versions of the formulas of AttnLRP and CP-LRP, and conservation."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor, nn

from pxcompress.attribution import attributed, parse_composite
from pxcompress.attribution.attention import SOFTMAX_RULES
from pxcompress.attribution.transformer import ACTIVATIONS


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


class Wrapped(nn.Module):
    """A function of an input, with a linear layer in front (the identity), so that it counts as a model."""

    def __init__(self, function, width: int) -> None:
        super().__init__()
        self.front = nn.Linear(width, width, bias=False).double()
        nn.init.eye_(self.front.weight)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.front(x))


def multiplier(function, x: Tensor, start: Tensor, text: str = "epsilon(0)") -> Tensor:
    """The multiplier of x for the multiplier `start` of function(x)."""
    with attributed(Wrapped(function, x.shape[-1]), parse_composite(text), x) as ruled:
        assert not ruled.unruled
        a = x.clone().requires_grad_()
        return torch.autograd.grad(ruled.model(a), a, start)[0]


# --- attention --------------------------------------------------------------------------------------------------------


def attention(x: Tensor, *, fused: bool) -> Tensor:
    """One head per third dimension; x holds q, k and v side by side: (batch, tokens, 3 * width)."""
    q, k, v = x.chunk(3, -1)
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


def softmax_relevance(rule: str, scores: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of a row of softmax inputs, written out over all pairs."""
    s = scores.softmax(0)
    result = torch.zeros_like(scores)
    for j in range(len(scores)):
        c = torch.stack([s[j] * ((1.0 if i == j else 0.0) - s[i]) * scores[i] for i in range(len(scores))])
        if rule == "attn":  # Taylor at the input; the constant keeps its own
            result += c / s[j] * relevance[j]
        else:
            bias = (s[j] - c.sum()).clamp(min=0)
            result += c.clamp(min=0) / (c.clamp(min=0).sum() + bias) * relevance[j]
    return result


def attention_relevance(rule: str, x: Tensor, start: Tensor) -> Tensor:
    """AttnLRP's and CP-LRP's relevance of q, k, v for one sequence (tokens, 3 * width), in relevance form."""
    q, k, v = x.chunk(3, -1)
    scores = q @ k.T * q.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    out = weights @ v
    relevance = start * out
    c = weights[:, :, None] * v[None] / out[:, None] * relevance[:, None]  # query, key, dim
    if rule == "cp":
        return torch.cat([torch.zeros_like(q), torch.zeros_like(k), c.sum(0)], -1)
    r_weights = c.sum(2) / 2
    r_scores = torch.stack([softmax_relevance(rule, *row) for row in zip(scores, r_weights, strict=True)])
    pairs = q[:, None] * k[None] * q.shape[-1] ** -0.5 / scores[:, :, None] * r_scores[:, :, None] / 2
    return torch.cat([pairs.sum(1), pairs.sum(0), c.sum(0) / 2], -1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rule", SOFTMAX_RULES)
def test_attention_equals_the_slow_formulas(rule, fused):
    x, start = tensors((1, 5, 12), (1, 5, 4))
    m = multiplier(lambda y: attention(y, fused=fused), x, start, f"epsilon(0)|softmax={rule}")
    torch.testing.assert_close((x * m)[0], attention_relevance(rule, x[0], start[0]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rule", SOFTMAX_RULES)
def test_values_get_all_or_half_of_the_relevance(rule):
    x, start = tensors((2, 6, 12), (2, 6, 4))
    m = multiplier(lambda y: attention(y, fused=True), x, start, f"epsilon(0)|softmax={rule}")
    values = (x * m)[..., 8:].sum()
    total = (attention(x, fused=True) * start).sum()
    torch.testing.assert_close(values, total if rule == "cp" else total / 2)


@pytest.mark.parametrize("rule", SOFTMAX_RULES)
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
def test_masked_positions_get_nothing(rule, kind):
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = {"boolean": allowed, "additive": torch.zeros(5, 5).double().masked_fill(~allowed, -math.inf), "causal": None}

    def masked(y: Tensor) -> Tensor:
        q, k, v = y.chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[kind], is_causal=kind == "causal")

    (x,) = tensors((1, 5, 12))
    start = torch.zeros(1, 5, 4, dtype=torch.float64)
    start[:, 1] = 1
    m = multiplier(masked, x, start, f"epsilon(0)|softmax={rule}")
    assert torch.isfinite(m).all()
    assert (m[:, 2:] == 0).all()
    assert (m[:, :2] != 0).any()


class MultiHead(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.call = kwargs.pop("call", {})
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, **self.call)[0]


class Explicit(nn.Module):
    """What MultiHead computes, from its weights."""

    def __init__(self, source: MultiHead) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24).double(), nn.Linear(8, 8).double()
        self.qkv.weight, self.qkv.bias = source.attn.in_proj_weight, source.attn.in_proj_bias
        self.proj.weight, self.proj.bias = source.attn.out_proj.weight, source.attn.out_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("call", [{"need_weights": False}, {"need_weights": True}])
@pytest.mark.parametrize("rule", SOFTMAX_RULES)
def test_torchs_multihead_attention_has_the_rules_of_its_parts(rule, call):
    torch.manual_seed(0)
    model = MultiHead(call=call)
    x, start = tensors((2, 5, 8), (2, 5, 8))
    results = []
    for module in (model, Explicit(model)):
        with attributed(module, parse_composite(f"gamma|softmax={rule}"), x) as ruled:
            assert [layer.name.rpartition(".")[2] for layer in ruled.layers] in (["attn", "out_proj"], ["qkv", "proj"])
            a = x.clone().requires_grad_()
            results.append(torch.autograd.grad(ruled.model(a), a, start)[0])
    torch.testing.assert_close(*results)


def test_torchs_multihead_attention_with_masks_and_separate_projections_computes_the_same():
    torch.manual_seed(0)
    padding = torch.tensor([[False, False, False, True], [False] * 4])
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    x = tensors((2, 4, 8))[0]
    for model in (MultiHead(call={"key_padding_mask": padding, "attn_mask": causal}), MultiHead(kdim=8, vdim=8)):
        example = x
        model.eval()
        if "key_padding_mask" in model.call:  # the mask fixes the batch; one sample is watched
            model.call["key_padding_mask"] = padding[:1]
            example = x[:1]
        with attributed(model, parse_composite("epsilon"), example) as ruled:
            torch.testing.assert_close(ruled.model(example.clone().requires_grad_()), model(example))


# --- activations, products, norms -------------------------------------------------------------------------------------

FUNCTIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "tanh": torch.tanh,
    "softsign": F.softsign,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "square": torch.square,
    "pow": lambda x: x**3,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_pass_relevance_but_for_their_constant(name):
    x, start = tensors((3, 40), (3, 40))
    x[0, :5] = torch.tensor([0.0, 1e-9, -1e-9, 1e-4, -1e-4])
    m = multiplier(FUNCTIONS[name], x, start)
    at_zero = FUNCTIONS[name](torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(at_zero.item(), ACTIVATIONS[name].at_zero)
    torch.testing.assert_close(x * m, start * (FUNCTIONS[name](x) - at_zero), rtol=1e-3, atol=1e-6)
    assert torch.isfinite(m).all()
    # Near 0 the multiplier is the slope (of hardtanh and relu6, as of ReLU, from the left at 0 itself).
    slope = FUNCTIONS[name](torch.full((1,), 1e-4, dtype=torch.float64)).sub(at_zero).item() / 1e-4
    torch.testing.assert_close((m / start)[0, 3].item(), slope, rtol=1e-3, atol=1e-4)


def gate(kind: str):
    def function(x: Tensor) -> Tensor:
        signal, other = x.chunk(2, -1)
        if kind == "swiglu":
            return F.silu(other) * signal
        if kind == "glu":
            return F.glu(x, -1)
        if kind == "einsum":
            return torch.einsum("bi,bi->bi", signal, other)
        return torch.addcmul(torch.zeros_like(signal), signal, other)

    return function


@pytest.mark.parametrize("kind", ["swiglu", "glu", "einsum", "addcmul"])
def test_gated_products_give_half_to_each_factor(kind):
    x, start = tensors((2, 8), (2, 4))
    relevance = x * multiplier(gate(kind), x, start)
    half = start * gate(kind)(x) / 2
    torch.testing.assert_close(relevance[:, :4], half)
    constant = start * x[:, :4] / 4 if kind == "glu" else 0  # sigmoid(0) = 1/2 is a bias of the gate
    torch.testing.assert_close(relevance[:, 4:], half - constant)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


NORMS = {
    "layer_norm": (lambda x: F.layer_norm(x, (6,)), True),
    "rms_norm": (lambda x: F.rms_norm(x, (6,)), False),
    "rms norm, spelled out": (rms, False),
    "normalize": (lambda x: F.normalize(x, dim=-1), False),
    "group_norm": (lambda x: F.group_norm(x, 2), True),
    "instance_norm": (lambda x: F.instance_norm(x), True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_linear_once_their_scale_is_constant(name):
    """m = J^T start where J is the norm's Jacobian with the deviation held: found by differences of that linear map."""
    function, centred = NORMS[name]
    x, start = tensors((2, 4, 6), (2, 4, 6))
    m = multiplier(function, x, start)
    relevance, expected = (x * m).flatten(1).sum(1), (function(x) * start).flatten(1).sum(1)
    torch.testing.assert_close(relevance, expected, rtol=1e-4, atol=1e-6)  # no bias: all of it arrives
    dims = (1, 2) if name == "group_norm" else -1
    rows = m.reshape(2, 2, 2, 6) if name == "group_norm" else m
    sums = rows.sum((2, 3) if name == "group_norm" else dims)
    assert (sums.abs().max() < 1e-9) == centred  # only the mean's subtraction makes multipliers sum to 0


def test_affine_layer_norm_weights_its_multipliers():
    x, start, weight, bias = tensors((2, 6), (2, 6), (6,), (6,))
    m = multiplier(lambda y: F.layer_norm(y, (6,), weight, bias), x, start)
    torch.testing.assert_close(m, multiplier(lambda y: F.layer_norm(y, (6,)), x, start * weight))


# --- whole models: without biases all relevance arrives ---------------------------------------------------------------

SMALL = {"img_size": 32, "num_classes": 4}
VIT = {**SMALL, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
FAMILIES = {
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "cait_xxs24_224": VIT,
    "mixer_s16_224": SMALL,
    "swin_tiny_patch4_window7_224": {**SMALL, "embed_dim": 12, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
    "pvt_v2_b0": {"num_classes": 4, "embed_dims": (8, 16, 16, 24), "depths": (1,) * 4, "num_heads": (1, 2, 2, 2)},
    "convnext_atto": {"num_classes": 4, "dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1)},
    "convnextv2_atto": {"num_classes": 4, "dims": (8, 12, 16, 24), "depths": (1, 1, 1, 1)},
}


def without_biases(name: str) -> nn.Module:
    """A small model of the family, weights random, everything that is added to activations zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **FAMILIES[name]).double().eval()
    for key, parameter in model.named_parameters():
        added = key.endswith(("bias", "pos_embed", "token", "bias_table", "reg_token"))
        if added or "gamma" in key:
            nn.init.constant_(parameter, 0.0 if added else 0.5)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_families_conserve_relevance_without_unruled_parts(name):
    model = without_biases(name)
    x = tensors((2, 3, 32, 32))[0]
    for text in ("epsilon(0)", "gamma"):
        with attributed(model, parse_composite(text), x) as ruled:
            assert not ruled.unruled
            a = x.clone().requires_grad_()
            out = ruled.model(a)
            (m,) = torch.autograd.grad(out[:, 1].sum(), a)
        relevance, logit = (a * m).detach().flatten(1), out.detach()[:, 1]
        error = (relevance.sum(1) - logit).abs() / relevance.abs().sum(1)
        assert (error < 1e-3).all(), (text, relevance.sum(1), logit)


@pytest.mark.parametrize("rule", SOFTMAX_RULES)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_fused_and_spelled_out_attention_get_the_same_relevance(name, rule):
    torch.manual_seed(0)
    x = tensors((1, 3, 32, 32))[0]
    results = []
    for fused in (True, False):
        set_fused_attn(fused)
        try:
            model = without_biases(name)
        finally:
            set_fused_attn(True)
        with attributed(model, parse_composite(f"epsilon|softmax={rule}"), x) as ruled:
            a = x.clone().requires_grad_()
            results.append(torch.autograd.grad(ruled.model(a)[:, 0].sum(), a)[0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8 * float(results[0].abs().max()))
