"""A search from its recipe to its files: which choice of rules, score, normalisation and repair prunes best."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import Trial
from torch import nn

from pxcompress import __version__
from pxcompress.attribution import has_attention
from pxcompress.budgets import BUDGETS
from pxcompress.clock import Clock
from pxcompress.errors import InputError, ResultError, unknown
from pxcompress.notes import Note
from pxcompress.pipeline import aligned
from pxcompress.recipe import Recipe
from pxcompress.report.search import quality_text
from pxcompress.search.files import RESULT, STORAGE, write
from pxcompress.search.objectives import OBJECTIVES, Objective, Workbench, middle_first, objective, ratios_for, slim_at
from pxcompress.search.results import (
    POINTS,
    RECIPE,
    SAME,
    Row,
    choice_of,
    finished,
    front,
    importances,
    leaders,
    recipe_of,
    rows_of,
)
from pxcompress.search.space import SPACES, Space, Value, plain_scorers, space_of, trial_repairs, with_repairs
from pxcompress.search.storage import lasting, open_storage, sqlite
from pxcompress.search.study import JOB, Direction, open_study, quiet, sampler_of, suggest, work
from pxcompress.state import seeded
from pxcompress.subject import Subject, load_subject, with_baseline
from pxcompress.types import Slim, Splits

SCHEMA_VERSION = 1

FINALISTS = 3
"""Best trials that are repaired in full and compared."""


@dataclass(frozen=True)
class SearchPlan:
    """What is asked of a search beside its recipe. `timeout` is in seconds; `storage` as `open_storage` takes it.

    `ratios` and `space` are "" for the objective's own; `start` holds parameters of an earlier search. `pareto` is a
    budget: what it says of a model is minimised beside the objective, over `ratios`. Without `full_trials` costly
    repairs, which would take most of the time, are left to the best trials.
    """

    objective: str = "operating-point"
    sampler: str = "tpe"
    trials: int = 50
    timeout: float = math.inf
    storage: str = ""
    ratios: str = ""
    space: str = ""
    labels: bool = True
    start: Mapping[str, Value] = field(default_factory=dict)
    pareto: str = ""
    full_trials: bool = False

    def __post_init__(self) -> None:
        if self.space not in ("", *SPACES):
            raise unknown("space", self.space, SPACES)
        if self.trials < 1:
            raise InputError(f"trials is {self.trials}; expected 1 or more")
        if not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout:g}; expected seconds above 0")
        if self.objective == "pxp" and not self.labels:
            raise InputError("objective 'pxp' is defined by labels; leave out --no-labels, or ask for curve")
        if self.pareto and self.objective != "operating-point":
            raise InputError(
                f"--pareto {self.pareto} has no effect on objective {self.objective!r}; it needs operating-point"
            )
        if self.pareto:
            BUDGETS.build(self.pareto)


@dataclass(frozen=True, eq=False)
class Search:
    """A search that can be worked on: `recipe` is what ships, that of `space` what is tried.

    `price` is what a model costs, as a share of the dense one, where there is a front.
    """

    plan: SearchPlan
    recipe: Recipe
    objective: Objective
    ratios: tuple[float, ...]
    space: Space
    bench: Workbench
    note: Note
    price: Callable[[Slim], float] | None = None

    @property
    def directions(self) -> tuple[Direction, ...]:
        """More quality, and less cost where there is a front."""
        return ("maximize",) if self.price is None else ("maximize", "minimize")

    @property
    def name(self) -> str:
        """Name of its study: the same for the same search, wherever and however often it is started."""
        facts = [asdict(self.recipe), self.plan.objective, self.ratios, self.plan.labels, self.plan.sampler]
        facts += [self.plan.pareto, self.space.recipe.repair]
        facts += [[asdict(each) for each in self.space.parameters], dict(self.plan.start)]
        return f"pxcompress-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"

    def starts(self) -> list[dict[str, Value]]:
        """The first jobs: an earlier search's best, and `Space.starts`."""
        earlier = [self.space.fitting(self.plan.start)] if self.plan.start else []
        return [*earlier, *(values for values in self.space.starts() if values not in earlier)]

    def baselines(self) -> list[Recipe]:
        """Scorers without rules, each ranked in the recipe's way and over the group's mean."""
        ways = dict.fromkeys((self.space.recipe.normalise, "mean"))
        return [self.space.recipe.but(scorer=text, normalise=way) for text in plain_scorers() for way in ways]

    def finalists(self, study: optuna.Study, baselines: optuna.Study) -> list[Recipe]:
        """What is repaired in full and compared: the best trials, the front, the default and all scorers without rules.

        Of those that rank in several ways the better one.
        """
        rows, others = rows_of(study), rows_of(baselines)
        here = [row for row in rows if row["ratio"] == self.recipe.ratio]
        chosen = [*leaders(here, FINALISTS), *front(rows), choice_of(self.space.recipe_at(self.space.defaults))]
        for name in dict.fromkeys(row["scorer"] for row in others):
            chosen += leaders([row for row in others if row["scorer"] == name], 1)
        recipes = (with_repairs(recipe_of(row, self.recipe), self.recipe.repair) for row in chosen)
        return list(dict.fromkeys(recipes))

    def measure(
        self, trial: Trial, recipe: Recipe, *, may_end: bool = False, known: Sequence[optuna.Study] = ()
    ) -> Sequence[float]:
        """The objective of `recipe`, and its cost for a front, noted in `trial`.

        What was measured before, there or in `known` studies, is not measured again.
        """
        choice = choice_of(recipe)
        trial.set_user_attr(RECIPE, choice)
        for study in (trial.study, *known):
            same = next((each for each in finished(study) if each.user_attrs[RECIPE] == choice), None)
            if same is not None:
                trial.set_user_attr(POINTS, same.user_attrs[POINTS])
                if study is trial.study:
                    trial.set_user_attr(SAME, same.user_attrs.get(SAME, same.user_attrs[JOB]))
                return list(same.values)
        if self.price is not None:
            return self._priced(trial, recipe, self.price)
        points: dict[float, float] = {}
        for step, ratio in enumerate(middle_first(self.ratios), start=1):
            points[ratio] = _number(self.objective.point(self.bench, recipe, ratio), recipe)
            trial.report(self.objective.combine(points), step)
            if trial.should_prune() and may_end and step < len(self.ratios):
                raise optuna.TrialPruned
        trial.set_user_attr(POINTS, [[ratio, points[ratio]] for ratio in self.ratios])
        return [self.objective.combine(points)]

    def _priced(self, trial: Trial, recipe: Recipe, price: Callable[[Slim], float]) -> Sequence[float]:
        assert recipe.ratio is not None
        slim = slim_at(self.bench, recipe, recipe.ratio)
        value = _number(self.bench.quality(slim.pruned.model), recipe)
        trial.set_user_attr(POINTS, [[recipe.ratio, value]])
        return [value, price(slim)]


def _number(value: float, recipe: Recipe) -> float:
    if not math.isfinite(value):
        raise ResultError(f"the model pruned by {recipe.scorer} gives no finite logits")
    return value


def price_in(budget: str, bench: Workbench, recipe: Recipe) -> Callable[[Slim], float]:
    """What a slim model costs in a budget's unit, as a share of the dense one; conditions are those of `recipe`."""
    said = recipe.but(budget=budget).budget
    groups = bench.scored.structure.groups
    meter = BUDGETS.build(said).meter(bench.scored.model, groups, bench.scored.example)
    dense = meter({})

    def price(slim: Slim) -> float:
        return meter({group.name: len(slim.pruned.plan.kept(group)) for group in groups}) / dense

    return price


def search(recipe: Recipe, plan: SearchPlan, out: Path, note: Note) -> Mapping[str, Any]:
    """Search as `plan` says around `recipe`, and write composite.json, search.json and search.html into `out`.

    Started again, also after it was killed, it goes on; started several times with one storage, they share the work.
    Returns what search.json holds. Sees the score, repair and select parts of the data only. Raises `InputError`, and
    `BudgetError` where no plan reaches the ratios.
    """
    _check(recipe, out)
    recipe = aligned(recipe, Clock(note))
    objective(plan.objective)
    ratios_for(plan.objective, recipe, plan.ratios, front=bool(plan.pareto))
    sampler_of(plan.sampler, 0, lambda job: {})  # an unknown one is found before any work
    deadline = time.monotonic() + plan.timeout
    if not plan.storage:
        out.mkdir(parents=True, exist_ok=True)
    place = plan.storage or sqlite(out / STORAGE)
    with seeded(recipe.seed), quiet(), lasting(place):
        storage = open_storage(place)
        subject = with_baseline(load_subject(recipe), recipe.seed, note)
        this = search_on(subject.loaded.model, subject.splits, recipe, plan, note)
        baselines = work_on_baselines(this, storage, deadline)
        study = work_on_trials(this, storage, deadline)
        if not finished(study) and not finished(baselines):
            raise InputError(f"no trial ended in {plan.timeout:g} s; give more --timeout, and the search goes on")
        finals = work_on_finals(this, storage, study, baselines)
        content = _content(this, subject, study, baselines, finals)
    write(out, content)
    return content


def search_on(model: nn.Module, splits: Splits, recipe: Recipe, plan: SearchPlan, note: Note) -> Search:
    """The search for `model` on its data, ready to be worked on. Raises as `search` does."""
    chosen = objective(plan.objective)
    ratios = ratios_for(plan.objective, recipe, plan.ratios, front=bool(plan.pareto))
    many = plan.objective == "curve" or plan.pareto
    furthest = recipe.but(ratio=max(ratios)) if many else recipe
    bench = Workbench.of(model, splits.example, splits.parts, furthest, plan.labels)
    tried = recipe if plan.full_trials or plan.objective == "pxp" else recipe.but(repair=trial_repairs(recipe.repair))
    attention = has_attention(model, splits.example)
    name = plan.space or chosen.space
    space = space_of(tried, name, attention=attention, ratios=ratios if plan.pareto else ())
    _tell_unfit(space, plan, note)
    price = price_in(plan.pareto, bench, recipe) if plan.pareto else None
    return Search(plan, recipe, chosen, ratios, space, bench, note, price)


def _tell_unfit(space: Space, plan: SearchPlan, note: Note) -> None:
    """Say what of an earlier search's choice is left out here; `InputError` where that is all of it."""
    unfit = space.unfit(plan.start)
    if unfit and len(unfit) == len(plan.start):
        raise InputError(f"--from holds no parameter of this search ({', '.join(unfit[:5])}); leave it out")
    if unfit:
        note(f"--from: left out, because they cannot be chosen here: {', '.join(unfit)}")


def _check(recipe: Recipe, out: Path) -> None:
    """Raise `InputError` for what a search does not do, and for a folder that holds something else."""
    if recipe.rounds > 1 or recipe.guarantee:
        raise InputError("a search knows no --rounds or --max-drop; leave them out, and give them to run")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not any((out / n).exists() for n in _OURS))):
        raise InputError(f"{str(out)!r} holds something else than a search; choose another --out")


_OURS = (STORAGE, RESULT)


def work_on_baselines(this: Search, storage: BaseStorage, deadline: float = math.inf) -> optuna.Study:
    """Measure the search's baselines, as far as other workers do not, until the monotonic time `deadline`."""

    def one(trial: Trial, job: int) -> Sequence[float]:
        return _told(this, trial, f"baseline {job + 1}", partial(this.measure, trial, this.baselines()[job]))

    study = open_study(storage, f"{this.name}-baselines", sampler_of("random", 0, lambda job: {}), this.directions)
    work(study, len(this.baselines()), one, deadline, this.note)
    return study


def work_on_trials(this: Search, storage: BaseStorage, deadline: float = math.inf) -> optuna.Study:
    """Do the search's trials, as far as other workers do not, until the monotonic time `deadline`."""
    starts, plan = this.starts(), this.plan
    trials = min(plan.trials, len(starts) + this.space.grid_size) if plan.sampler == "grid" else plan.trials

    def given(job: int) -> Mapping[str, Value]:
        if job < len(starts):
            return starts[job]
        return this.space.grid(job - len(starts)) if plan.sampler == "grid" else {}

    def one(trial: Trial, job: int) -> Sequence[float]:
        recipe = this.space.recipe_at({each.name: suggest(trial, each) for each in this.space.parameters})
        measure = partial(this.measure, trial, recipe, may_end=job >= len(starts))
        return _told(this, trial, f"trial {job + 1} of {trials}", measure)

    study = open_study(storage, this.name, sampler_of(plan.sampler, this.recipe.seed, given), this.directions)
    work(study, trials, one, deadline, this.note)
    return study


def work_on_finals(this: Search, storage: BaseStorage, study: optuna.Study, baselines: optuna.Study) -> optuna.Study:
    """Measure the search's finalists, as far as other workers do not; there is always time for them."""
    recipes = this.finalists(study, baselines)
    told = hashlib.sha256(json.dumps([choice_of(recipe) for recipe in recipes]).encode()).hexdigest()[:16]

    def one(trial: Trial, job: int) -> Sequence[float]:
        measure = partial(this.measure, trial, recipes[job], known=(study, baselines))
        return _told(this, trial, f"finalist {job + 1} of {len(recipes)}", measure)

    finals = open_study(storage, f"{this.name}-finals-{told}", sampler_of("random", 0, lambda job: {}), this.directions)
    work(finals, len(recipes), one, math.inf, this.note)
    return finals


def _told(this: Search, trial: Trial, label: str, measure: Callable[[], Sequence[float]]) -> Sequence[float]:
    """What `measure` finds, with a line about how it went and the best so far."""
    begin = time.perf_counter()
    this.note(f"{label} ...")
    shown = partial(quality_text, labels=this.plan.labels)
    known = [float(each.values[0]) for each in finished(trial.study)]
    said = "failed"
    try:
        values = measure()
        said, known = shown(values[0]), [*known, values[0]]
        return values
    except optuna.TrialPruned:
        said = "ended early"
        raise
    finally:
        best = f", best {shown(max(known))}" if known else ""
        choice = trial.user_attrs[RECIPE]["scorer"] if RECIPE in trial.user_attrs else ""
        this.note(f"{label}: {said} in {time.perf_counter() - begin:.1f} s{best}  {choice}")


def _content(
    this: Search, subject: Subject, study: optuna.Study, baselines: optuna.Study, finals: optuna.Study
) -> dict[str, Any]:
    """What search.json holds."""
    measured = rows_of(finals)
    rows = _with_parameters([row for row in measured if row["state"] == "complete"], this, study)
    here = [row for row in rows if row["ratio"] == this.recipe.ratio]
    if not here:
        reason = next((row["error"] for row in measured if row["error"]), "none was measured to the end")
        raise ResultError(f"no choice is left with all repairs: {reason}")
    default = with_repairs(this.space.recipe_at(this.space.defaults), this.recipe.repair)
    return {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "recipe": json.loads(this.recipe.to_json()),
        "objective": this.plan.objective,
        "objective_help": OBJECTIVES[this.plan.objective].help,
        "ratios": list(this.ratios),
        "labels": this.plan.labels,
        "sampler": this.plan.sampler,
        "trial_repair": list(this.space.recipe.repair),
        "study": this.name,
        "weights": subject.loaded.weights,
        "samples": {role: len(subject.splits.ids[role]) for role in ("score", "repair", "select")},
        "dense": this.bench.dense,
        "best": max(here, key=lambda row: row["value"]),
        "default": next((row for row in here if recipe_of(row, default) == default), None),
        "finals": rows,
        "pareto": {"budget": this.plan.pareto, "front": front(rows)} if this.plan.pareto else None,
        "trials": rows_of(study),
        "baselines": rows_of(baselines),
        "importances": importances(study),
    }


def _with_parameters(rows: Sequence[Row], this: Search, study: optuna.Study) -> list[Row]:
    """Finalists with the parameters of the trial that they are; those of baselines have none."""
    found = {}
    for row in reversed(rows_of(study)):
        found[with_repairs(recipe_of(row, this.recipe), this.recipe.repair)] = row["parameters"]
    return [{**row, "parameters": found.get(recipe_of(row, this.recipe), {})} for row in rows]
