"""Fine-tuning towards the dense model: its steps, its options, and what it never makes worse."""

from __future__ import annotations

import math
from itertools import combinations, islice

import pytest
import torch
import torch.nn.functional as F
from models import batches_of, plan_of, random_plan
from models import subject as subject_named
from tuning import CLASSES, INPUTS, data, divergence, equal, images, near, net, pair, small_cnn, state, top1, tuned

from pxcompress.cost.count import count_macs
from pxcompress.errors import DataError, InputError, ResultError
from pxcompress.graph import prune
from pxcompress.passes import shuffled
from pxcompress.recipe import Recipe
from pxcompress.repair import finetune
from pxcompress.types import Pruned

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_slim_model_comes_nearer_to_the_dense_one() -> None:
    pruned, fresh = pair(), data(400, 100, seed=1)
    before = divergence(pruned, fresh)
    tuned("learning_rate=0.05,steps=60", pruned, data(256, 64))
    assert divergence(pruned, fresh) < 0.3 * before


@pytest.mark.parametrize("labels", [False, True])
def test_steps_are_those_of_a_plain_loop(labels: bool) -> None:
    """All samples in one batch, so that their order does not matter."""
    batches = data(20, 20)
    options = f"labels={labels},temperature=3,steps=8,learning_rate=0.01,batch_size=20"
    result = state(tuned(options, pair(), batches))
    twin = pair()
    (inputs, classes), parameters = batches[0], list(twin.model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    target = (twin.dense(inputs) / 3).softmax(1).detach()
    for step in range(8):
        rate = (1 + math.cos(math.pi * step / 8)) / 2  # the rise takes less than a step
        logits = twin.model(inputs)
        soft = -9 * (target * (logits / 3).log_softmax(1)).sum(1).mean()  # the same gradient as 9 KL
        hard = F.cross_entropy(logits, classes) if labels else 0.0
        gradients = torch.autograd.grad(soft + hard, parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / max(float(norm), 1.0)
        optimizer.param_groups[0]["lr"] = 0.01 * rate
        optimizer.step()
    expected = state(twin)
    for name, value in result.items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("samples", "affordable", "steps"), [(8, 0, 10), (9, 0, 12), (40, 0, 20), (8, 15, 15), (9, 1000, 48), (40, 90, 80)]
)
def test_how_long_it_takes_follows_from_the_samples_and_the_models(
    samples: int, affordable: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five passes over them, but no more steps than is usual; up to four times as many where the work allows them."""
    pruned, batches = pair(), data(samples, 4)
    example = batches[0][0][:1]
    work = count_macs(pruned.whole.dense, example) + 3 * count_macs(pruned.model, example)
    monkeypatch.setattr(finetune, "MOST_STEPS", 20)
    monkeypatch.setattr(finetune, "SMALL_WORK", (affordable + 0.5) * 4 * work)
    usual, explicit = (
        state(tuned(f"{text}batch_size=4", pair(), data(samples, 4))) for text in ("", f"steps={steps},")
    )
    assert equal(usual, explicit)


@pytest.mark.parametrize("labels", [False, True])
def test_held_out_samples_are_never_done_worse(labels: bool) -> None:
    """Steps that destroy: the start is the best there is, and comes back bit by bit."""
    options, batches = f"labels={labels},steps=3,learning_rate=1", data(64, 64)
    start = near()
    held_out = [(inputs, start.model(inputs).argmax(1)) for inputs, _ in data(30, 8, seed=1)]  # all right at the start
    last = tuned(options, near(), batches)
    assert divergence(last, held_out) > divergence(start, held_out)
    assert top1(last, held_out) < 1
    assert equal(state(tuned(options, near(), batches, held_out)), state(start))


def test_a_rate_that_is_too_high_is_lowered_until_it_helps() -> None:
    """Without held-out samples nothing tells that it is too high."""
    options, batches, held_out = "learning_rate=1,steps=120", data(256, 64), data(200, 50, seed=1)
    start = divergence(near(), held_out)
    assert divergence(tuned(options, near(), batches), held_out) > 2 * start
    assert divergence(tuned(options, near(), batches, held_out), held_out) < 0.5 * start


def test_a_rate_that_is_too_high_is_found_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps after it was raised, long before the next of the checks that are spread over a training."""
    monkeypatch.setattr(finetune, "CHECKS", 1)
    options, batches, held_out = "learning_rate=1,steps=120", data(256, 64), data(200, 50, seed=1)
    start = divergence(near(), held_out)
    assert divergence(tuned(options, near(), batches, held_out), held_out) < 0.7 * start
    monkeypatch.setattr(finetune, "TRIAL", 121)
    assert divergence(tuned(options, near(), batches, held_out), held_out) == start


@pytest.mark.parametrize(
    ("errors", "lowered_at"),
    [
        ([1.0] * 14, [40, 70, 90, 100, 110]),
        ([1.0, 0.5, 1.4] + [0.6] * 12, [20, 60, 80, 100, 110]),
        ([1.0, 1.2, 1.1, 0.9] + [1.4] * 10, []),
    ],
)
def test_a_rate_that_gained_nothing_in_a_third_of_the_steps_is_lowered(
    errors: list[float], lowered_at: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little the error rose; with 120 steps, checks are made at the twelfth, in every tenth, and at the end."""
    seen = iter(errors)
    monkeypatch.setattr(finetune.Validation, "__call__", lambda *_: next(seen))
    begun: list[int] = []
    begin = finetune._Training._begin_attempt

    def note(training: finetune._Training) -> None:
        begun.append(training._progress.step)
        begin(training)

    monkeypatch.setattr(finetune._Training, "_begin_attempt", note)
    tuned("steps=120", near(), data(64, 64), data(32, 32, seed=1))
    assert begun == lowered_at


def test_the_best_weights_on_held_out_samples_are_kept() -> None:
    batches, held_out = data(32, 32), data(200, 50, seed=1)
    better = 0
    for rate, steps in ((0.03, 40), (0.3, 300)):  # too slow, and overfitting
        options = f"learning_rate={rate},steps={steps},batch_size=64"
        last, best = tuned(options, pair(), batches), tuned(options, pair(), batches, held_out)
        assert divergence(best, held_out) <= min(divergence(last, held_out), divergence(pair(), held_out)) + 1e-6
        better += not equal(state(best), state(last))
    assert better == 1


@pytest.mark.parametrize(
    "change",
    [
        "labels=true",
        "temperature=1",
        "steps=4",
        "learning_rate=0.002",
        "batch_size=7",
        "accumulate=2",
        "augment=false",
        "precision=bf16",
    ],
)
def test_every_option_has_an_effect(change: str) -> None:
    usual = {"steps": "3", "batch_size": "6"}
    results = []
    for options in (usual, usual | dict([change.split("=")])):
        text = ",".join(f"{key}={value}" for key, value in options.items())
        results.append(state(tuned(text, small_cnn(), images(12, 4))))
    assert not equal(*results)
    assert all(value.dtype == results[0][name].dtype for name, value in results[1].items())


def test_accumulated_batches_are_one_large_one() -> None:
    batches = data(24, 24)
    parts = state(tuned("batch_size=4,accumulate=3,steps=5,learning_rate=0.01", pair(), batches))
    whole = state(tuned("batch_size=12,steps=5,learning_rate=0.01", pair(), batches))
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, rtol=1e-4, atol=1e-5), name


def test_it_does_not_matter_how_samples_are_batched() -> None:
    results = [state(tuned("steps=5,batch_size=8", pair(), data(30, size))) for size in (30, 7, 1)]
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_the_seed_decides() -> None:
    batches = data(30, 10)
    before = torch.random.get_rng_state()
    results = [state(tuned("steps=3,batch_size=8", pair(), batches, seed=seed)) for seed in (1, 1, 2)]
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_labels_matter_only_where_they_are_asked_for() -> None:
    batches, held_out = data(40, 10), data(30, 10, seed=1)
    wrong = [[(inputs, labels * 0 + 99) for inputs, labels in part] for part in (batches, held_out)]
    assert equal(state(tuned("steps=5", pair(), batches, held_out)), state(tuned("steps=5", pair(), *wrong)))
    for label, named in ((99, "99"), (-1, "-1"), (CLASSES, str(CLASSES))):
        odd = [(inputs, labels * 0 + label) for inputs, labels in batches]
        with pytest.raises(DataError, match=f"label {named} for a model of 4 classes; expected 0 to 3"):
            tuned("labels=true", pair(), odd)


def test_following_labels_learns_them() -> None:
    batches = data(64, 64)
    pruned = tuned("labels=true,temperature=0.1,learning_rate=0.1,steps=120", pair(), batches)
    assert top1(pruned, batches) > 0.5 > top1(pair(), batches) + 0.2


def test_frozen_parameters_and_statistics_stay() -> None:
    pruned = pair()
    pruned.model.train()
    frozen = pruned.model[0].weight.requires_grad_(False)
    before = state(pruned)
    tuned("steps=3", pruned, data(20, 10))
    changed = {name for name, value in pruned.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in pruned.model.parameters())
    assert pruned.model[1].training


def test_a_gradient_that_was_there_before_does_not_count() -> None:
    clean, dirty = pair(), pair()
    for parameter in dirty.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert equal(state(tuned("steps=2", clean, data(20, 10))), state(tuned("steps=2", dirty, data(20, 10))))


def test_a_model_without_trainable_parameters_is_returned_as_it_is() -> None:
    pruned = pair()
    pruned.model.requires_grad_(False)
    before = state(pruned)
    assert tuned("", pruned, data(20, 10)) is pruned
    assert equal(state(pruned), before)


def test_the_target_is_the_model_before_all_rounds() -> None:
    whole = pair()
    later = Pruned(net(5), net(9), (), plan_of({}), first=Pruned(whole.model, whole.dense, (), plan_of({})))
    assert equal(state(tuned("steps=3", later, data(20, 10))), state(tuned("steps=3", whole, data(20, 10))))


def test_images_are_moved_anew_each_time() -> None:
    pruned, seen = small_cnn(), [images(1, 1)[0][0]]
    pruned.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    tuned("steps=3", pruned, images(1, 1))
    assert len(seen) == 4
    assert not any(torch.equal(one, other) for one, other in combinations(seen, 2))


def test_only_images_are_moved() -> None:
    subject = subject_named("conv1d")
    results = []
    for augment in ("true", "false"):
        pruned = prune(subject.model, subject.groups, random_plan(subject.groups, 1))
        results.append(state(tuned(f"steps=2,augment={augment}", pruned, batches_of(subject.inputs, 3))))
    assert equal(*results)


def test_it_may_be_called_where_gradients_are_off() -> None:
    pruned = pair()
    before = state(pruned)
    with torch.no_grad():
        tuned("steps=2", pruned, data(20, 10))
    assert not equal(state(pruned), before)


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no sample to fine-tune on"):
        tuned("", pair(), [])


def test_divergence_is_told() -> None:
    batches = [(torch.full((8, INPUTS), float("nan")), torch.zeros(8, dtype=torch.int64))]
    message = r"diverged at step 1 \(loss nan, norm of the gradient nan\); give a learning_rate below 0.5"
    with pytest.raises(ResultError, match=message):
        tuned("learning_rate=0.5", pair(), batches)
    with pytest.raises(ResultError, match="diverged at step 1"):  # the only step; there is no loss after it
        tuned("steps=1", pair(), [(torch.full((8, INPUTS), 1e30), torch.zeros(8, dtype=torch.int64))])


def test_it_comes_after_the_closed_form_repairs() -> None:
    Recipe("resnet50", 0.5, repair=("fold", "batchnorm", "finetune"))
    with pytest.raises(InputError, match="'finetune' stands before 'batchnorm'"):
        Recipe("resnet50", 0.5, repair=("fold", "finetune", "batchnorm"))


@pytest.mark.parametrize("pool", [1, 10, 1024])
def test_every_epoch_has_all_samples_in_a_new_order(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffled, "SHUFFLE_POOL", pool)
    batches = [(torch.arange(start, start + 5)[:, None], torch.arange(start, start + 5)) for start in range(0, 25, 5)]
    feed = shuffled.ShuffledBatches(batches, 25, 4, 0)
    drawn = list(islice(feed.iterate_from(0), 18))  # three epochs of six
    assert all(len(labels) == 4 and torch.equal(inputs[:, 0], labels) for inputs, labels in drawn)
    epochs = [torch.cat([labels for _, labels in drawn[start : start + 6]]).tolist() for start in (0, 6, 12)]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for start_step in (1, 6, 8):
        later = list(islice(feed.iterate_from(start_step), 18 - start_step))
        assert all(torch.equal(one[1], other[1]) for one, other in zip(later, drawn[start_step:], strict=True))
