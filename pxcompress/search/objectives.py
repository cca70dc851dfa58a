"""What a choice is worth: the same model, groups, prices and moments for all of them, and one number at every ratio.

Only the parts `score`, `repair` and `select` of the data are known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from pxcompress.deploy.answers import torch_accuracy
from pxcompress.errors import InputError, unknown
from pxcompress.explain.heatmaps import Method
from pxcompress.explain.similarity import SAMPLES, explanation_similarity, first_of
from pxcompress.graph import masked
from pxcompress.passes.moments import Remembered
from pxcompress.planning.order import lowest
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.stages import cut, plan_at, priced, unit_scores
from pxcompress.state import device_of, observed, seeded
from pxcompress.types import Batches, Scored, Scores, Slim

PXP_RATES = tuple(percent / 100 for percent in range(0, 100, 5))
"""Shares of all units that PXP masks."""


ALIKE = 0.9
"""Mean cosine of heatmaps to the dense model's below which `explained` counts a model down."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """The dense model with everything that does not depend on the choice, computed once.

    `logits` are the dense model's on the select split, batch by batch, None where labels say what is right.
    """

    scored: Scored
    parts: Mapping[str, Batches]
    logits: Sequence[Tensor] | None
    scores: dict[str, Scores] = field(default_factory=dict)

    @cached_property
    def dense(self) -> float:
        """Quality of the dense model."""
        return self.quality(self.scored.model)

    @classmethod
    def of(
        cls, model: nn.Module, example: Tensor, parts: Mapping[str, Batches], recipe: Recipe, labels: bool
    ) -> Workbench:
        """For choices around `recipe`; `parts` are the roles score, repair and select. Raises `BudgetError`."""
        scored = priced(model, example, Run(recipe, parts))
        logits = None if labels else list(_logits(model, parts["select"]))
        kept = {role: Remembered(part, model) for role, part in parts.items()}
        return cls(scored, kept, logits)

    def quality(self, model: nn.Module) -> float:
        """Top-1 on the select split, a share; without labels minus the mean KL divergence from the dense model."""
        if self.logits is None:
            return torch_accuracy(model, self.parts["select"])
        pairs = list(zip(self.logits, _logits(model, self.parts["select"]), strict=True))
        lost = sum(
            float(kl_div(b.log_softmax(1), a.log_softmax(1), reduction="sum", log_target=True)) for a, b in pairs
        )
        return -lost / sum(len(a) for a, _ in pairs)

    def with_scores(self, recipe: Recipe) -> Scored:
        """The dense model scored as `recipe` says; each scorer runs once. Raises `ResultError` for infinite scores."""
        if recipe.scorer not in self.scores:
            groups = self.scored.structure.groups
            run = Run(recipe, self.parts)
            self.scores[recipe.scorer] = unit_scores(self.scored.model, groups, recipe.scorers[0], run)
        return replace(self.scored, scores=self.scores[recipe.scorer])


def _logits(model: nn.Module, batches: Batches) -> Iterator[Tensor]:
    with observed(model), torch.no_grad():
        for inputs, _ in batches:
            yield model(inputs.to(device_of(model))).double().cpu()


def slim_at(bench: Workbench, recipe: Recipe, ratio: float) -> Slim:
    """What `run` would ship: pruned physically to `ratio`, then repaired."""
    scored = bench.with_scores(recipe)
    with seeded(recipe.seed):
        return cut(scored, plan_at(scored, ratio, recipe), Run(recipe, bench.parts).unheard())


def shipped(bench: Workbench, recipe: Recipe, ratio: float) -> float:
    """Quality of the model that `run` would ship."""
    return bench.quality(slim_at(bench, recipe, ratio).pruned.model)


def explained(bench: Workbench, recipe: Recipe, ratio: float) -> float:
    """Quality of that model, less what its explanations lack of being `ALIKE` to the dense model's.

    Relevance follows the same rules whatever the recipe scores by, so that its numbers compare.
    """
    slim = slim_at(bench, recipe, ratio)
    found = explanation_similarity(slim.pruned, Method(), [first_of(bench.parts["select"], SAMPLES)])
    return bench.quality(slim.pruned.model) - max(0.0, ALIKE - found.cosine)


def only_masked(bench: Workbench, recipe: Recipe, rate: float) -> float:
    """Quality with the lowest `rate` of all units masked, no repair: PXP's measure."""
    if not rate:
        return bench.dense
    scored = bench.with_scores(recipe)
    groups = scored.structure.groups
    return bench.quality(masked(scored.model, groups, lowest(groups, scored.scores, rate, recipe.normalise)))


def _area(points: Mapping[float, float]) -> float:
    """Area under the points (ratio -> quality), over the width of the range."""
    places = sorted(points)
    parts = [(points[a] + points[b]) / 2 * (b - a) for a, b in pairwise(places)]
    return sum(parts) / (places[-1] - places[0]) if parts else points[places[0]]


def _mean(points: Mapping[float, float]) -> float:
    return sum(points.values()) / len(points)


@dataclass(frozen=True)
class Objective:
    """`point` is what is measured at one ratio, `combine` makes one number of all; `space` is its own space."""

    help: str
    point: Callable[[Workbench, Recipe, float], float]
    combine: Callable[[Mapping[float, float]], float]
    space: str = "full"


OBJECTIVES: Mapping[str, Objective] = {
    "operating-point": Objective("top-1 of the pruned and repaired model at --ratio", shipped, _mean),
    "curve": Objective("area under top-1 of pruned and repaired models over --ratios", shipped, _area),
    "explained": Objective(
        "operating-point, less what the cosine of heatmaps to the dense model's lacks of 0.9", explained, _mean
    ),
    "pxp": Objective("mean top-1 over 0 to 95 % of all units masked, no repair", only_masked, _mean, "pxp"),
}


def objective(name: str) -> Objective:
    """The objective called `name`; `InputError` lists them."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def ratios_for(name: str, recipe: Recipe, asked: str, *, front: bool = False) -> tuple[float, ...]:
    """Where `name` measures, ascending; `asked` is the text of --ratios, which only the curve and a front take.

    A front has the recipe's ratio among them in any case.
    """
    if asked and name != "curve" and not front:
        raise InputError(
            f"--ratios {asked} has no effect on objective {name!r}; leave it out, or ask for curve or --pareto"
        )
    if name == "pxp":
        return PXP_RATES
    if recipe.ratio is None:
        raise InputError("a search is for a share of the cost; give --ratio")
    if name in ("operating-point", "explained") and not front:
        return (recipe.ratio,)
    try:
        found = sorted({float(part) for part in asked.split(",")}) if asked else _steps(recipe.ratio)
    except ValueError:
        raise InputError(f"--ratios is {asked!r}; expected shares of the cost to remove, as 0.3,0.5,0.7") from None
    if len(found) < 2 or not all(0 < ratio < 1 for ratio in found):
        raise InputError(f"--ratios is {asked!r}; expected two or more shares between 0 and 1, as 0.3,0.5,0.7")
    return tuple(sorted({*found, recipe.ratio})) if front else tuple(found)


def _steps(last: float) -> list[float]:
    """A curve's ratios where none are named."""
    return [round(last * step / 4, 4) for step in range(1, 5)]


def middle_first(ratios: Sequence[float]) -> list[float]:
    """The order in which ratios are measured: what tells choices apart comes first, so that bad ones end there."""
    middle = (ratios[0] + ratios[-1]) / 2
    return sorted(ratios, key=lambda ratio: (round(abs(ratio - middle), 6), ratio))
