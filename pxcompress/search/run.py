"""A search from its recipe to its files: which choice of rules, score, normalisation and repair prunes best."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from pxcompress.attribution import has_attention
from pxcompress.cache import whole_file
from pxcompress.clock import Clock, Note
from pxcompress.errors import InputError, ResultError, unknown
from pxcompress.pipeline import aligned
from pxcompress.recipe import Recipe
from pxcompress.report.search import quality_text, search_page
from pxcompress.search.objectives import OBJECTIVES, Bench, Objective, middle_first, objective, ratios_for
from pxcompress.search.space import SPACES, Space, Value, plain_scorers, space_of
from pxcompress.search.study import ERROR, JOB, open_storage, open_study, quiet, sampler_of, sqlite, suggest, work
from pxcompress.state import seeded
from pxcompress.subject import Subject, load_subject, with_baseline

COMPOSITE, RESULT, PAGE, STORAGE = "composite.json", "search.json", "search.html", "search.sqlite3"

SCHEMA_VERSION = 1

CHOICE = ("scorer", "normalise", "repair")
"""Fields of a recipe that a search chooses."""

RECIPE = "recipe"
"""Under which a trial says them."""

LEAST_FOR_IMPORTANCES = 8
"""Finished trials."""


@dataclass(frozen=True)
class SearchPlan:
    """What is asked of a search beside its recipe. `timeout` is in seconds; `storage` as `open_storage` takes it.

    `ratios` and `space` are "" for the objective's own; `start` holds parameters of an earlier search.
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

    def __post_init__(self) -> None:
        if self.space not in ("", *SPACES):
            raise unknown("space", self.space, SPACES)
        if self.trials < 1:
            raise InputError(f"trials is {self.trials}; expected 1 or more")
        if not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout:g}; expected seconds above 0")
        if self.objective == "pxp" and not self.labels:
            raise InputError("objective 'pxp' is defined by labels; leave out --no-labels, or ask for curve")


@dataclass(frozen=True, eq=False)
class Search:
    """A search that can be worked on."""

    plan: SearchPlan
    recipe: Recipe
    objective: Objective
    ratios: tuple[float, ...]
    space: Space
    bench: Bench
    note: Note

    @property
    def name(self) -> str:
        """Name of its study: the same for the same search, wherever and however often it is started."""
        facts = [asdict(self.recipe), self.plan.objective, self.ratios, self.plan.labels, self.plan.sampler]
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

    def measure(self, trial: Trial, recipe: Recipe, *, may_end: bool) -> float:
        """The objective of `recipe`, noted in `trial`; what was measured before is not measured again."""
        choice = _choice(recipe)
        trial.set_user_attr(RECIPE, choice)
        same = next((each for each in finished(trial.study) if each.user_attrs[RECIPE] == choice), None)
        if same is not None:
            trial.set_user_attr("points", same.user_attrs["points"])
            trial.set_user_attr("same_as", same.user_attrs.get("same_as", same.user_attrs[JOB]))
            return float(same.values[0])
        points: dict[float, float] = {}
        for step, ratio in enumerate(middle_first(self.ratios), start=1):
            points[ratio] = self.objective.point(self.bench, recipe, ratio)
            if not math.isfinite(points[ratio]):
                raise ResultError(f"the model pruned by {recipe.scorer} gives no finite logits")
            trial.report(self.objective.combine(points), step)
            if trial.should_prune() and may_end and step < len(self.ratios):
                raise optuna.TrialPruned
        trial.set_user_attr("points", [[ratio, points[ratio]] for ratio in self.ratios])
        return self.objective.combine(points)


def search(recipe: Recipe, plan: SearchPlan, out: Path, note: Note) -> Mapping[str, Any]:
    """Search as `plan` says around `recipe`, and write composite.json, search.json and search.html into `out`.

    Started again, also after it was killed, it goes on; started several times with one storage, they share the work.
    Returns what search.json holds. Sees the score, repair and select parts of the data only. Raises `InputError`, and
    `BudgetError` where no plan reaches the ratios.
    """
    _check(recipe, out)
    recipe = aligned(recipe, Clock(note))
    chosen = objective(plan.objective)
    ratios = ratios_for(plan.objective, recipe, plan.ratios)
    sampler_of(plan.sampler, 0, lambda job: {})  # an unknown one is found before any work
    deadline = time.monotonic() + plan.timeout
    with seeded(recipe.seed), quiet():
        if not plan.storage:
            out.mkdir(parents=True, exist_ok=True)
        storage = open_storage(plan.storage or sqlite(out / STORAGE))
        subject = with_baseline(load_subject(recipe), recipe.seed, note)
        model, splits = subject.loaded.model, subject.splits
        parts = {"score": splits.score, "repair": splits.repair, "select": splits.select}
        reach = recipe.but(ratio=max(ratios)) if plan.objective == "curve" else recipe
        bench = Bench.of(model, splits.example, parts, reach, plan.labels)
        space = space_of(recipe, plan.space or chosen.space, attention=has_attention(model, splits.example))
        this = Search(plan, recipe, chosen, ratios, space, bench, note)
        baselines = work_on_baselines(this, storage, deadline)
        study = work_on_trials(this, storage, deadline)
        if not finished(study) and not finished(baselines):
            raise InputError(f"no trial ended in {plan.timeout:g} s; give more --timeout, and the search goes on")
        content = _content(this, subject, study, baselines)
    _write(out, content)
    return content


def _check(recipe: Recipe, out: Path) -> None:
    """Raise `InputError` for what a search does not do, and for a folder that holds something else."""
    if recipe.rounds > 1 or recipe.guarantee or recipe.class_guard:
        raise InputError(
            "a search knows no --rounds, --max-drop or --class-guard; leave them out, and give them to run"
        )
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not any((out / n).exists() for n in _OURS))):
        raise InputError(f"{str(out)!r} holds something else than a search; choose another --out")


_OURS = (STORAGE, RESULT)


def work_on_baselines(this: Search, storage: BaseStorage, deadline: float = math.inf) -> optuna.Study:
    """Measure the search's baselines, as far as other workers do not, until the monotonic time `deadline`."""

    def one(trial: Trial, job: int) -> float:
        return _told(this, trial, f"baseline {job + 1}", this.baselines()[job], may_end=False)

    study = open_study(storage, f"{this.name}-baselines", sampler_of("random", 0, lambda job: {}))
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

    def one(trial: Trial, job: int) -> float:
        recipe = this.space.recipe_at({each.name: suggest(trial, each) for each in this.space.parameters})
        return _told(this, trial, f"trial {job + 1} of {trials}", recipe, may_end=job >= len(starts))

    study = open_study(storage, this.name, sampler_of(plan.sampler, this.recipe.seed, given))
    work(study, trials, one, deadline, this.note)
    return study


def _told(this: Search, trial: Trial, label: str, recipe: Recipe, *, may_end: bool) -> float:
    """`Search.measure`, with a line about how it went and the best so far."""
    begin = time.perf_counter()
    this.note(f"{label} ...")
    shown = partial(quality_text, labels=this.plan.labels)
    known = [float(each.values[0]) for each in finished(trial.study)]
    said = "failed"
    try:
        value = this.measure(trial, recipe, may_end=may_end)
        said, known = shown(value), [*known, value]
        return value
    except optuna.TrialPruned:
        said = "ended early"
        raise
    finally:
        best = f", best {shown(max(known))}" if known else ""
        this.note(f"{label}: {said} in {time.perf_counter() - begin:.1f} s{best}  {recipe.scorer}")


def _choice(recipe: Recipe) -> dict[str, Any]:
    """What a search chooses of a recipe, as JSON holds it."""
    return {name: list(value) if isinstance(value := getattr(recipe, name), tuple) else value for name in CHOICE}


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were measured to the end."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _content(this: Search, subject: Subject, study: optuna.Study, baselines: optuna.Study) -> dict[str, Any]:
    """What search.json holds."""
    rows, others = _rows(study), _rows(baselines)
    complete = [row for row in rows if row["state"] == "complete"]
    every = [*complete, *(row for row in others if row["state"] == "complete")]
    default = _choice(this.space.recipe_at(this.space.defaults))
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": asdict(this.recipe),
        "objective": this.plan.objective,
        "objective_help": OBJECTIVES[this.plan.objective].help,
        "ratios": list(this.ratios),
        "labels": this.plan.labels,
        "sampler": this.plan.sampler,
        "study": this.name,
        "weights": subject.loaded.weights,
        "samples": {role: len(subject.splits.ids[role]) for role in ("score", "repair", "select")},
        "dense": this.bench.dense,
        "best": max(every, key=lambda row: row["value"]),
        "default": next((row for row in complete if {key: row[key] for key in CHOICE} == default), None),
        "trials": rows,
        "baselines": others,
        "importances": _importances(study),
    }


def _rows(study: optuna.Study) -> list[dict[str, Any]]:
    """One row a job, by job; of a job that was begun several times the last one."""
    rows = {}
    for trial in study.get_trials(deepcopy=False):
        known = trial.user_attrs
        if JOB not in known or RECIPE not in known:
            continue
        row = {"job": known[JOB], "state": trial.state.name.lower(), **known[RECIPE]}
        row |= {"value": trial.values[0] if trial.values else None, "points": known.get("points", [])}
        row |= {"seconds": trial.duration.total_seconds() if trial.duration else None, "error": known.get(ERROR, "")}
        rows[known[JOB]] = row | {"same_as": known.get("same_as"), "parameters": dict(trial.params)}
    return [rows[job] for job in sorted(rows)]


def _importances(study: optuna.Study) -> dict[str, float]:
    """How much each parameter matters (PED-ANOVA), the greatest first; nothing where trials are few or all alike."""
    values = {trial.values[0] for trial in finished(study)}
    if len(finished(study)) < LEAST_FOR_IMPORTANCES or len(values) < 2:
        return {}
    return {name: float(value) for name, value in optuna.importance.get_param_importances(study).items()}


def _write(out: Path, content: Mapping[str, Any]) -> None:
    """All three files, each whole; several workers write the same."""
    best: Mapping[str, Any] = content["best"]
    made_by = {key: content[key] for key in ("objective", "ratios", "labels", "sampler", "samples", "study", "recipe")}
    composite = {key: best[key] for key in ("scorer", "normalise", "repair", "parameters", "value")}
    out.mkdir(parents=True, exist_ok=True)
    files = {
        COMPOSITE: json.dumps({**composite, "made_by": made_by}, indent=1, allow_nan=False),
        RESULT: json.dumps(content, indent=1, allow_nan=False),
        PAGE: search_page(content, str(out / COMPOSITE)),
    }
    for name, text in files.items():
        with whole_file(out / name) as beside:
            beside.write_text(text)


def read_start(path: Path) -> dict[str, Value]:
    """The parameters that a composite.json holds; `InputError` where it holds none."""
    try:
        parameters = json.loads(path.read_text())["parameters"]
        return {str(key): value for key, value in parameters.items()}
    except OSError as error:
        raise InputError(f"--from {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"--from {str(path)!r} holds no choice of a search; expected a composite.json that one wrote"
        ) from error
