"""Does it pay to optimise the attribution, before and after repair? PXP's protocol in small, and what it costs.

    python benchmarks/search.py [--quick] [--model LABEL ...]

On models that learned `glyphs` (models.py). "masked": PXP's objective, the mean of top-1 while 0, 5, ... 95 % of all
units are masked, over PXP's rules; "repaired": top-1 with 35 % of the MACs left, units removed physically, fold and
BatchNorm, over the full space. The search sees the select split; the rows are measured on test images that it has not
seen, their difference from epsilon with its paired 95 % interval over the images. Each search begins with the named
composites. Rows of models that are not measured anew are kept from the result file.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks.models

import models
import optuna

from pxcompress.attribution import has_attention
from pxcompress.clock import Clock
from pxcompress.data import load_splits
from pxcompress.graph import masked
from pxcompress.planning.plan import lowest
from pxcompress.recipe import Recipe
from pxcompress.search import SearchPlan
from pxcompress.search.objectives import PXP_RATES, Bench, objective, ratios_for
from pxcompress.search.run import Search, finished, work_on_trials
from pxcompress.search.space import space_of
from pxcompress.search.study import quiet
from pxcompress.stages import cut, plan_at
from pxcompress.state import seeded
from pxcompress.types import Splits

Row = dict[str, Any]

LABELS = ("VGG", "ResNet", "ViT")
RATIO = 0.65
IMAGES = {"score": 80, "repair": 256, "select": 120, "certify": 2, "test": 300}
QUICK = {**IMAGES, "score": 40, "select": 40, "test": 80}
TRIALS = {"masked": 24, "repaired": 16}
COST = {"configs": 8, "score": 400, "select": 200}
"""10 images of each class to attribute, as PXP has them."""

MODES = {"masked": "pxp", "repaired": "operating-point"}
PRESETS = ("epsilon", "zplus", "gamma")
PLAIN = {"integrated-gradients": "own", "taylor": "own", "magnitude": "mean", "activation": "mean", "random": "own"}
"""How each is ranked: as the rules are, or over the group's mean where scores have no unit in common."""


def searched(label: str, splits: Splits, model: nn.Module, mode: str, trials: int) -> tuple[Search, optuna.Study]:
    """A search on the select part, in memory."""
    name = MODES[mode]
    recipe = Recipe(model=label, ratio=RATIO, budget="macs", round_to=4, data="glyphs")
    parts = {"score": splits.score, "repair": splits.repair, "select": splits.select}
    space = space_of(recipe, objective(name).space, attention=has_attention(model, splits.example))
    bench = Bench.of(model, splits.example, parts, recipe, labels=True)
    plan = SearchPlan(objective=name, trials=trials)
    ratios = ratios_for(name, recipe, "")
    search = Search(plan, recipe, objective(name), ratios, space, bench, lambda text: print(text[:150], flush=True))
    with quiet():
        return search, work_on_trials(search, optuna.storages.InMemoryStorage())


def rows_of(label: str, mode: str, trials: int, limits: Mapping[str, int]) -> Iterator[Row]:
    """Best found, presets and scorers without rules: on select, and on test beside epsilon."""
    subject = models.subject_of(label)
    splits = load_splits(subject.source, subject.loaded.preprocessing, limits=limits)
    begin = time.process_time()
    search, study = searched(label, splits, subject.loaded.model, mode, trials)
    seconds = time.process_time() - begin
    known = finished(study)
    best = max(known, key=lambda trial: trial.values[0])
    recipes = {"best found": search.space.recipe.but(**_lists(best.user_attrs["recipe"]))}
    for name in PRESETS:
        values = next(each for each in search.space.starts() if set(_rules(each)) == {name})
        recipes[name] = search.space.recipe_at(values)
    for name, way in PLAIN.items():
        normalise = search.space.recipe.normalise if way == "own" else way
        recipes[name] = search.space.recipe.but(scorer=name, normalise=normalise)
    images = list(splits.test)
    right = {name: _right(search, recipe, mode, images) for name, recipe in recipes.items()}
    for name, recipe in recipes.items():
        select = {each.user_attrs["recipe"]["scorer"]: each.values[0] for each in known}.get(recipe.scorer)
        gain, low, high = _interval(right[name] - right["epsilon"])
        yield {
            "model": label, "mode": mode, "row": name, "scorer": recipe.scorer, "normalise": recipe.normalise,
            "repair": list(recipe.repair) if mode == "repaired" else [], "test": float(right[name].mean()),
            "select": best.values[0] if name == "best found" else select,
            "gain_over_epsilon": gain, "low": low, "high": high, "test_images": len(right[name]),
            "select_images": limits["select"], "score_images": limits["score"], "trials": len(study.trials),
            "ended_early": len(study.trials) - len(known), "search_cpu_seconds": seconds,
            "best_so_far": _best_so_far(known) if name == "best found" else [],
        }  # fmt: skip


def _best_so_far(known: Sequence[optuna.trial.FrozenTrial]) -> list[list[float]]:
    best, found = -math.inf, []
    for trial in known:
        best = max(best, trial.values[0])
        found.append([trial.user_attrs["job"] + 1, best])
    return found


def _lists(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.items()}


def _rules(values: Mapping[str, Any]) -> list[Any]:
    return [values[part] for part in ("low", "mid", "high", "classifier")]


def _right(search: Search, recipe: Recipe, mode: str, images: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """For every test image the share of the objective's models that are right, (images,)."""
    scored = search.bench.with_scores(recipe)
    if mode == "repaired":
        with seeded(recipe.seed):
            clock = Clock(lambda message: None, measures=False)
            slim = cut(scored, plan_at(scored, recipe.ratio, recipe), search.bench.parts, recipe, clock)
        return _hits(slim.pruned.model, images)
    groups, total = scored.structure.groups, torch.zeros(())
    for rate in PXP_RATES:
        plan = lowest(groups, scored.scores, rate, recipe.normalise)
        total = total + _hits(masked(scored.model, groups, plan), images)
    return total / len(PXP_RATES)


def _hits(model: nn.Module, images: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([(model(inputs).argmax(1) == labels).double() for inputs, labels in images])


def _interval(difference: Tensor) -> tuple[float, float, float]:
    """Mean over the images and its 95 % interval."""
    mean, half = float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return mean, mean - half, mean + half


def cost(configs: int, limits: Mapping[str, int]) -> Row:
    """CPU seconds of PXP trials on the ResNet, those of their attributions among them; bad trials end early."""
    subject = models.subject_of("ResNet")
    splits = load_splits(subject.source, subject.loaded.preprocessing, limits=limits)
    recipe = Recipe(model="ResNet", ratio=RATIO, budget="macs", data="glyphs")
    parts = {"score": splits.score, "repair": splits.repair, "select": splits.select}
    model = subject.loaded.model
    space = space_of(recipe, "pxp", attention=False)
    bench = Bench.of(model, splits.example, parts, recipe, labels=True)
    starts = len(space.starts())
    recipes = [*map(space.recipe_at, space.starts()), *(space.recipe_at(space.grid(n)) for n in range(configs))]
    begin = time.process_time()
    for each in recipes:
        bench.with_scores(each)
    attributions = time.process_time() - begin
    plan = SearchPlan(objective="pxp", sampler="grid", trials=starts + configs)
    search = Search(plan, recipe, objective("pxp"), PXP_RATES, space, bench, lambda text: None)
    begin = time.process_time()
    with quiet():
        study = work_on_trials(search, optuna.storages.InMemoryStorage())
    rest = time.process_time() - begin
    first = sum(_seconds(trial) for trial in study.trials[:starts]) / sum(_seconds(t) for t in study.trials) * rest
    each_attribution, each_rest = attributions / len(recipes), (rest - first) / configs
    total = 512 * (each_attribution + each_rest) + first
    return {
        "model": "ResNet", "mode": "cost", "configs": configs, "named": starts, "score_images": limits["score"],
        "select_images": limits["select"], "attribution_seconds": each_attribution, "rest_seconds": each_rest,
        "named_rest_seconds": first, "ratio_512": total / (512 * each_attribution),
        "ended_early": len(study.trials) - len(finished(study)),
    }  # fmt: skip


def _seconds(trial: optuna.trial.FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


def claims(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row.get("row") != "best found":
            continue
        label, mode = row["model"], row["mode"]
        here = [each for each in rows if (each["model"], each["mode"]) == (label, mode)]
        presets = [each["select"] for each in here if each["row"] in PRESETS]
        yield common.claim(
            f"{label}, {mode}: best found - best preset, on select", row["select"] - max(presets), 0.0, "higher"
        )
        yield common.claim(f"{label}, {mode}: best found - epsilon, on test", row["gain_over_epsilon"], 0.0, "higher")
        yield common.claim(
            f"{label}, {mode}: lower end of that gain's 95 % interval, above 0", row["low"], 1e-6, "higher"
        )
    for row in rows:
        if row["mode"] == "cost":
            said = "ResNet: CPU time of 512 PXP configurations, over that of 512 attributions (scaled)"
            yield common.claim(said, row["ratio_512"], 3.0, "lower")


def kept(path: Path, anew: Sequence[tuple[str, str]]) -> list[Row]:
    """Rows of the result file for what is not measured anew."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if (row["model"], row["mode"]) not in anew]


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", action="append", choices=LABELS)
    parser.add_argument("--mode", action="append", choices=(*MODES, "cost"))
    options = parser.parse_args()
    limits = QUICK if options.quick else IMAGES
    wanted = [(label, mode) for label in options.model or LABELS for mode in options.mode or (*MODES, "cost")]
    wanted = [(label, mode) for label, mode in wanted if mode != "cost" or label == "ResNet"]
    folder = common.RESULTS / "quick" if options.quick else common.RESULTS
    for label, mode in wanted:
        if mode == "cost":
            sizes = {**limits, "score": COST["score"], "select": COST["select"]}
            found = [cost(2, limits) if options.quick else cost(COST["configs"], sizes)]
        else:
            found = list(rows_of(label, mode, 8 if options.quick else TRIALS[mode], limits))
        rows = [*kept(folder / "search.json", [(label, mode)]), *found]
        common.write("search", " ".join(["python", *sys.argv]), rows, (0,), list(claims(rows)))


if __name__ == "__main__":
    main()
