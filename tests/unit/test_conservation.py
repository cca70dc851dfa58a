"""Relevance in and out of every layer, as `inspect --relevance` shows it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from command import Px, one_line
from models import snapshot
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.attribution import COMPOSITES, RULES
from pxcompress.errors import InputError
from pxcompress.inspection.conservation import SAMPLES, Conservation, conservation, random_images, to_table
from pxcompress.state import seeded


def _chain(*, bias: bool, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    with seeded(1):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=bias), activation(), nn.Flatten(), nn.Linear(6 * 36, 4, bias=bias)
        ).eval()


def _images(samples: int = 5) -> Tensor:
    return random_images((3, 8, 8), samples)


def test_without_biases_nothing_is_absorbed() -> None:
    record = conservation(_chain(bias=False), _images(), "epsilon")
    assert [row.name for row in record.layers] == ["0", "3"]
    for row in record.layers:
        assert row.relevance_out == pytest.approx(1, abs=1e-4)
        assert row.absorbed == pytest.approx(0, abs=1e-4)
    assert not record.unruled


def test_biases_absorb_their_share_of_the_logit() -> None:
    model = _chain(bias=True)
    inputs = _images()
    with torch.no_grad():
        logits = model(inputs)
    total = logits.amax(1).sum()
    record = conservation(model, inputs)
    assert record.relevance == pytest.approx(float(total) / len(inputs), rel=1e-5)
    last = record.layers[-1]
    expected = float(model[3].bias.detach()[logits.argmax(1)].sum() / total)
    assert last.absorbed == pytest.approx(expected, abs=1e-4)
    assert record.layers[0].relevance_out == pytest.approx(last.relevance_in, abs=1e-5)


@pytest.mark.parametrize("composite", list(COMPOSITES))
def test_every_composite_has_its_text_in_the_record(composite: str) -> None:
    record = conservation(_chain(bias=True), _images(2), composite)
    assert record.composite == composite
    for row in record.layers:
        assert row.absorbed == row.relevance_out - row.relevance_in
        assert row.rule.partition("(")[0] in RULES


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def test_what_has_no_rule_is_counted_with_its_share() -> None:
    record = conservation(_chain(bias=True, activation=_Sine), _images())
    (row,) = record.unruled
    assert (row.module, row.kind, row.function, row.calls) == ("1", "_Sine", "sin", 1)
    assert row.share == pytest.approx(record.layers[-1].relevance_in, abs=1e-4)
    assert row.size is not None
    assert row.share is not None
    assert row.size >= abs(row.share)
    assert "sin x 1 in _Sine" in to_table(record)


@pytest.mark.parametrize("name", ["resnet_basic", "vit", "convnext"])
def test_architectures_are_left_untouched_and_give_json(name: str) -> None:
    subject = subject_named(name)
    before = snapshot(subject.model)
    record = conservation(subject.model, subject.inputs, weights="untrained")
    assert snapshot(subject.model) == before
    content = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))
    assert len(content["layers"]) == len(record.layers) > 3
    table = to_table(record)
    assert all(row.name in table and row.rule in table for row in record.layers)
    assert "untrained weights" in table


def test_at_most_so_many_samples_are_kept() -> None:
    assert conservation(_chain(bias=True), _images(SAMPLES + 3)).samples == SAMPLES


def test_random_images_are_seeded() -> None:
    assert torch.equal(random_images((3, 4, 4)), random_images((3, 4, 4)))
    assert not torch.equal(random_images((3, 4, 4)), random_images((3, 4, 4), seed=1))


def test_no_relevance_is_one_clear_line() -> None:
    model = _chain(bias=False)
    nn.init.zeros_(model[3].weight)
    with pytest.raises(InputError, match="no relevance to follow; give weights") as caught:
        conservation(model, _images())
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="did you mean"):
        conservation(model, _images(), "epsilom")


SMALL = ("inspect", "--model", "resnet10t", "--input-size", "32")


def test_command_adds_relevance(px: Px) -> None:
    assert "relevance" not in json.loads(px(*SMALL, "--json").out)
    outcome = px(*SMALL, "--relevance", "--composite", "gamma", "--json")
    assert outcome.code == 0
    relevance = json.loads(outcome.out)["relevance"]
    assert set(relevance) == {field.name for field in dataclasses.fields(Conservation)}
    assert (relevance["composite"], relevance["inputs"], relevance["samples"]) == ("gamma", "random images", 8)
    table = px(*SMALL, "--relevance", "--composite", "gamma")
    assert table.code == 0
    assert all(layer["name"] in table.out for layer in relevance["layers"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--composite", "gamma"), "--composite has no effect without --relevance"),
        (("--data", "digits"), "--data has no effect without --relevance"),
        (("--relevance", "--data", "digits", "--classes", "7"), "leave one out"),
        (("--relevance", "--composite", "alphabeta(3;1)"), "alpha - beta = 1"),
        (("--relevance", "--data", "digit"), "did you mean digits"),
    ],
)
def test_command_refuses_in_one_line(px: Px, words: tuple[str, ...], message: str) -> None:
    assert message in one_line(px(*SMALL, *words))


def test_methods_list_composites_and_rules(px: Px) -> None:
    out = px("methods").out
    assert all(name in out and text in out for name, text in COMPOSITES.items())
    assert all(str(rule()) in out for rule in RULES.values())
