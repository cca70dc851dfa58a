"""What every registered task promises. A new task is tested by being registered, with an example of its data here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchmetrics.functional.classification import multiclass_jaccard_index

from pxcompress.errors import InputError
from pxcompress.tasks import TASKS
from pxcompress.tasks.agreement import Agreement
from pxcompress.tasks.choice import BY_LAYOUT, check_layout
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.embedding import Embedding
from pxcompress.tasks.keypoints import Keypoints
from pxcompress.tasks.multi_label import MultiLabel
from pxcompress.tasks.neighbours import Neighbours
from pxcompress.tasks.regression import Regression
from pxcompress.tasks.segmentation import Segmentation
from pxcompress.tasks.task import Task

SAMPLES, CLASSES = 12, 5
NAMES = list(TASKS)


def _draw(name: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of a model for `SAMPLES` samples, and targets of the layout that the task reads."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape, generator=draw)

    labels = torch.arange(SAMPLES) % CLASSES
    masks = torch.randint(0, CLASSES, (SAMPLES, 8, 8), generator=draw)
    return {
        "classification": ({"logits": normal(CLASSES)}, labels),
        "agreement": ({"a": normal(4, 3), "b": normal(6)}, torch.zeros(SAMPLES)),
        "segmentation": ({"out": normal(CLASSES, 4, 4), "aux": normal(CLASSES, 2, 2)}, masks),
        "embedding": ({"embedding": normal(16)}, labels),
        "neighbours": ({"embedding": normal(16)}, torch.zeros(SAMPLES)),
        "regression": ({"output": normal(2)}, normal(2)),
        "multi-label": ({"logits": normal(CLASSES)}, (normal(CLASSES) > 0).float()),
        "detection": (_draw_boxes(draw), _draw_targets(draw)),
        "box-agreement": (_draw_boxes(draw), torch.zeros(SAMPLES)),
        "keypoints": _draw_joints(draw),
    }[name]


def _draw_boxes(draw: torch.Generator) -> dict[str, Tensor]:
    """Some boxes on a grid of 16 pixels, moved a little, half of them sure."""
    corner = 16.0 * torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], 1)
    corners = torch.cat([corner + 2, corner + 12], 1) + torch.randn(SAMPLES, 16, 4, generator=draw)
    return {"boxes": corners, "logits": 2 * torch.randn(SAMPLES, 16, CLASSES, generator=draw) - 2}


def _draw_joints(draw: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Boxes as above with three joints each, one of which is marked in no true object."""
    boxes, rows = _draw_boxes(draw), _draw_targets(draw)
    places = boxes["boxes"][:, :, None, :2] + 10 * torch.rand(SAMPLES, 16, 3, 2, generator=draw)
    marked = torch.tensor([1.0, 0, 1])[:, None].expand(SAMPLES, 4, 3, 1)
    areas = (rows[..., 3] - rows[..., 1]) * (rows[..., 4] - rows[..., 2])
    joints = torch.cat([places[:, ::5], marked], 3).flatten(2)
    scores = torch.randn(SAMPLES, 16, 3, 1, generator=draw)
    outputs = {**boxes, "keypoints": torch.cat([places, scores], 3)}
    return outputs, torch.cat([rows, areas[..., None], joints], 2)


def _draw_targets(draw: torch.Generator) -> Tensor:
    """Up to three boxes an image, one of them a crowd, and the frame."""
    boxes = _draw_boxes(draw)["boxes"][:, ::5][:, :3]
    classes = torch.randint(-1, CLASSES, (SAMPLES, 3), generator=draw)
    crowd = (torch.arange(3) == 2).expand(SAMPLES, 3)
    rows = torch.cat([classes[..., None], boxes, crowd[..., None]], 2)
    return torch.cat([rows, torch.tensor([-1.0, 0, 0, 64, 64, CLASSES]).expand(SAMPLES, 1, 6)], 1)


def _perfect(name: str, targets: Tensor) -> dict[str, Tensor]:
    """Outputs that are right on every sample."""
    one_hot = torch.nn.functional.one_hot
    if name in ("detection", "keypoints"):
        rows = targets[:, :-1]
        sure = (rows[..., 0] >= 0) & (rows[..., 5] == 0)
        logits = 9.0 * one_hot(rows[..., 0].long().clamp_min(0), CLASSES) * sure[..., None] - 6
        joints = {"keypoints": rows[..., 7:].unflatten(2, (-1, 3))} if name == "keypoints" else {}
        return {"boxes": rows[..., 1:5], "logits": logits, **joints}
    if name == "segmentation":
        return {"out": 9.0 * one_hot(targets, CLASSES).permute(0, 3, 1, 2)}
    if name in ("classification", "embedding"):
        return {TASKS.build(name).output_name: 9.0 * one_hot(targets.long(), CLASSES)}
    return {"output": targets} if name == "regression" else {"logits": 18 * targets - 9}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_agrees_wholly_with_itself_and_less_with_another(name: str) -> None:
    task, (outputs, _), (others, _) = TASKS.build(name), _draw(name), _draw(name, seed=1)
    assert torch.allclose(task.agreement(outputs, outputs), torch.ones(SAMPLES, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(task.divergence(outputs, outputs), torch.zeros(SAMPLES, dtype=torch.float64), atol=1e-6)
    agreement, divergence = task.agreement(others, outputs), task.divergence(others, outputs)
    assert agreement.shape == divergence.shape == (SAMPLES,)
    assert ((agreement >= 0) & (agreement <= 1)).all()
    assert agreement.mean() < 0.9
    assert (divergence >= 0).all()
    assert divergence.mean() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_divergence_grows_with_the_change(name: str) -> None:
    task, (outputs, _), (noise, _) = TASKS.build(name), _draw(name), _draw(name, seed=1)
    sizes = [0.01, 0.1, 1.0]
    changed = [{key: value + size * noise[key] for key, value in outputs.items()} for size in sizes]
    divergences = [float(task.divergence(each, outputs).mean()) for each in changed]
    assert divergences == sorted(divergences)
    assert divergences[0] < 0.1 * divergences[-1]


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_batches_are_those_of_all(name: str) -> None:
    task, (outputs, targets) = TASKS.build(name), _draw(name)
    whole = task.statistics(outputs, targets, outputs)
    parts = [
        task.statistics(part, targets[rows], part)
        for rows in (slice(0, 5), slice(5, SAMPLES))
        for part in [{key: value[rows] for key, value in outputs.items()}]
    ]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-6)  # vectors of another length may round otherwise
    completed = task.complete(whole)
    losses = task.loss(completed)
    assert losses.shape == (SAMPLES,)
    if task.scaled:  # set by other samples, it is the same for a sample whatever others there are
        fixed = task.with_scale(completed[: SAMPLES // 2])
        assert torch.equal(fixed.loss(completed)[:1], fixed.loss(completed[:1]))
    assert ((losses >= 0) & (losses <= 1)).all()
    assert np.isfinite(task.quality(completed))


@pytest.mark.parametrize("name", NAMES)
def test_a_task_says_whether_it_looks_at_the_dense_outputs(name: str) -> None:
    task, (outputs, targets), (others, _) = TASKS.build(name), _draw(name), _draw(name, seed=1)
    beside_itself, beside_another = (task.statistics(outputs, targets, dense) for dense in (outputs, others))
    assert torch.equal(beside_itself, beside_another) is not task.reads_dense


@pytest.mark.parametrize("name", [name for name in NAMES if "unlabelled" not in TASKS.get(name).layouts])
def test_nothing_is_better_than_being_right(name: str) -> None:
    task, (outputs, targets) = TASKS.build(name), _draw(name)
    values = [
        task.metric.gain(task.quality(task.complete(task.statistics(each, targets, each))))
        for each in (outputs, _perfect(name, targets))
    ]
    assert values[1] == pytest.approx(task.metric.gain(float(task.metric.higher_is_better)))
    assert values[0] < values[1]
    assert float(task.loss(task.complete(task.statistics(_perfect(name, targets), targets, outputs))).max()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_relevance_starts_at_numbers_that_follow_the_outputs(name: str) -> None:
    task, (outputs, _) = TASKS.build(name), _draw(name)
    outputs = {key: value.requires_grad_() for key, value in outputs.items()}
    logits = task.logits(outputs)
    assert logits.shape[0] == SAMPLES
    assert logits.dim() in (1, 2)
    logits.sum().backward()
    assert any(value.grad is not None and value.grad.any() for value in outputs.values())


@pytest.mark.parametrize("name", NAMES)
def test_text_and_layout_lead_to_the_task(name: str) -> None:
    task = TASKS.build(name)
    assert TASKS.build(TASKS.text(task)) == task
    assert all(BY_LAYOUT[layout] for layout in task.layouts)
    assert set(BY_LAYOUT.values()) <= set(NAMES)


def test_miou_is_that_of_all_pixels() -> None:
    outputs, targets = _draw("segmentation")
    targets[:, 0] = 255
    task = Segmentation()
    logits = torch.nn.functional.interpolate(outputs["out"], (8, 8), mode="bilinear")
    expected = multiclass_jaccard_index(logits.argmax(1), targets, CLASSES, ignore_index=255)
    assert task.quality(task.statistics(outputs, targets, outputs)) == pytest.approx(float(expected), abs=1e-6)


def test_recall_looks_for_the_nearest_other_sample() -> None:
    outputs, labels = _draw("embedding")
    vectors = torch.nn.functional.normalize(outputs["embedding"], dim=1)
    hits = []
    for place in range(SAMPLES):
        nearest = max(
            (other for other in range(SAMPLES) if other != place), key=lambda o: float(vectors[o] @ vectors[place])
        )
        hits.append(bool(labels[nearest] == labels[place]))
    completed = Embedding().complete(Embedding().statistics(outputs, labels, outputs))
    assert completed[:, 0].tolist() == [float(hit) for hit in hits]
    maps = {"features": outputs["embedding"].reshape(SAMPLES, 4, 2, 2)}
    assert torch.equal(Embedding().logits(maps), Embedding().logits({"embedding": maps["features"].mean((2, 3))}))


def test_mean_average_precision_leaves_out_classes_that_do_not_occur() -> None:
    outputs, targets = _draw("multi-label")
    targets[:, 0] = 0
    expected = np.mean([average_precision_score(targets[:, k], outputs["logits"][:, k]) for k in range(1, CLASSES)])
    task = MultiLabel()
    assert task.quality(task.statistics(outputs, targets, outputs)) == pytest.approx(float(expected), abs=1e-5)


def test_absolute_error_is_in_the_unit_of_the_targets() -> None:
    outputs, targets = _draw("regression")
    task = Regression()
    expected = float((outputs["output"] - targets).abs().mean())
    assert task.quality(task.statistics(outputs, targets, outputs)) == pytest.approx(expected)


def test_a_map_of_one_channel_says_foreground_above_zero() -> None:
    logits = torch.tensor([[[[3.0, -1.0], [2.0, -2.0]]]])
    targets = torch.tensor([[[1, 0], [0, 0]]])
    task = Segmentation()
    statistics = task.statistics({"output": logits}, targets, {"output": logits})
    assert statistics.tolist() == [[2, 1, 3, 2]]


def test_every_region_of_a_map_counts_the_same() -> None:
    """The same error in a region of one pixel costs as much as in all of one that is fifteen times as large."""
    dense = torch.zeros(1, 3, 4, 4)
    dense[:, 0] = 2.0
    dense[:, :2, 0, 0] = torch.tensor([0.0, 2.0])
    small, large = dense.clone(), dense.clone()
    small[:, 1, 0, 0] -= 1.5
    large[:, 0].flatten(1)[:, 1:] -= 1.5
    task = Segmentation()
    changes = [task.divergence({"out": each}, {"out": dense}) for each in (small, large)]
    assert changes[0] > 0
    assert torch.allclose(*changes)


def test_relevance_starts_at_the_map_alone() -> None:
    """Every pixel counts the same, and an auxiliary output does not count."""
    maps = {"aux": torch.randn(1, 3, 4, 4, requires_grad=True), "out": torch.randn(1, 3, 4, 4, requires_grad=True)}
    Segmentation().logits(maps).sum().backward()
    assert maps["aux"].grad is None
    assert maps["out"].grad is not None
    assert maps["out"].grad.sum(1) == pytest.approx(torch.full((1, 4, 4), 1 / 16))


_JOINTS = {"boxes": torch.zeros(1, 2, 4), "logits": torch.zeros(1, 2, 3), "keypoints": torch.zeros(1, 2, 3, 3)}
MISFITS: Mapping[str, tuple[Task, dict[str, Tensor], Tensor, str]] = {
    "a mask of an unknown class": (
        Segmentation(),
        {"out": torch.zeros(1, 3, 2, 2)},
        torch.full((1, 2, 2), 7),
        "class 7, the model has 3",
    ),
    "numbers": (
        Regression(),
        {"output": torch.zeros(2, 3)},
        torch.zeros(2, 1),
        "1 numbers a sample, the model returns 3",
    ),
    "other joints": (Keypoints(), _JOINTS, torch.zeros(1, 1, 7 + 6), "data have 2 joints, the model has 3"),
    "no joints": (
        Keypoints(),
        {"boxes": torch.zeros(1, 2, 4)},
        torch.zeros(1, 1, 13),
        "returns boxes and no 'keypoints'",
    ),
    "labels": (MultiLabel(), {"logits": torch.zeros(2, 3)}, torch.zeros(2, 4), "4 classes, the model has 3"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_targets_that_do_not_fit_are_refused(case: str) -> None:
    task, outputs, targets, message = MISFITS[case]
    with pytest.raises(InputError, match=message):
        task.check(outputs, targets)


def test_wrong_pairs_end_in_one_line() -> None:
    with pytest.raises(InputError, match="task 'segmentation' reads masks, data 'x' have numbers"):
        check_layout(Segmentation(), "numbers", "x")
    check_layout(Agreement(), "numbers", "x")
    with pytest.raises(InputError, match=r"returns logits \(2, 3, 4\); expected logits \(n, classes\)"):
        Classification().agreement({"logits": torch.zeros(2, 3, 4)}, {"logits": torch.zeros(2, 3, 4)})
    with pytest.raises(InputError, match="unknown task 'segmentatoin'"):
        TASKS.build("segmentatoin")


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_words_and_marks_on_the_image(name: str) -> None:
    task, (outputs, targets) = TASKS.build(name), _draw(name)
    classes = [f"kind {number}" for number in range(CLASSES)]
    for row in range(SAMPLES):
        answer = task.answer({key: value[row : row + 1] for key, value in outputs.items()}, classes, (64, 64))
        assert answer.words
        if answer.boxes is not None:
            assert len(answer.boxes) == len(answer.names) == len(answer.classes)
            assert all(
                text == f"kind {number} {text[-4:]}" for text, number in zip(answer.names, answer.classes, strict=True)
            )
        if answer.regions is not None:
            assert answer.regions.shape == (64, 64)
            assert int(answer.regions.max()) < CLASSES
        task.describe_target(targets[row], classes)


def test_answers_say_what_outputs_hold() -> None:
    one = {"pred_boxes": torch.tensor([[[0.5, 0.5, 0.5, 0.25]]]), "logits": torch.tensor([[[3.0, 0.0, -9.0]]])}
    answer = TASKS.build("detection").answer(one, ["cat", "dog"], (32, 64))
    assert (answer.words, answer.classes) == ("cat 0.95", (0,))
    assert answer.boxes is not None
    assert answer.boxes.tolist() == [[16, 12, 48, 20]]
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 1, 0, 0] = 9
    assert TASKS.build("segmentation").answer({"out": maps}, ["sky", "road"]).words == "sky 75%, road 25%"
    assert TASKS.build("regression").answer({"output": torch.tensor([[2.5]])}, ["count"]).words == "count 2.5"
    target = torch.tensor([[1.0, 0, 0, 8, 8, 0], [-1, 0, 0, 0, 0, 0], [-1, 0, 0, 64, 64, 2]])
    assert TASKS.build("detection").describe_target(target, ["cat", "dog"]) == "dog"


def test_one_number_a_sample_agrees_by_its_error() -> None:
    """There is no largest of one, so that a model that says something else agrees less."""
    outputs = {"y": torch.arange(6.0)[:, None]}
    agreement = Agreement().agreement({"y": outputs["y"] + 1}, outputs)
    torch.testing.assert_close(agreement, torch.full((6,), 1 - 1 / float(outputs["y"].var(correction=0))).double())


def test_no_sample_is_its_own_neighbour() -> None:
    """Of four directions the last one's nearest is the second for the dense model, the first for the pruned one."""
    angles = torch.tensor([[0.0, 1.0, 3.0, 0.7], [0.0, 1.0, 3.0, 0.3]])
    dense, pruned = ({"embedding": torch.stack([angle.cos(), angle.sin()], 1)} for angle in angles)
    task = Neighbours()
    statistics = task.complete(task.statistics(pruned, torch.zeros(4), dense))
    nearest = [[3, 3, 1, 1], [3, 3, 1, 0]]
    assert statistics[:, 0].tolist() == [float(one == other) for one, other in zip(*nearest, strict=True)]


def test_joints_that_are_far_off_count_no_more_than_a_side_of_their_box() -> None:
    task, (outputs, _) = Keypoints(), _draw_joints(torch.Generator().manual_seed(0))
    far, further = ({**outputs, "keypoints": outputs["keypoints"] + distance} for distance in (1e3, 1e6))
    divergence = task.divergence(far, outputs)
    assert (divergence > 0.9).all()
    torch.testing.assert_close(task.divergence(further, outputs), divergence)


def test_classes_that_occur_nowhere_do_not_count_in_miou() -> None:
    targets = torch.tensor([[[0, 1], [1, 255]]])
    outputs = {"out": 9.0 * torch.nn.functional.one_hot(targets.clamp_max(1), 4).movedim(-1, 1)}
    task = Segmentation()
    assert task.quality(task.statistics(outputs, targets, outputs)) == 1


def test_a_mask_of_which_nothing_counts_is_no_loss() -> None:
    outputs, targets = _draw("segmentation")
    task = Segmentation()
    assert not task.loss(task.statistics(outputs, torch.full_like(targets, 255), outputs)).any()


def test_losses_of_numbers_are_shares_of_the_largest_size() -> None:
    """Also where all of them are below 0."""
    targets = torch.tensor([[-4.0], [-2.0]])
    task, outputs = Regression(), {"output": targets + torch.tensor([[1.0], [-2.0]])}
    assert task.loss(task.statistics(outputs, targets, outputs)).tolist() == [0.25, 0.5]


def test_of_several_maps_the_last_one_is_the_embedding() -> None:
    first, last = torch.ones(2, 4, 8, 8), torch.arange(2.0 * 3 * 4).reshape(2, 3, 2, 2)
    assert torch.equal(Embedding().vectors({"early": first, "late": last}), last.mean((2, 3)))
