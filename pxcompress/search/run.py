"""Runs a search and writes its files: composite.json, search.json, and a page with Optuna's plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import matplotlib as mpl
import optuna
from matplotlib.figure import Figure
from optuna.study import Study
from optuna.trial import TrialState

from pxcompress.attribution import has_attention
from pxcompress.cache import whole_file
from pxcompress.clock import Clock
from pxcompress.errors import InputError
from pxcompress.notes import Note
from pxcompress.pipeline import open_run, with_measured_alignment
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.report.figures import render_figure
from pxcompress.report.pages import Picture, render
from pxcompress.report.summary import format_percent, wilson_interval
from pxcompress.search.objectives import Workbench
from pxcompress.search.space import Space, Value, make_pxp_space, make_space
from pxcompress.search.study import SearchPlan, load_optuna, open_storage, open_study, work
from pxcompress.state import seeded

COMPOSITE, RESULT, PAGE, STORAGE = "composite.json", "search.json", "search.html", "search.sqlite3"
HEAD = ("trial", "top-1", "choice")


@dataclass(frozen=True)
class Choice:
    """One completed trial: its scorer and ranking, and its quality on the select split."""

    trial: int
    scorer: str
    normalise: str
    value: float
    parameters: Mapping[str, Value]


@dataclass(frozen=True)
class SearchResult:
    """The content of search.json. `default` is the trial of the recipe's own choice, None if it was not run."""

    best: Choice
    default: Choice | None
    trials: tuple[Choice, ...]
    dense: float
    notes: tuple[str, ...]

    def rows(self, count: int) -> list[tuple[str, str, str]]:
        """Table rows for the `count` best trials, and the default in any case, under `HEAD`."""
        ranked_trials = sorted(self.trials, key=lambda choice: -choice.value)
        choices = [each for place, each in enumerate(ranked_trials) if place < count or each == self.default]
        names = [f"{each.trial + 1}{' (default)' if each == self.default else ''}" for each in choices]
        return [
            (name, format_percent(of.value), f"{of.scorer}, {of.normalise}")
            for name, of in zip(names, choices, strict=True)
        ]


def search(recipe: Recipe, plan: SearchPlan, out: Path, note: Note) -> SearchResult:
    """Search around `recipe` as `plan` says, and write composite.json, search.json and search.html into `out`.

    Started again, also after it was killed, it goes on; started several times with one storage, the workers share the
    trials. Sees the score, repair and select parts of the data only. Raises `InputError`, and `BudgetError` where no
    plan reaches the ratio.
    """
    _check(recipe, out)
    clock = Clock(note)
    recipe = with_measured_alignment(recipe, clock)
    if not plan.storage:
        out.mkdir(parents=True, exist_ok=True)
    url = plan.storage or f"sqlite:///{(out / STORAGE).resolve()}"
    with load_optuna(url):
        storage = open_storage(url)
    with seeded(recipe.seed):
        workload, run = open_run(recipe, clock)
        model, splits = workload.loaded.model, workload.splits
        bench = Workbench(*prepare(model, splits.example, run))
        space = make_search_space(recipe, plan.objective, attention=has_attention(model, splits.example))
        with load_optuna(url):
            study = open_study(storage, space, plan)
            work(study, space, plan, bench, note)
            result = _make_result(study, space, bench, len(splits.ids["select"]))
            page = _make_page(result, study, recipe)
    made_by = {"objective": plan.objective, "recipe": asdict(recipe)}
    composite = json.dumps({**asdict(result.best), "made_by": made_by}, indent=1)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in {COMPOSITE: composite, RESULT: json.dumps(asdict(result), indent=1), PAGE: page}.items():
        with whole_file(out / name) as beside:
            beside.write_text(text, encoding="utf-8")
    return result


def make_search_space(recipe: Recipe, objective: str, *, attention: bool) -> Space:
    """The parameters to vary for an objective; costly repairs are left out of trials."""
    if objective == "pxp":
        return make_pxp_space(recipe, attention=attention)
    quick = [text for text in recipe.repair if not REPAIRS.build(text).costly]
    return make_space(recipe.but(repair=tuple(quick)), attention=attention)


def _check(recipe: Recipe, out: Path) -> None:
    """Raise `InputError` for options that a search does not support, and for a folder with other content."""
    if recipe.rounds > 1 or recipe.guarantee:
        raise InputError("a search knows no --rounds or --max-drop; leave them out, and give them to run")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if out.is_file() or (names and STORAGE not in names and RESULT not in names):
        raise InputError(f"{str(out)!r} holds something else than a search; choose another --out")


def _make_result(study: Study, space: Space, bench: Workbench, samples: int) -> SearchResult:
    """The results of all trials of `study`, with a note if the gain over the default is within the noise.

    Raises `InputError` if no trial was measured to the end.
    """
    trials = study.get_trials(deepcopy=False)
    choices = []
    for trial in trials:
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            candidate = space.recipe_at(trial.params)
            choices.append(Choice(trial.number, candidate.scorer, candidate.normalise, trial.value, trial.params))
    if not choices:
        reasons = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
        raise InputError(f"no trial was measured to the end: {[*reasons, 'all were stopped'][0]}; give more --trials")
    best_choice = max(choices, key=lambda each: each.value)
    default = next((each for each in choices if dict(each.parameters) == space.defaults), None)
    states = [trial.state for trial in trials]
    notes = [
        f"{len(choices)} trials measured to the end, {states.count(TrialState.PRUNED)} ended early, "
        f"{states.count(TrialState.FAIL)} failed, on {samples} images of select; dense {format_percent(bench.dense)}",
        f"trials are repaired by {', '.join(space.recipe.repair) or 'nothing'}; `run` measures the best one on test",
    ]
    if default and wilson_interval(default.value, samples).high > best_choice.value:
        notes.append(
            f"{100 * (best_choice.value - default.value):.2f} points over the default lie within the noise of select"
        )
    return SearchResult(best_choice, default, tuple(choices), bench.dense, tuple(notes))


def _make_page(result: SearchResult, study: Study, recipe: Recipe) -> str:
    """The search as one self-contained HTML page with Optuna's plots: history, and importances if 8 values differ."""
    from matplotlib import pyplot

    plots = optuna.visualization.matplotlib
    finished_trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    with mpl.rc_context({"backend": "agg"}):
        axes_by_caption = {"Value of every trial, and the best so far": plots.plot_optimization_history(study)}
        if len({trial.value for trial in finished_trials}) >= 8:
            axes_by_caption["Importance of each parameter"] = plots.plot_param_importances(study)
        files = {words: render_figure(cast(Figure, axes.figure), "svg") for words, axes in axes_by_caption.items()}
        pyplot.close("all")
    return render(
        "search.html",
        title=f"search for {recipe.model} on {recipe.data}",
        images=True,
        head=HEAD,
        rows=result.rows(20),
        notes=result.notes,
        pictures=[Picture.of(file, "svg+xml", words) for words, file in files.items()],
        recipe=asdict(recipe),
    )
