"""Does it pay to optimise the attribution, before and after repair? PXP's protocol in small, and what it costs.

    python benchmarks/search.py [--quick] [--model LABEL ...] [--part PART ...] [--seed N ...]

On models that learned `glyphs` (models.py), restricted to 3 classes and on all 40, with three seeds: each draws the
images and the search anew, and has 3 classes of its own; the dense model stays. Parts:

masked    PXP's objective, the mean of top-1 while 0, 5, ... 95 % of all units are masked, over PXP's rules
repaired  top-1 at one share of the MACs, units removed physically, over the full space; trials with the closed-form
          repairs only, what they find and the presets then with the default ones
heatmaps  do composites that make good heatmaps prune well? For many of them how much relevance lies on the character
          and how fast the prediction falls with the pixels, beside both measures of pruning; one seed, all classes
cost      CPU time of PXP's configurations beside that of their attributions alone; the ResNet
transfer  what each model's search found, on the other models; one seed

Searches see the select split and begin with the named composites; rows are measured on test images that no search has
seen, their difference from epsilon everywhere with its paired 95 % interval. What is not measured anew is kept from
the result file, which is written after every search: models, parts and seeds can be measured one at a time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import common
import numpy as np
import optuna
import torch
from search_claims import claims, figure
from search_places import (
    IMAGES,
    LABELS,
    MODES,
    TASKS,
    Place,
    hits,
    in_full,
    interval,
    place_of,
    presets_of,
    right_on_test,
    searched,
    slim_model,
    space_at,
    value_on_select,
)

from pxcompress.explain.heatmaps import Method, heatmaps
from pxcompress.explain.metrics import mass_accuracy, pixel_flipping, rank_accuracy
from pxcompress.recipe import Recipe
from pxcompress.scorers import SCORERS
from pxcompress.search.objectives import shipped_quality
from pxcompress.search.space import Space

Row = dict[str, Any]

COST = {"score": 400, "repair": 64, "select": 200, "certify": 2, "test": 2}
QUICK = {"score": 30, "repair": 64, "select": 40, "certify": 2, "test": 60}
TRIALS = {"masked": 32, "repaired": 20}
SEEDS = (0, 1, 2)
FINALISTS = 3
CONFIGS = 32
COMPOSITES = 12
"""Drawn from PXP's grid for part "heatmaps", beside the named ones."""

MAPS = 64
"""Test images with heatmaps."""

PLAIN = {"integrated-gradients": "own", "taylor": "own", "magnitude": "mean", "activation": "mean", "random": "own"}
"""How each is ranked: as the rules are, or over the group's mean where scores have no unit in common."""


def rows_of(place: Place, mode: str, trials: int) -> Iterator[Row]:
    """Best found, presets and scorers without rules: on select, and on test beside epsilon."""
    begin = time.process_time()
    space = space_at(place, mode)
    study = searched(place, mode, trials, space)
    recipes = presets_of(space)
    ended = finished(study)
    values = {space.recipe_at(trial.params): trial.values[0] for trial in ended}
    chosen = [*recipes.values(), *_finalists(values)]  # presets first, where others are no better
    again = [recipe for recipe in chosen if mode == "repaired" or recipe not in values]  # presets may end early
    values |= {recipe: value_on_select(place, mode, recipe) for recipe in again}
    best = max(chosen, key=lambda recipe: values[recipe])
    on_select = {name: values[recipe] for name, recipe in {"best found": best, **recipes}.items()}
    seconds = time.process_time() - begin
    recipes = {"best found": best, **recipes, **_plain(space)}
    curves = {name: right_on_test(place, mode, recipe) for name, recipe in recipes.items()}
    right = {name: curve.mean(0) for name, curve in curves.items()}
    for name, recipe in recipes.items():
        gain, half = interval(right[name] - right["epsilon"])
        yield {
            "part": mode, **place.words, "row": name, "scorer": recipe.scorer, "normalise": recipe.normalise,
            "test": float(right[name].mean()), "select": on_select.get(name), "gain_over_epsilon": gain,
            "half_width": half, "test_images": len(right[name]),
            **({} if mode == "masked" else {"ratio": recipe.ratio, "repair": in_full(place, recipe).repair}),
            **({"curve": [round(float(value), 4) for value in curves[name].mean(1)]} if mode == "masked"
               else {"test_bare": _bare(place, recipe)}),
            **({"trials": trials, "ended_early": trials - len(ended)}
               | {"search_cpu_seconds": seconds, "best_so_far": _best_so_far(ended)} if name == "best found" else {}),
        }  # fmt: skip


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that were measured to the end."""
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _plain(space: Space) -> dict[str, Recipe]:
    own = space.recipe
    return {name: own.but(scorer=name, normalise=own.normalise if way == "own" else way) for name, way in PLAIN.items()}


def _finalists(value_by_recipe: Mapping[Recipe, float]) -> list[Recipe]:
    """The best of the trials' choices."""
    return sorted(value_by_recipe, key=lambda recipe: -value_by_recipe[recipe])[:FINALISTS]


def _best_so_far(trials: Sequence[optuna.trial.FrozenTrial]) -> list[list[float]]:
    best, history = -math.inf, []
    for trial in trials:
        best = max(best, trial.values[0])
        history.append([trial.number + 1, best])
    return history


def _bare(place: Place, recipe: Recipe) -> float:
    """Top-1 on test of the same units removed, without any repair."""
    return float(hits(slim_model(place, recipe.but(repair=())), place).mean())


# --- heatmaps, transfer, cost


def heatmap_rows(place: Place, composites: int) -> Iterator[Row]:
    """Composites, named and drawn: how good their heatmaps are on test, and how well they prune on select."""
    space = space_at(place, "masked")
    values = [*space.starts(), *(values | {"aggregate": "abs"} for values in drawn(space, composites))]
    texts = dict.fromkeys(SCORERS.build(space.recipe_at(each).scorer).composite for each in values)  # type: ignore[attr-defined]
    inputs, labels = (torch.cat(parts)[:MAPS] for parts in zip(*place.splits.test, strict=True))
    masks = torch.from_numpy(np.stack([place.mask(name) for name in place.splits.ids["test"][:MAPS]])).flatten(1)
    model, repairs = place.bench.scored.model, space_at(place, "repaired").recipe.repair
    for text in texts:
        maps = heatmaps(model, inputs, labels, Method("lrp", text)).flatten(1)
        yield {
            "part": "heatmaps", **place.words, "composite": text,
            "mass_accuracy": float(mass_accuracy(maps, masks).nanmean()),
            "rank_accuracy": float(rank_accuracy(maps, masks).nanmean()),
            "flipping": float(pixel_flipping(model, inputs, maps, labels).mean()),
            "masked": value_on_select(place, "masked", space.recipe.but(scorer=f"lrp:composite={text}")),
            **{f"repaired_{name}": shipped_quality(place.bench, place.recipe.but(scorer=f"{name}:composite={text}",
               repair=repairs)) for name in ("lrp", "lrp-residual")},
        }  # fmt: skip


def drawn(space: Space, count: int) -> list[dict[str, Any]]:
    """Choices of PXP's grid at random."""
    draw = np.random.default_rng(0)
    return [{each.name: str(draw.choice(each.choices)) for each in space.parameters} for _ in range(count)]


def transfer_rows(place: Place, rows: Sequence[Row]) -> Iterator[Row]:
    """What the searches for the same task and seed found on all models, on select and on test images of one of them."""
    for mode in MODES:
        best_rows = {row["model"]: row for row in rows if row.get("row") == "best found"
                 and (row["part"], row["task"], row["seed"]) == (mode, place.task, place.seed)}  # fmt: skip
        epsilon = in_full(place, presets_of(space_at(place, mode))["epsilon"])
        recipes = {source: epsilon.but(scorer=row["scorer"], normalise=row["normalise"],
                   repair=tuple(row.get("repair", epsilon.repair))) for source, row in best_rows.items()}  # fmt: skip
        right, value = {}, {}
        for recipe in {epsilon, *recipes.values()}:
            right[recipe] = right_on_test(place, mode, recipe).mean(0)
            value[recipe] = value_on_select(place, mode, recipe)
        for source, recipe in recipes.items():
            gain, half = interval(right[recipe] - right[epsilon])
            yield {
                "part": "transfer", **place.words, "mode": mode, "from": source, "scorer": recipe.scorer,
                "select_over_epsilon": value[recipe] - value[epsilon], "test": float(right[recipe].mean()),
                "gain_over_epsilon": gain, "half_width": half,
            }  # fmt: skip


def cost(label: str, configs: int, images: Mapping[str, int]) -> Row:
    """CPU seconds of PXP trials, those of their attributions among them; bad trials end early."""
    place = place_of(label, "all", 0, images)
    first = space_at(place, "masked")
    starts = len(first.starts())
    recipes = [first.recipe_at(values) for values in (*first.starts(), *drawn(first, configs))]
    place.bench.scores.clear()
    begin = time.process_time()
    for each in recipes:
        place.bench.with_scores(each)
    attributions = time.process_time() - begin
    begin = time.process_time()
    study = searched(place, "masked", starts + configs)
    rest = time.process_time() - begin
    named = sum(map(_seconds, study.trials[:starts])) / sum(map(_seconds, study.trials)) * rest
    each_attribution, each_rest = attributions / len(recipes), (rest - named) / configs
    total = 512 * (each_attribution + each_rest) + named
    return {
        "part": "cost", **place.words, "configs": configs, "named": starts, "score_images": images["score"],
        "select_images": images["select"], "attribution_seconds": each_attribution, "rest_seconds": each_rest,
        "named_rest_seconds": named, "ratio_512": total / (512 * each_attribution),
        "ended_early": starts + configs - len(finished(study)),
    }  # fmt: skip


def _seconds(trial: optuna.trial.FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


# --- all of it


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["part"], row["model"], row["task"], row["seed"]


def _images(task: str, quick: bool) -> Mapping[str, int]:
    return QUICK if quick else IMAGES[task]


def _searches(label: str, task: str, seed: int, mode: str, quick: bool, rows: Sequence[Row]) -> list[Row]:
    return list(rows_of(place_of(label, task, seed, _images(task, quick)), mode, 8 if quick else TRIALS[mode]))


def _heatmaps(label: str, quick: bool, rows: Sequence[Row]) -> list[Row]:
    return list(heatmap_rows(place_of(label, "all", 0, _images("all", quick)), 2 if quick else COMPOSITES))


def _cost(label: str, quick: bool, rows: Sequence[Row]) -> list[Row]:
    return [cost(label, 2, QUICK) if quick else cost(label, CONFIGS, COST)]


def _transfer(label: str, quick: bool, rows: Sequence[Row]) -> list[Row]:
    places = (place_of(label, task, 0, _images(task, quick)) for task in TASKS)
    return [row for place in places for row in transfer_rows(place, rows)]


Step = Callable[[Sequence[Row]], list[Row]]
"""From the rows so far to those of one key."""

OTHERS: Mapping[str, Callable[[str, bool, Sequence[Row]], list[Row]]] = {
    "heatmaps": _heatmaps,
    "cost": _cost,
    "transfer": _transfer,
}
"""Parts that take one seed."""

PARTS = (*MODES, *OTHERS)


def work(quick: bool, labels: Sequence[str], parts: Sequence[str], seeds: Sequence[int]) -> Iterator[Step]:
    """All steps in the order in which they are done: everything with the first seed, then searches with the others."""
    for seed in seeds:
        for part in parts if seed == seeds[0] else [part for part in parts if part in MODES]:
            for label in labels:
                if part in MODES:
                    yield from (partial(_searches, label, task, seed, part, quick) for task in TASKS)
                elif part != "cost" or label == "ResNet":
                    yield partial(OTHERS[part], label, quick)


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", action="append", choices=LABELS)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--seed", action="append", type=int, choices=SEEDS)
    options = parser.parse_args()
    folder = common.RESULTS / "quick" if options.quick else common.RESULTS
    path = folder / "search.json"
    seeds = options.seed or (SEEDS[:1] if options.quick else SEEDS)
    for step in work(options.quick, options.model or LABELS, options.part or PARTS, seeds):
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        new_rows = step(rows)
        anew = {_key(row) for row in new_rows}
        rows = [*(row for row in rows if _key(row) not in anew), *new_rows]
        command = "python benchmarks/search.py" + " --quick" * options.quick
        common.write("search", command, rows, sorted({row["seed"] for row in rows}), claims(rows))
        figure(rows, folder / "search.svg")


if __name__ == "__main__":
    main()
