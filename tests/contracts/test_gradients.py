"""Every layer gets a score, also one that an ordinary backward pass never comes to, from every scorer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, batches_of, plan_of, randomised
from torch import Tensor, nn

from pxcompress.attribution import attributed, parse_composite
from pxcompress.errors import ModelError
from pxcompress.graph import find_groups, prune
from pxcompress.models.adapter import adapt_module
from pxcompress.passes import collect
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS
from pxcompress.state import gradients, seeded
from pxcompress.types import Group, Scores

WITHOUT_GRADIENTS = {"random", "magnitude", "bn-scale", "activation"}
GRADIENT_BASED = [name for name in SCORERS if name not in WITHOUT_GRADIENTS]


class Base(nn.Module):
    """Two convolutions and a classifier; subclasses say what happens between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, stride=2)
        self.head = nn.Linear(6, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))

    def between(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def end(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.between(self.features(x))))


class SoftmaxEnd(Base):
    def end(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class ModuleEnd(Base):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(-1)

    def end(self, logits: Tensor) -> Tensor:
        return self.softmax(logits[:, None]).flatten(1)


class LogEnd(Base):
    def end(self, logits: Tensor) -> Tensor:
        return F.softmax(logits / 1.0, dim=1).log()


class LogSoftmaxEnd(Base):
    def end(self, logits: Tensor) -> Tensor:
        return F.log_softmax(logits, dim=1)


class Views(Base):
    """Probabilities of the image and of its mirror image, averaged."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x).softmax(1) + super().forward(x.flip(3)).softmax(1)) / 2


class Boxes(Base):
    """Numbers as means of a distribution over bins (distribution focal loss), which change the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.box1, self.box2 = nn.Linear(6, 10), nn.Linear(10, 4 * 3)
        self.register_buffer("bins", torch.arange(3.0))

    def between(self, x: Tensor) -> Tensor:
        self.pooled = x.mean((2, 3))
        return self.pooled

    def end(self, logits: Tensor) -> Tensor:
        box = self.box2(F.relu(self.box1(self.pooled))).view(-1, 4, 3).softmax(2)
        return logits + F.pad((box * self.bins).sum(2), (0, CLASSES - 4))


class AttentionPooling(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gate1, self.gate2 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)

    def between(self, x: Tensor) -> Tensor:
        weights = self.gate2(F.relu(self.gate1(x))).flatten(2).softmax(-1)
        return (x.flatten(2) * weights).sum(-1)


class SplitAttention(Base):
    """Two branches weighed against each other by what both of them hold (ResNeSt, SKNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.fc1, self.norm, self.fc2 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)

    def between(self, x: Tensor) -> Tensor:
        both = torch.stack([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        pooled = both.sum(1).mean((2, 3), keepdim=True)
        weights = self.fc2(F.relu(self.norm(self.fc1(pooled)))).view(-1, 2, 6, 1, 1).softmax(1)
        return (both * weights).sum(1).mean((2, 3))


class Queries(Base):
    """Learned queries look at the image; what makes them queries and keys is read by the softmax only (DETR)."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 6))
        self.hidden, self.query = nn.Linear(6, 8), nn.Linear(8, 6)
        self.key1, self.key2, self.value = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        query = self.query(F.relu(self.hidden(self.queries))).expand(len(x), -1, -1)
        key = self.key2(F.relu(self.key1(tokens)))
        return F.scaled_dot_product_attention(query, key, self.value(tokens)).mean(1)


class Positions(Base):
    """Attention with a bias that a small network makes of the tokens' places (Swin V2 CR)."""

    def __init__(self) -> None:
        super().__init__()
        self.place1, self.place2 = nn.Linear(2, 8), nn.Linear(8, 1)
        self.register_buffer("places", torch.randn(16, 16, 2))
        self.value = nn.Linear(6, 6)

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        bias = self.place2(F.relu(self.place1(self.places))).squeeze(-1)
        weights = (tokens @ tokens.transpose(1, 2) / 10 + bias).softmax(-1)
        return (weights @ self.value(tokens)).mean(1)


class Frozen(Base):
    """Features that are not to be trained, read by layers that are."""

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(x)


class Detached(Base):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x).detach()


class Rounded(Base):
    """A gate that is open or closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate1, self.gate2 = nn.Linear(6, 8), nn.Linear(8, 6)

    def between(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return x * self.gate2(F.relu(self.gate1(x))).sigmoid().round()


NETS: Mapping[str, type[Base]] = {
    net.__name__: net
    for net in (
        *(SoftmaxEnd, LogSoftmaxEnd, Views, Boxes, AttentionPooling, SplitAttention, Queries, Positions),
        *(Frozen, Detached, Rounded),
    )
}


@functools.cache
def _subject(kind: type[Base]) -> tuple[nn.Module, tuple[Group, ...], Tensor]:
    """A net with drawn weights, its groups, and inputs (n, ...)."""
    with seeded(1):
        net = randomised(kind()).eval()
        inputs = torch.randn(12, 3, 8, 8)
    whole = Base() if kind in (Frozen, Detached) else net  # the same layers, as groups
    return net, find_groups(whole, inputs[:1], ("head",)).groups, inputs


def _score(scorer: str, kind: type[Base], size: int = 4) -> Scores:
    net, groups, inputs = _subject(kind)
    with seeded(0):
        return SCORERS.build(scorer)(net, groups, batches_of(inputs, size))


@pytest.mark.parametrize("kind", NETS.values(), ids=NETS)
@pytest.mark.parametrize("scorer", [*SCORERS, "lrp:composite=epsilon|softmax=attn", "lrp-residual:metric=inputs"])
def test_no_layer_is_free_to_remove(scorer: str, kind: type[Base]) -> None:
    _, groups, _ = _subject(kind)
    scores = _score(scorer, kind)
    assert set(scores) == {group.name for group in groups} >= {"conv1"}
    for name, values in scores.items():
        assert values.isfinite().all(), name
        assert float(values.abs().max()) > 0, name
        assert len(set(values.tolist())) > 1, name


def test_the_nets_have_the_layers_that_they_are_there_for() -> None:
    expected = {AttentionPooling: "gate1", SplitAttention: "fc1", Queries: "hidden", Positions: "place1", Boxes: "box1"}
    for kind, name in (expected | {Rounded: "gate1", Detached: "conv1", Frozen: "conv1"}).items():
        assert name in {group.name for group in _subject(kind)[1]}


@pytest.mark.parametrize("scorer", GRADIENT_BASED)
@pytest.mark.parametrize("kind", [SoftmaxEnd, ModuleEnd, LogEnd, LogSoftmaxEnd])
def test_a_softmax_at_the_end_changes_no_score(kind: type[Base], scorer: str) -> None:
    """Scores start at the logits, however sure the model is."""
    expected = _score(scorer, Base)
    for name, values in _score(scorer, kind).items():
        assert torch.allclose(values, expected[name], rtol=1e-5), name


class OutOfPlace(Base):
    def between(self, x: Tensor) -> Tensor:
        x = (x + F.relu(self.conv3(x))).sigmoid()
        return (x * self.conv4(x)).clamp(max=2).mean((2, 3))

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.conv4 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)


class InPlace(OutOfPlace):
    """Code for inference only: it overwrites what a gradient is computed from."""

    def between(self, x: Tensor) -> Tensor:
        x.add_(F.relu(self.conv3(x))).sigmoid_()
        x *= self.conv4(x)
        return x.clamp_(max=2).mean((2, 3))


@pytest.mark.parametrize("scorer", GRADIENT_BASED)
def test_changes_in_place_change_no_score(scorer: str) -> None:
    expected = _score(scorer, OutOfPlace)
    for name, values in _score(scorer, InPlace).items():
        assert torch.allclose(values, expected[name], rtol=1e-4), name


def test_copies_of_what_changes_in_place_last_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch knows saved tensors by their place in memory, where those of another batch may lie."""
    blocks: list[bool] = []

    def counted(enabled: bool = True) -> AbstractContextManager[None]:
        blocks.append(enabled)
        return gradients(enabled)

    monkeypatch.setattr(collect, "gradients", counted)
    net, groups, inputs = _subject(InPlace)
    SCORERS.build("taylor")(net, groups, batches_of(inputs, 4))
    assert blocks == [True] * 3


def test_least_squares_of_a_net_that_changes_in_place_is_the_same() -> None:
    weights = []
    for kind in (OutOfPlace, InPlace):
        net, groups, inputs = _subject(kind)
        plan = plan_of({group.name: range(group.units // 2) for group in groups})
        pruned = REPAIRS.build("least-squares")(prune(net, groups, plan), batches_of(inputs, 4))
        weights.append(torch.cat([value.detach().flatten() for value in pruned.model.parameters()]))
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scorer", ["lrp-residual", "lrp"])
def test_a_segmenter_that_ends_in_softmax_is_scored_by_its_logits(scorer: str) -> None:
    def built(end: Callable[[Tensor], Tensor]) -> Scores:
        class Segmenter(Base):
            def forward(self, x: Tensor) -> Tensor:
                return end(self.head(self.features(x).movedim(1, -1)).movedim(-1, 1))

        with seeded(1):
            net, inputs = randomised(Segmenter()).eval(), torch.randn(8, 3, 8, 8)
            module = adapt_module(net, inputs[:1], list(inputs.split(4)))
        groups = find_groups(module.model, module.example, ("head",)).groups
        return SCORERS.build(scorer)(module.model, groups, module.batches)

    plain, ends = built(lambda logits: logits), built(lambda logits: F.interpolate(logits.softmax(1), scale_factor=1))
    for name, values in ends.items():
        assert torch.allclose(values, plain[name], rtol=1e-4), name


def _multipliers(net: nn.Module, inputs: Tensor, layer: str, composite: str | None) -> tuple[Tensor, Tensor]:
    """Multipliers at the input of the net, and at the output of a layer."""
    with attributed(net, parse_composite(composite) if composite else None, inputs[:1]) as twin:
        outputs: list[Tensor] = []
        twin.model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
        x = inputs.clone().requires_grad_()
        logits = twin.model(x)
        start = F.one_hot(logits.argmax(1), CLASSES).float()
        return torch.autograd.grad(logits, (x, outputs[0]), start)


def test_a_gate_has_the_gradient_through_the_softmax() -> None:
    """The ordinary one: epsilon-LRP of a net of ReLUs is its gradient."""
    for kind, layer in ((AttentionPooling, "gate2"), (SplitAttention, "fc2"), (Queries, "key2")):
        net, _, inputs = _subject(kind)
        _, multipliers = _multipliers(net, inputs, layer, "epsilon")
        _, expected = _multipliers(net, inputs, layer, None)
        assert torch.allclose(multipliers, expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max())), layer


class ConstantWeights(AttentionPooling):
    def between(self, x: Tensor) -> Tensor:
        weights = self.gate2(F.relu(self.gate1(x.detach()))).flatten(2).softmax(-1)
        return (x.flatten(2) * weights.detach()).sum(-1)


class MixedScores(Positions):
    """A gate's result meets tokens that something else reads as well."""

    constant = False

    def between(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        read = tokens.detach() if self.constant else tokens
        places = self.place2(F.relu(self.place1(self.places))).squeeze(-1)
        weights = (torch.tanh(read @ read.transpose(1, 2)) * places + read.sum(-1, keepdim=True)).softmax(-1)
        return ((weights.detach() if self.constant else weights) @ self.value(tokens)).mean(1)


class ConstantScores(MixedScores):
    constant = True


@pytest.mark.parametrize(
    ("kind", "constant_kind"), [(AttentionPooling, ConstantWeights), (MixedScores, ConstantScores)]
)
def test_gates_take_no_relevance_from_what_they_read(kind: type[Base], constant_kind: type[Base]) -> None:
    """Attention weights are constants for all layers that something else reads as well."""
    net, _, inputs = _subject(kind)
    constant = constant_kind()
    constant.load_state_dict(net.state_dict())
    multipliers, _ = _multipliers(net, inputs, "conv2", "epsilon")
    expected, _ = _multipliers(constant.eval(), inputs, "conv2", "epsilon")
    assert torch.allclose(multipliers, expected, rtol=1e-4, atol=1e-6)
    if kind is MixedScores:
        assert float(_multipliers(net, inputs, "place2", "epsilon")[1].abs().max()) > 0


class UsedInside(Base):
    """Probabilities that are an output, and weigh features on their way to the other one."""

    def end(self, logits: Tensor) -> Tensor:
        chances = logits.softmax(1)
        return chances + chances @ self.head.weight @ self.head.weight.T


def test_a_softmax_that_the_model_reads_itself_stays() -> None:
    for kind, stays in ((UsedInside, True), (SoftmaxEnd, False)):
        net, _, inputs = _subject(kind)
        with attributed(net, None, inputs[:1]) as twin:
            assert torch.allclose(twin.model(inputs.clone().requires_grad_()), net(inputs), atol=1e-5) == stays


def test_what_nothing_comes_back_from_stands_for_the_whole_output() -> None:
    """Relevance of the detached features is the logit, sample by sample."""
    net, _, inputs = _subject(Detached)
    with attributed(net, None, inputs[:1]) as twin:
        outputs: list[Tensor] = []
        twin.model.conv2.register_forward_hook(lambda module, args, output: outputs.append(output))
        logits = twin.model(inputs.clone().requires_grad_())
        start = F.one_hot(logits.argmax(1), CLASSES).float()
        (m,) = torch.autograd.grad(logits, outputs, start)
    assert torch.allclose((outputs[0] * m).sum((1, 2, 3)), logits.amax(1), rtol=1e-4)


def test_a_model_that_returns_classes_is_refused() -> None:
    class Decides(Base):
        def end(self, logits: Tensor) -> Tensor:
            return F.one_hot(logits.argmax(1), CLASSES).float()

    net = randomised(Decides()).eval()
    with pytest.raises(ModelError, match="logits, not classes"), attributed(net, None, torch.randn(1, 3, 8, 8)):
        pass
