"""compress_module on modules that do not take one image and return its class scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CLASSES, FlattenCNN, snapshot
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from user_modules import USER_MODULES, Segmentation, Sequences, Several, Text, TwoInputs

from pxcompress import InputError, compress_module
from pxcompress.cost.count import count_params
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.runtime import open_session
from pxcompress.graph import mask_units
from pxcompress.models.adapter import adapt_module, named_outputs
from pxcompress.state import seeded
from pxcompress.types import PruneResult


def _called(model: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _same(outputs: Any, expected: Any, tolerance: float) -> None:
    """The same structure, shapes and types, and values within a share of each tensor's scale."""
    leaves, structure = tree_flatten(outputs)
    others, other_structure = tree_flatten(expected)
    assert structure == other_structure
    for leaf, other in zip(leaves, others, strict=True):
        assert (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        if leaf.is_floating_point():
            assert (leaf - other).abs().max() <= tolerance * other.abs().max()


@pytest.fixture(params=list(USER_MODULES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, list[Any]]:
    """A module in eval mode, one input, and batches without labels."""
    build, draw = USER_MODULES[request.param]
    with seeded(4):
        model = build().eval()
        return model, draw(1), [(draw(8), None) for _ in range(3)]


def test_removal_is_zeroing_on_all_outputs(case: tuple[nn.Module, Any, list[Any]]) -> None:
    model, example, batches = case
    before = snapshot(model)
    slim = compress_module(model, example, batches, 0.4, round_to=1, scorer="random", budget="params", repair=())
    assert snapshot(model) == before
    assert type(slim.pruned.model) is type(slim.pruned.dense) is type(model)
    assert set(slim.pruned.plan.removed) <= {name for name, _ in model.named_modules()}
    assert count_params(slim.pruned.model) == slim.pruned.plan.cost_planned < count_params(model)
    expected = _called(mask_units(model, slim.pruned.groups, slim.pruned.plan), batches[0][0])
    _same(_called(slim.pruned.model, batches[0][0]), expected, 1e-5)


def test_scores_and_repairs_work_on_what_the_module_returns(case: tuple[nn.Module, Any, list[Any]]) -> None:
    model, example, batches = case
    repair = ("fold", "least-squares")
    repaired = compress_module(model, example, batches, 0.3, round_to=1, budget="params", repair=repair)
    bare = compress_module(model, example, batches, 0.3, round_to=1, budget="params", repair=())
    assert all(torch.isfinite(values).all() and values.any() for values in repaired.scores.values())
    whole = _called(model, batches[0][0])
    _same(_called(repaired.pruned.model, batches[0][0]), whole, torch.inf)
    assert _distance(repaired, whole, batches[0][0]) < _distance(bare, whole, batches[0][0])


def test_logits_say_which_output_counts() -> None:
    with seeded(4):
        model = Several().eval()
        batches = [torch.randn(8, 3, 12, 12) for _ in range(3)]
    example = batches[0][:1]
    scores = compress_module(model, example, batches, 0.3, logits=lambda out: out["box"], scorer="lrp-residual").scores
    assert not scores["hidden"].any()
    assert scores["conv1"].all()
    labelled = [(inputs, torch.arange(8) % CLASSES) for inputs in batches]
    slim = compress_module(
        model,
        example,
        labelled,
        0.3,
        logits=lambda out: out["class"],
        held_out=[],
        scorer="taylor",
        class_scores=True,
    )
    assert slim.class_relevance is not None
    assert slim.class_relevance.samples == (6, 6, 6, 3, 3)
    assert slim.scores["hidden"].any()


def test_features_that_are_an_output_stay_whole() -> None:
    model = Several().eval()
    slim = compress_module(model, torch.randn(1, 3, 12, 12), [torch.randn(4, 3, 12, 12)], 0.3, scorer="random")
    assert {group.name for group in slim.structure.groups} == {"conv1", "hidden"}
    assert "conv2" in {layer.name for layer in slim.structure.fixed}


def test_one_number_out_counts_by_its_size() -> None:
    with seeded(4):
        model = nn.Sequential(FlattenCNN(), nn.Linear(CLASSES, 1)).eval()
        batches = [torch.randn(8, 3, 12, 12) for _ in range(3)]
    slim = compress_module(model, batches[0][:1], batches, 0.3, round_to=1)
    with torch.no_grad():
        assert slim.pruned.model(batches[0]).isfinite().all()


def test_labels_make_no_difference_where_none_are_needed() -> None:
    with seeded(4):
        model = FlattenCNN().eval()
        inputs = [torch.randn(8, 3, 12, 12) for _ in range(3)]
    labelled = [[each, torch.zeros(8, dtype=torch.int64)] for each in inputs]
    plans = [
        compress_module(model, inputs[0][:1], batches, 0.3, round_to=1, repair=()).pruned.plan
        for batches in (inputs, labelled)
    ]
    assert plans[0] == plans[1]


def test_a_traced_module_and_class_scores_in_a_dict_take_labels() -> None:
    with seeded(4):
        model = FlattenCNN().eval()
        batches = [(torch.randn(8, 3, 12, 12), torch.arange(8) % CLASSES) for _ in range(3)]
    named = nn.Sequential(model, Odd(lambda x: {"class": x}, nn.Identity()))
    plans = [
        compress_module(each, batches[0][0][:1], batches, 0.3, scorer="taylor", repair=()).pruned.plan
        for each in (torch.fx.symbolic_trace(model), named)
    ]
    assert [*plans[0].removed.values()] == [*plans[1].removed.values()]


IMAGES = torch.zeros(2, 3, 12, 12)
PAIR = (IMAGES, torch.zeros(2, 6))


class Odd(nn.Module):
    """Returns what its function makes of a layer's output."""

    def __init__(self, function: Any, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.function = layer or nn.Conv2d(3, 4, 3), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


REFUSED: Mapping[str, tuple[nn.Module, Any, Any, dict[str, Any], str]] = {
    "a generator": (Sequences(), torch.zeros(1, 4, 9), iter([]), {}, "read once"),
    "no batch": (Sequences(), torch.zeros(1, 4, 9), [], {}, "batches are empty"),
    "three parts": (TwoInputs(), PAIR, [(*PAIR, None)], {}, "of 3; expected"),
    "inputs that are no tensors": (TwoInputs(), (IMAGES, "text"), [(PAIR, None)], {}, "is a str"),
    "another count of samples": (TwoInputs(), (IMAGES, torch.zeros(3, 6)), [(PAIR, None)], {}, "with one n"),
    "a batch unlike the example": (TwoInputs(), PAIR, [PAIR], {}, "as the example"),
    "two inputs for one": (FlattenCNN(), IMAGES, [((IMAGES, IMAGES), None)], {}, "expected one tensor"),
    "labels here and there": (FlattenCNN(), IMAGES, [(IMAGES, torch.arange(2)), IMAGES], {}, "with all or with none"),
    "a module that does not run": (TwoInputs(), IMAGES, [IMAGES], {}, "does not run on the example"),
    "no tensor out": (Odd(lambda x: "text"), IMAGES, [IMAGES], {}, "returns a str"),
    "no gradient": (Odd(lambda x: x.detach()), IMAGES, [IMAGES], {}, "by gradients"),
    "not finite": (Odd(lambda x: x / 0), IMAGES, [IMAGES], {}, "NaN"),
    "labels that are masks": (Segmentation(), IMAGES, [(IMAGES, IMAGES[:, 0].long())], {"scorer": "taylor"}, "labels"),
    "no labels": (FlattenCNN(), IMAGES, [IMAGES], {"class_scores": True}, "need labels"),
    "logits of a wrong shape": (Segmentation(), IMAGES, [IMAGES], {"logits": lambda out: out}, r"\(n, classes\)"),
    "distillation": (Segmentation(), IMAGES, [IMAGES], {"repair": ("finetune:labels=true",)}, "leave the labels out"),
    "a huge number": (
        Text(),
        {"ids": torch.full((1, 9), 2**30), "mask": torch.ones(1, 9, dtype=torch.bool)},
        [{"ids": torch.ones(1, 9, dtype=torch.int64), "mask": torch.ones(1, 9, dtype=torch.bool)}],
        {},
        r"2\^24",
    ),
    "a scripted module": (
        torch.jit.script(Sequences()),
        torch.zeros(1, 4, 9),
        [torch.zeros(1, 4, 9)],
        {},
        "it is from",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_handled_is_refused_with_one_line(name: str) -> None:
    model, example, batches, options, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as refused:
        compress_module(model, example, batches, 0.3, **options)
    assert "\n" not in str(refused.value)


def _distance(slim: PruneResult, whole: Any, inputs: Any) -> float:
    """Squared error of all outputs, as shares of their power."""
    pairs = zip(tree_flatten(_called(slim.pruned.model, inputs))[0], tree_flatten(whole)[0], strict=True)
    shares = [(a - b).square().sum() / b.square().sum() for a, b in pairs if b.is_floating_point()]
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize(
    "name", [name if name == "two inputs" else pytest.param(name, marks=pytest.mark.slow) for name in USER_MODULES]
)
def test_what_is_timed_for_a_latency_budget_takes_any_batch(name: str, tmp_path: Path) -> None:
    """Several inputs and outputs are packed without a number where the batch size belongs."""
    build, draw = USER_MODULES[name]
    module = adapt_module(build().eval(), draw(1), [(draw(4), None)])
    file = export_onnx(module.model, module.example, tmp_path / "model.onnx", {})
    assert file.input_shape[0] is None
    inputs = torch.cat([module.example] * 3)
    with torch.no_grad():
        expected = named_outputs(module.model, inputs, "logits")
    outputs = open_session(file.path, "cpu").outputs_of(inputs)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, atol=1e-5, rtol=1e-4)


class Fixed(nn.Module):
    """Works for one image at a time, and says two things of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.head, self.box = nn.Linear(64, CLASSES), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)).reshape(len(x), 64)
        return self.head(features), self.box(features)


@pytest.mark.slow
def test_a_latency_budget_needs_one_batch_size_only() -> None:
    """Also where the module's own forward fixes it."""
    inputs = torch.randn(4, 3, 32, 32)
    slim = compress_module(Fixed().eval(), inputs[:1], [(inputs, None)], 0.2, budget="latency", repair=())
    assert slim.pruned.plan.unit == "ms"
    assert slim.pruned.plan.cost_planned <= 0.8 * slim.pruned.plan.cost_dense


def test_fine_tuning_brings_all_outputs_of_any_module_nearer_to_the_dense_one() -> None:
    """Label-free steps for maps, several inputs and several outputs, by their squared error."""
    with seeded(1):
        images, net = torch.randn(32, 3, 12, 12), Segmentation().eval()
    options = {"ratio": 0.5, "round_to": 1, "held_out": [images[24:]]}
    errors = []
    for repair in (("fold",), ("fold", "finetune:steps=60,batch_size=8,learning_rate=0.01,augment=false")):
        with seeded(0):
            slim = compress_module(net, images[:1], [images[:24]], repair=repair, **options)
        with torch.no_grad():
            errors.append(float((slim.pruned.model(images[24:]) - net(images[24:])).square().mean()))
    assert errors[1] < 0.95 * errors[0]
