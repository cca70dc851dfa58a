from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from models import FlattenCNN, Subject, snapshot
from torch import Tensor, nn

from pxcompress.state import best_device, device_of, evaluating, seeded


def _draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.randn(()))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40, -1])
def test_seeded_draws_repeat(seed: int) -> None:
    with seeded(seed):
        first = _draw()
    with seeded(seed):
        assert _draw() == first
    with seeded(seed + 1):
        second = _draw()
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_seeded_leaves_the_outer_draws_alone() -> None:
    with seeded(5):
        expected = [_draw(), _draw()]
    with seeded(5):
        draws = [_draw()]
        with seeded(9):
            _draw()
        draws.append(_draw())
    assert draws == expected


def test_seeded_leaves_the_outer_draws_alone_after_an_exception() -> None:
    with seeded(5):
        expected = _draw()
    with seeded(5):
        with pytest.raises(ZeroDivisionError), seeded(9):
            _ = _draw()[0] / 0
        assert _draw() == expected


def _busy() -> nn.Module:
    """Mixed modes, frozen parameters, in-place activations and hooks of its own."""
    model = FlattenCNN().train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.register_forward_hook(lambda module, args, output: None)
    model.fc1.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    model.fc2.register_full_backward_hook(lambda module, before, after: None)
    return model


def test_inside_the_model_is_ready_to_be_read() -> None:
    model = _busy()
    with evaluating(model) as model_inside:
        assert model_inside is model
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.relu.inplace is False
        assert len(model.conv2._forward_hooks) == 1, "the owner's hooks stay"


def _register(model: nn.Module) -> None:
    conv = model.conv1
    conv.register_forward_hook(lambda module, args, output: None)
    conv.register_forward_pre_hook(lambda module, args: None)


def test_afterwards_all_is_as_before() -> None:
    model = _busy()
    before = snapshot(model)
    with evaluating(model):
        _register(model)
        model(torch.randn(2, 3, 16, 16))
    assert snapshot(model) == before


def test_afterwards_hooks_with_keywords_are_gone_too() -> None:
    model = _busy()
    before = snapshot(model)
    with evaluating(model):
        model.conv1.register_forward_hook(lambda *args: None, with_kwargs=True, always_call=True)
        model.conv1.register_forward_pre_hook(lambda *args: None, with_kwargs=True)
    assert snapshot(model) == before


def test_afterwards_backward_hooks_are_gone_too() -> None:
    model = _busy()
    before = snapshot(model)
    with evaluating(model):
        model.conv1.register_full_backward_hook(lambda module, before, after: None)
        model.conv1.register_full_backward_pre_hook(lambda module, after: None)
    assert snapshot(model) == before


def _fail_inside(model: nn.Module) -> None:
    with evaluating(model):
        _register(model)
        raise ArithmeticError


def test_afterwards_all_is_as_before_in_spite_of_an_exception() -> None:
    model = _busy()
    before = snapshot(model)
    with pytest.raises(ArithmeticError):
        _fail_inside(model)
    assert snapshot(model) == before


def test_a_hook_that_its_owner_removes_inside_stays_removed() -> None:
    model = FlattenCNN()
    with evaluating(model):
        model.conv1.register_forward_hook(lambda module, args, output: None).remove()
    assert not model.conv1._forward_hooks


def test_observed_may_be_nested() -> None:
    model = _busy()
    before = snapshot(model)
    with evaluating(model):
        with evaluating(model):
            _register(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert not model.conv1._forward_hooks
    assert snapshot(model) == before


def test_observed_outputs_are_those_of_eval_mode(small: Subject) -> None:
    model = copy.deepcopy(small.model).train()
    with torch.no_grad():
        expected = small.model(small.inputs)
        with evaluating(model):
            assert torch.equal(model(small.inputs), expected)


class _Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_device_of() -> None:
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(_Buffered()) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_best_device_can_be_used() -> None:
    assert torch.zeros(2, device=best_device()).sum() == 0


class _HooksItself(nn.Module):
    """Collects what its layer returns by a hook that it adds when it first runs, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        collected: list[torch.Tensor] = []
        self.collected = collected
        if not getattr(self, "is_hooked", False):
            self.layer.register_forward_hook(lambda _, inputs, output: self.collected.append(output))
            self.is_hooked = True
        self.layer(x)
        return self.collected[0]


def test_a_module_that_hooks_itself_goes_on_to_run() -> None:
    model = _HooksItself()
    for _ in range(2):
        with evaluating(model):
            model(torch.randn(2, 3))
    assert model(torch.randn(2, 3)).shape == (2, 3)
    with evaluating(model):  # hooks from before stay
        model(torch.randn(2, 3))
    assert model(torch.randn(2, 3)).shape == (2, 3)
