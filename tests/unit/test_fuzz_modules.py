"""Random networks of usual blocks: removal is zeroing on everything that comes out, or one clear line is raised."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from blocks import BLOCKS, OUTPUTS, Answer, Network
from models import randomised
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pxcompress import compress_module
from pxcompress.errors import PxError
from pxcompress.state import seeded
from pxcompress.types import PruneResult

FEW, MANY = 10, 300


def _network(seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A network, and batches of inputs in its type."""
    draw = random.Random(seed)
    names = draw.choices(list(BLOCKS), k=draw.randint(1, 4))
    output = draw.choices(list(OUTPUTS), [4, 2, 1, 1, 1, 1, 0.5])[0]
    dtype = draw.choices([torch.float32, torch.float64, torch.float16], [8, 1, 0.3])[0]
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = randomised(Network(names, output, draw))
        model(torch.randn(2, 3, 16, 16))  # leaves behind what hooks compute, and running statistics
        batches = [torch.randn(4, 3, 16, 16).to(dtype) for _ in range(2)]
    return model.to(dtype).train(draw.random() < 0.3), batches


def _outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = model.eval()(inputs)
    if isinstance(outputs, Answer):
        outputs = vars(outputs)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _silenced(slim: PruneResult) -> nn.Module:
    """The dense model, in which hooks zero the removed units wherever they are read: no weight is touched."""
    twin = copy.deepcopy(slim.pruned.dense)
    for group in slim.pruned.groups:
        for member in group.consumers if slim.pruned.plan.removed[group.name] else ():
            rows = member.rows(slim.pruned.plan.removed[group.name])

            def zero(layer: nn.Module, args: tuple[Tensor, ...], rows: Tensor = rows) -> tuple[Tensor]:
                return (args[0].index_fill(-1 if isinstance(layer, nn.Linear) else 1, rows, 0),)

            twin.get_submodule(member.module).register_forward_pre_hook(zero)
    return twin


def _assert_same(values: list[Tensor], expected: list[Tensor]) -> None:
    assert [(value.shape, value.dtype) for value in values] == [(value.shape, value.dtype) for value in expected]
    for value, other in zip(values, expected, strict=True):
        if value.dtype in (torch.bool, torch.int64):
            assert (value != other).double().mean() < 1e-2
        else:
            assert (value - other).abs().max() <= 1e-4 * other.abs().max()


def _tried(seed: int) -> PruneResult | None:
    """Prune the network of `seed`, and hold it against the oracle; None where it is refused in one line."""
    model, batches = _network(seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"scorer": "random", "repair": (), "round_to": 1, "seed": seed}
    try:
        slim = compress_module(model, batches[0][:1], batches, 0.3, **options)
    except PxError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "\n" not in message
        return None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _assert_same(_outputs(slim.pruned.dense, batches[1]), _outputs(model, batches[1]))
    _assert_same(_outputs(slim.pruned.model, batches[1]), _outputs(_silenced(slim), batches[1]))
    sizes = [sum(each.numel() for each in net.parameters()) for net in (slim.pruned.model, slim.pruned.dense, model)]
    assert sizes[0] < sizes[1] <= sizes[2]
    return slim


@pytest.mark.parametrize("seed", range(FEW))
def test_a_few_random_networks(seed: int) -> None:
    _tried(seed)


@pytest.mark.slow
def test_many_random_networks() -> None:
    pruned = [seed for seed in range(FEW, FEW + MANY) if _tried(seed) is not None]
    assert len(pruned) > 0.75 * MANY


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_alone(name: str) -> None:
    with seeded(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = randomised(Network([name, "convolution"], "logits", random.Random(1))).eval()
        batches = [torch.randn(4, 3, 16, 16) for _ in range(2)]
        model(batches[0])
    slim = compress_module(model, batches[0][:1], batches, 0.2, scorer="random", repair=(), round_to=1)
    _assert_same(_outputs(slim.pruned.dense, batches[1]), _outputs(model, batches[1]))
    _assert_same(_outputs(slim.pruned.model, batches[1]), _outputs(_silenced(slim), batches[1]))
