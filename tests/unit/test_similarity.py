"""What a run says of explanations: how alike those of the dense and the pruned model are, and never an error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from models import CLASSES, SMALL, batches_of, snapshot
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.clock import Clock
from pxcompress.demo.nets import spiral_mlp
from pxcompress.errors import ResultError
from pxcompress.explain.heatmaps import Method, heatmaps
from pxcompress.explain.metrics import SIMILARITIES, cosine
from pxcompress.explain.similarity import SAMPLES, compare_explanations, explanation_similarity, get_composite
from pxcompress.graph import prune
from pxcompress.notes import silent
from pxcompress.state import seeded
from pxcompress.types import Plan, Pruned

SCORER = "lrp:composite=gamma"


def pruned_of(name: str) -> Pruned:
    """The subject `name` without the first unit of each group."""
    subject = subject_named(name)
    plan = Plan({group.name: (0,) for group in subject.groups}, "channels", "units", 0.0, 0.0, 0.0)
    return prune(subject.model, subject.groups, plan)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_the_mean_over_samples_one_by_one(name: str) -> None:
    pruned, inputs = pruned_of(name), subject_named(name).inputs
    before = snapshot(pruned.dense), snapshot(pruned.model)
    method = Method(composite="gamma")
    similarity = explanation_similarity(pruned, method, batches_of(inputs, 4))
    assert (snapshot(pruned.dense), snapshot(pruned.model)) == before
    rows: list[Tensor] = []
    for x in inputs.split(1):
        target = pruned.dense(x).argmax(1).detach()
        maps = [heatmaps(model, x, target, method).flatten(1) for model in (pruned.dense, pruned.model)]
        rows.append(torch.cat([measure(*maps) for measure in SIMILARITIES.values()]))
    expected = torch.stack(rows).mean(0).tolist()
    assert [similarity.cosine, similarity.rank_correlation, similarity.top_overlap] == pytest.approx(expected, abs=2e-3)
    assert (similarity.samples, similarity.composite) == (len(inputs), "gamma")


def test_a_model_is_like_itself_and_few_samples_are_read() -> None:
    model = subject_named("flatten_cnn").model
    read = []

    class Batches:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(100):
                read.append(number)
                yield torch.randn(20, 3, 32, 32), torch.zeros(20, dtype=torch.int64)

    clock = Clock(silent)
    similarity, notes = compare_explanations(replace(pruned_of("flatten_cnn"), model=model), Batches(), SCORER, clock)
    assert similarity is not None
    assert (similarity.samples, similarity.composite, notes) == (SAMPLES, "gamma", ())
    assert (similarity.cosine, similarity.rank_correlation, similarity.top_overlap) == pytest.approx((1, 1, 1))
    assert read == [0, 1]
    assert [stage.name for stage in clock.stages] == ["compare explanations"]


def test_inputs_without_channels_have_a_relevance_for_every_feature() -> None:
    with seeded(0):
        models = [spiral_mlp().eval() for _ in range(2)]
        inputs = torch.randn(8, 2)
    pruned = replace(pruned_of("flatten_cnn"), dense=models[0], model=models[1])
    similarity = explanation_similarity(pruned, Method(), batches_of(inputs, 8))
    assert similarity.samples == 8
    assert -1 <= similarity.cosine < 1
    maps = heatmaps(models[0], inputs, torch.zeros(8, dtype=torch.int64), Method())
    assert maps.shape == (8, 2)


def test_a_model_that_looks_elsewhere_is_said_once() -> None:
    """Half-way between the maps of other samples and the same maps."""
    inputs, told = torch.randn(8, 3, 32, 32), []
    pruned = pruned_of("flatten_cnn")
    with seeded(5):
        other = copy.deepcopy(pruned.dense)
        for parameter in other.parameters():
            nn.init.normal_(parameter)
    clock = Clock(told.append)
    alike, notes = compare_explanations(replace(pruned, model=other), batches_of(inputs, 4), SCORER, clock)
    assert alike is not None
    assert alike.cosine < alike.least_cosine == (1 + alike.unrelated) / 2
    assert len(notes) == 1
    assert notes[0].text.startswith("THE SLIM MODEL LOOKS ELSEWHERE: ")
    assert f"cosine of {alike.cosine:.2f}; below {alike.least_cosine:.2f}" in notes[0].text
    assert told.count(notes[0].text) == 1


def test_maps_of_other_samples_are_those_of_the_dense_model() -> None:
    pruned, inputs = pruned_of("flatten_cnn"), torch.randn(5, 3, 32, 32)
    targets = pruned.dense(inputs).argmax(1).detach()
    maps = heatmaps(pruned.dense, inputs, targets, Method()).flatten(1)
    expected = torch.stack([cosine(maps[i : i + 1], maps[i - 1 : i or None]) for i in range(5)]).mean()
    for size in (2, 5):
        similarity = explanation_similarity(pruned, Method(), batches_of(inputs, size))
        assert similarity.unrelated == pytest.approx(float(expected), abs=1e-3)
    assert explanation_similarity(pruned, Method(), batches_of(inputs[:1], 1)).unrelated == 0


class Cut(nn.Linear):
    """Nothing can be propagated back through it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3))).detach()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(Cut(3, CLASSES)), "does not follow its input by gradients"),
        (nn.Flatten(), "runs no convolution or linear layer"),
    ],
)
def test_what_cannot_be_explained_is_a_note(model: nn.Module, reason: str) -> None:
    pruned = replace(pruned_of("flatten_cnn"), model=model)
    similarity, notes = compare_explanations(pruned, batches_of(torch.randn(6, 3, 32, 32), 6), SCORER, Clock(silent))
    assert similarity is None
    assert len(notes) == 1
    assert notes[0].text.startswith("explanations of the two models could not be compared: ")
    assert reason in notes[0].text


def test_relevance_that_is_no_number_is_refused() -> None:
    inputs = torch.cat([torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), torch.nan)])
    with pytest.raises(ResultError, match="relevance under the rules 'epsilon' is not finite"):
        explanation_similarity(pruned_of("flatten_cnn"), Method(), batches_of(inputs, 2))


def test_rules_are_those_of_the_scorer() -> None:
    assert get_composite(SCORER) == "gamma"
    assert get_composite("magnitude") == "epsilon"
