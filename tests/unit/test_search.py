"""A search: its space, its objectives, its jobs, and the command as a user meets it."""

from __future__ import annotations

import copy
import dataclasses
import html
import importlib.util
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
import torch
from command import Outcome, Px, image_folder, one_line
from hypothesis import given
from hypothesis import strategies as st
from models import CLASSES, FlattenCNN, Subject, subject
from optuna.storages import fail_stale_trials
from optuna.storages._heartbeat import BaseHeartbeat, HeartbeatThread
from safetensors.torch import save_file

from pxcompress.attribution import COMPOSITES, has_attention, parse_composite
from pxcompress.commands.options import recipe_of
from pxcompress.errors import InputError, ResultError
from pxcompress.graph import masked
from pxcompress.layout.rows import input_layouts
from pxcompress.passes.moments import Remembered, moments
from pxcompress.recipe import Recipe
from pxcompress.repair.least_squares import LeastSquares
from pxcompress.report.search import search_page, search_table
from pxcompress.run import Run
from pxcompress.scorers import SCORERS
from pxcompress.search import SearchPlan, read_start
from pxcompress.search import run as run_module
from pxcompress.search import storage as storage_module
from pxcompress.search.objectives import (
    PXP_RATES,
    Workbench,
    middle_first,
    objective,
    only_masked,
    ratios_for,
    shipped,
    slim_at,
)
from pxcompress.search.results import front, leaders
from pxcompress.search.space import Space, space_of
from pxcompress.search.storage import GRACE, Journal, lasting, open_storage
from pxcompress.search.study import JOB, SAMPLERS, open_study, quiet, sampler_of, suggest, work
from pxcompress.stages import shrink
from pxcompress.state import seeded
from pxcompress.types import Batch, Plan

RECIPE = Recipe(model="m", ratio=0.5, budget="macs", round_to=1)


def _space(name: str = "full", **fields: Any) -> Space:
    return space_of(RECIPE.but(**fields), name, attention=True)


def test_every_searched_option_is_a_parameter_and_nothing_else() -> None:
    names = {parameter.name for parameter in _space().parameters}
    scorers = {"start", "aggregate", "centre", "metric", "follow", "ridge"}
    parts = ("low", "mid", "high", "classifier")
    rules = {*parts, *(f"{part}.{name}" for part in parts for name in ("epsilon", "gamma")), "softmax"}
    assert names == {*scorers, *rules, "scorer", "normalise", "fold.ridge"}
    assert "softmax" not in {each.name for each in space_of(RECIPE, "full", attention=False).parameters}


def test_scorers_that_share_a_parameter_agree_on_it() -> None:
    seen: dict[str, Any] = {}
    for name, field in itertools.chain.from_iterable(
        ((field.name, field) for field in SCORERS.options(scorer)) for scorer in ("lrp", "lrp-residual")
    ):
        if field.metadata.get("searched"):
            assert seen.setdefault(name, field.metadata["choices"]) == field.metadata["choices"]


@pytest.mark.parametrize("scorer", ["lrp-residual", "lrp:aggregate=squared,target=label", "lrp-residual:ridge=0.1"])
@pytest.mark.parametrize("composite", ["epsilon", "pxp-cnn", "zplus"])
def test_the_defaults_are_the_recipe(scorer: str, composite: str) -> None:
    sign = "," if ":" in scorer else ":"
    space = _space(scorer=f"{scorer}{sign}composite={composite}", repair=("fold:ridge=0.01", "batchnorm"))
    found = space.recipe_at(space.defaults)
    assert found == dataclasses.replace(space.recipe, repair=("fold", "batchnorm"))


def test_a_choice_by_hand() -> None:
    space = _space()
    chosen = {"low": "gamma", "low.gamma": 0.12345, "classifier": "zplus", "softmax": "attn", "fold.ridge": 0.02}
    recipe = space.recipe_at({**space.defaults, **chosen, "scorer": "lrp", "centre": "true", "normalise": "max"})
    text = "low=gamma(0.123)/gamma(0.0246)|mid=epsilon|high=epsilon|classifier=zplus|softmax=attn"
    assert recipe.scorer == f"lrp:composite={text},centre=true"
    assert (recipe.normalise, recipe.repair) == ("max", ("fold:ridge=0.02", "least-squares", "batchnorm"))
    assert str(parse_composite(text)) == text


@pytest.mark.parametrize("name", ["full", "pxp"])
def test_a_search_begins_with_the_named_composites(name: str) -> None:
    space = _space(name)
    recipes = [space.recipe_at(values) for values in space.starts()]
    assert recipes[0] == space.recipe_at(space.defaults)
    found = {parse_composite(SCORERS.build(recipe.scorer).composite) for recipe in recipes}
    assert found == {
        parse_composite(COMPOSITES[key]) for key in ("epsilon", "gamma", "zplus", "alpha2beta1", "pxp-cnn", "pxp-vit")
    }
    assert len({recipe.scorer for recipe in recipes}) == len(recipes)


def test_pxps_spaces_have_512_and_1536_choices_and_the_grid_holds_each_once() -> None:
    cnn = space_of(RECIPE, "pxp", attention=False)
    assert (cnn.grid_size, _space("pxp").grid_size) == (512, 1536)
    grid = [tuple(cnn.grid(place).items()) for place in range(512)]
    assert len(set(grid)) == 512
    assert len({cnn.recipe_at(dict(values)).scorer for values in grid}) == 512


def test_another_searchs_choice_is_kept_as_far_as_it_fits() -> None:
    space = space_of(RECIPE, "pxp", attention=False)
    assert space.fitting({"low": "gamma", "mid": "flat", "softmax": "attn", "x": 3}) == {
        **space.defaults,
        "low": "gamma",
    }


def test_what_another_searchs_choice_does_not_fit_is_told() -> None:
    space, told = space_of(RECIPE, "pxp", attention=False), []
    run_module._tell_unfit(space, SearchPlan(start={"low": "gamma", "mid": "flat", "softmax": "attn"}), told.append)
    assert told == ["--from: left out, because they cannot be chosen here: mid, softmax"]
    run_module._tell_unfit(space, SearchPlan(start=space.defaults), told.append)
    run_module._tell_unfit(space, SearchPlan(), told.append)
    assert len(told) == 1
    with pytest.raises(InputError, match=r"no parameter of this search \(softmax\)"):
        run_module._tell_unfit(space, SearchPlan(start={"softmax": "attn"}), told.append)


def test_a_choice_without_rules_is_nothing_to_begin_with(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"scorer": "taylor", "parameters": {}}')
    with pytest.raises(InputError, match="without rules"):
        read_start(tmp_path / "c.json")
    for text in ("", "[]", '{"parameters": 1}', "[" * 100_000):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(InputError, match="no choice of a search"):
            read_start(tmp_path / "c.json")


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return _bench(subject("flatten_cnn"), labels=True)


def _bench(net: Subject, *, labels: bool = True, recipe: Recipe = RECIPE) -> Workbench:
    with seeded(5):
        parts = {role: _batches(net) for role in ("score", "repair", "select")}
    return Workbench.of(net.model, net.inputs[:1], parts, recipe, labels)


def _batches(net: Subject) -> list[Batch]:
    inputs = [torch.randn(12, *net.inputs.shape[1:]) for _ in range(3)]
    with torch.no_grad():  # labels that the model mostly gets right, so that accuracy says something
        return [(x, net.model(x + 0.3 * torch.randn_like(x)).argmax(1)) for x in inputs]


def test_pxp_is_the_mean_accuracy_of_masked_models(bench: Workbench) -> None:
    recipe = _space("pxp").recipe_at(_space("pxp").defaults)
    scores = SCORERS.build("lrp")(bench.scored.model, bench.scored.structure.groups, bench.parts["score"])
    order = sorted(
        (
            (float(value), place, unit)
            for place, group in enumerate(bench.scored.structure.groups)
            for unit, value in enumerate(scores[group.name])
        ),
    )
    for rate in PXP_RATES[::5]:
        gone = order[: round(rate * len(order))]
        removed = {
            group.name: tuple(unit for _, place, unit in gone if place == here)
            for here, group in enumerate(bench.scored.structure.groups)
        }
        twin = masked(bench.scored.model, bench.scored.structure.groups, Plan(removed, "", "", 0, 0, 0))
        assert only_masked(bench, recipe, rate) == pytest.approx(_accuracy(twin, bench.parts["select"]))
    assert ratios_for("pxp", RECIPE, "") == PXP_RATES == tuple(k / 20 for k in range(20))
    assert objective("pxp").combine({0.0: 1.0, 0.5: 0.5, 0.9: 0.0}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "changes",
    [
        *({"scorer": name} for name in SCORERS),
        {"normalise": "knapsack", "min_keep": 0.2},
        {"repair": ("fold", "finetune:steps=3"), "seed": 7},
        {"repair": (), "normalise": "mean", "budget": "params", "ratio": 0.3},
        {"class_scores": True, "scope": "inner", "floors": ("*=0.2",)},
    ],
    ids=str,
)
def test_what_is_measured_is_what_run_makes(changes: dict[str, Any]) -> None:
    net, recipe = subject("flatten_cnn"), RECIPE.but(**changes)
    bench = _bench(net, recipe=recipe)
    assert recipe.ratio is not None
    measured = slim_at(bench, recipe, recipe.ratio).pruned
    with seeded(recipe.seed):
        torch.rand(3)  # where the generator stands does not count
        parts = {role: list(part) for role, part in bench.parts.items()}
        made = shrink(net.model, net.inputs[:1], Run(recipe, parts)).pruned
    assert measured.plan.removed == made.plan.removed
    found, expected = measured.model.state_dict(), made.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def _accuracy(model: torch.nn.Module, batches: Any) -> float:
    with torch.no_grad():
        right = [
            float(label) == float(logits.argmax())
            for x, y in batches
            for logits, label in zip(model(x), y, strict=True)
        ]
    return sum(right) / len(right)


def test_without_labels_the_divergence_from_the_dense_model_counts() -> None:
    unlabelled = _bench(subject("flatten_cnn"), labels=False)
    assert unlabelled.dense == pytest.approx(0.0, abs=1e-12)
    assert shipped(unlabelled, RECIPE, 0.5) < 0
    model, slim = (
        unlabelled.scored.model,
        subject(
            "flatten_cnn",
        ).model,
    )
    assert model is slim
    rough = FlattenCNN().eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for x, _ in unlabelled.parts["select"]:
            for p, q in zip(model(x).double().softmax(1), rough(x).double().softmax(1), strict=True):
                total += float((p * (p / q).log()).sum())
                count += 1
    assert unlabelled.quality(rough) == pytest.approx(-total / count, rel=1e-5)


def test_the_area_of_a_curve_by_hand() -> None:
    area = objective("curve").combine
    assert area({0.5: 0.6, 0.3: 1.0, 0.7: 0.0}) == pytest.approx((0.8 * 0.2 + 0.3 * 0.2) / 0.4)
    assert area({0.5: 0.6}) == 0.6
    assert ratios_for("curve", RECIPE, "0.7,0.3, 0.5") == (0.3, 0.5, 0.7)
    assert ratios_for("curve", RECIPE, "") == (0.125, 0.25, 0.375, 0.5)
    assert middle_first([0.1, 0.2, 0.3, 0.4]) == [0.2, 0.3, 0.1, 0.4]


def test_infinite_scores_end_a_trial(bench: Workbench) -> None:
    spoiled = copy.deepcopy(bench.scored.model)
    for weight in spoiled.parameters():
        weight.data.fill_(torch.inf)
    there = dataclasses.replace(bench, scored=dataclasses.replace(bench.scored, model=spoiled), scores={})
    with pytest.raises(ResultError, match="NaN or infinity"):
        shipped(there, RECIPE.but(scorer="magnitude"), 0.5)


class _Counted(list[Batch]):
    passes = 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        return super().__iter__()


def test_moments_are_computed_once_for_the_model_they_are_of() -> None:
    net = subject("flatten_cnn")
    batches = _Counted([(net.inputs, torch.zeros(len(net.inputs), dtype=torch.int64))])
    layouts = input_layouts(net.model, net.groups)
    kept = Remembered(batches, net.model)
    expected = moments(net.model, layouts, batches)
    some = dict(list(layouts.items())[:1])
    for asked in (some, layouts, some, layouts):
        found = moments(net.model, asked, kept)
        assert list(found) == list(asked)
        assert all(torch.equal(found[name].whole.second, expected[name].whole.second) for name in asked)
    assert batches.passes == 1 + 2  # the first, and one for each set of names that was not known
    with seeded(1):
        other = moments(FlattenCNN().eval(), layouts, kept)
    assert not torch.allclose(other["fc1"].whole.second, expected["fc1"].whole.second)


@pytest.mark.parametrize(("family", "has"), [("vit", True), ("flatten_cnn", False), ("mobilenetv3", False)])
def test_attention_is_found(family: str, has: bool) -> None:
    net = subject(family)
    assert has_attention(net.model, net.inputs[:1]) is has


def test_attention_of_torch_is_found() -> None:
    with seeded(0):
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert has_attention(layer, torch.randn(1, 3, 8))


# --- jobs


def _study(url: str, sampler: str = "random") -> optuna.Study:
    with quiet():
        given = {0: {"x": 0.25}}
        return open_study(open_storage(url), "s", sampler_of(sampler, 3, lambda job: given.get(job, {})))


def _run(study: optuna.Study, jobs: int, die_at: int = -1) -> list[tuple[int, float]]:
    """(job, x) of what this worker does; it is interrupted in job `die_at`."""
    done: list[tuple[int, float]] = []

    def evaluate(trial: optuna.Trial, job: int) -> list[float]:
        x = suggest(trial, PARAMETER)
        assert isinstance(x, float)
        done.append((job, x))
        if job == die_at:
            raise KeyboardInterrupt
        if job == 4:
            raise ResultError("no")
        return [x]

    with quiet():
        work(study, jobs, evaluate, float("inf"), lambda text: None)
    return done


PARAMETER = dataclasses.replace(_space().parameters[0], name="x", default=0.5, choices=(), low=0.0, high=1.0)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_jobs_go_on_where_a_worker_was_interrupted(tmp_path: Path, sampler: str, kind: str) -> None:
    urls = {"sqlite": f"sqlite:///{tmp_path}/{{}}.db", "journal": f"journal:{tmp_path}/{{}}.log"}[kind]
    whole = _run(_study(urls.format("whole"), sampler), 7)
    assert [job for job, _ in whole] == list(range(7))
    assert whole[0] == (0, 0.25)
    study = _study(urls.format("parts"), sampler)
    with pytest.raises(KeyboardInterrupt):
        _run(study, 7, die_at=3)
    rest = _run(_study(urls.format("parts"), sampler), 7)
    assert [job for job, _ in rest] == [3, 4, 5, 6], "the interrupted job again, the failed one not"
    assert rest[0][1] == whole[3][1]
    if sampler != "gp":  # whose fit depends on the trials' order
        assert rest == whole[3:]
    assert _run(_study(urls.format("parts"), sampler), 7) == []
    assert [job for job, _ in _run(_study(urls.format("parts"), sampler), 9)] == [7, 8]


def test_two_workers_in_turns_take_different_jobs(tmp_path: Path) -> None:
    study = _study(f"journal:{tmp_path}/log")
    sampler = study.sampler
    taken = []
    with quiet():
        trials = []
        for _ in range(3):
            trials.append(study.ask())
            taken.append(sampler.job)  # type: ignore[attr-defined]
    assert taken == [0, 1, 2]
    for trial, job in zip(trials, taken, strict=True):
        trial.set_user_attr(JOB, job)
    study.tell(trials[1], state=optuna.trial.TrialState.FAIL)
    with quiet():
        study.ask()
    assert sampler.job == 1, "that of the dead one"  # type: ignore[attr-defined]


def test_a_slow_worker_that_was_taken_for_dead_goes_on(tmp_path: Path) -> None:
    study, done, notes = _study(f"journal:{tmp_path}/log"), [], []

    def evaluate(trial: optuna.Trial, job: int) -> list[float]:
        done.append(job)
        if done in ([0, 1], [0, 1, 1]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if done == [0, 1, 1]:
            trial.report(0.5, 1)
        return [1.0]

    with quiet():
        work(study, 3, evaluate, float("inf"), notes.append)
    assert done == [0, 1, 1, 1, 2]
    assert len(notes) == 2
    assert [each.values for each in study.trials if each.state == optuna.trial.TrialState.COMPLETE] == [[1.0]] * 3


def test_a_worker_that_falls_silent_in_a_journal_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(storage_module.time, "monotonic", lambda: clock[0])
    with quiet():
        study, other = _study(f"journal:{tmp_path}/log"), _study(f"journal:{tmp_path}/log")
        trials = [study.ask() for _ in range(3)]
    ids = [trial._trial_id for trial in trials]
    one, two = (each._storage for each in (study, other))
    assert isinstance(one, Journal)
    assert isinstance(two, Journal)
    for trial_id in ids[:2]:
        one.record_heartbeat(trial_id)
    assert two._get_stale_trial_ids(other._study_id) == []
    clock[0] += GRACE + 1
    one.record_heartbeat(ids[0])
    assert two._get_stale_trial_ids(other._study_id) == [ids[1]], "the third one never showed a sign of life"
    with quiet():
        fail_stale_trials(other)
    one.record_heartbeat(ids[1])  # too late, and no error
    assert [each.state.name for each in other.trials] == ["RUNNING", "FAIL", "RUNNING"]


def test_who_dies_as_soon_as_he_has_a_job_is_found_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeartbeatThread, "start", lambda self: None)
    monkeypatch.setattr(HeartbeatThread, "join", lambda self: None)
    monkeypatch.setattr(storage_module, "GRACE", -1)
    study = _study(f"journal:{tmp_path}/log")
    stale = []

    def evaluate(trial: optuna.Trial, job: int) -> list[float]:
        assert isinstance(study._storage, BaseHeartbeat)
        stale.append(study._storage._get_stale_trial_ids(study._study_id) == [trial._trial_id])
        return [0.0]

    with quiet():
        work(study, 1, evaluate, float("inf"), lambda text: None)
    assert stale == [True]


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_an_error_of_our_own_ends_the_search(tmp_path: Path, error: type[Exception]) -> None:
    def evaluate(trial: optuna.Trial, job: int) -> list[float]:
        raise error("ours")

    with quiet(), pytest.raises(error, match="ours"):
        work(_study(f"journal:{tmp_path}/log"), 3, evaluate, float("inf"), lambda text: None)


# --- the command

SIZE = 16


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A model with weights and images for it."""
    folder = tmp_path_factory.mktemp("search")
    images = image_folder(folder / "images", {"train": 24, "val": 12}, CLASSES, SIZE)
    weights = folder / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), weights)
    fixed = ["--model", "models:FlattenCNN", "--ratio", "0.5", "--round-to", "1", "--budget", "macs"]
    return [*fixed, "--data", images, "--checkpoint", weights, "--input-size", SIZE]


def _search(px: Px, args: Sequence[object], out: Path, *more: object) -> Outcome:
    outcome = px("search", *args, "--out", out, *more)
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_search_ends_with_a_table_and_a_composite_that_run_takes(px: Px, args: list[object], tmp_path: Path) -> None:
    out = tmp_path / "found"
    outcome = _search(px, args, out, "--trials", 9, "--sampler", "random", "--no-labels")
    made = {path.name for path in out.iterdir() if not path.name.startswith("search.sqlite3-")}
    assert made == {"composite.json", "search.json", "search.html", "search.sqlite3"}
    content = json.loads((out / "search.json").read_text())
    best = content["best"]
    assert best["value"] == max(row["value"] for row in content["finals"])
    assert content["trial_repair"] == ["fold", "batchnorm"]
    assert {tuple(row["repair"]) for row in content["trials"]} >= {("fold", "batchnorm")}
    assert all("least-squares" in row["repair"] for row in content["finals"])
    assert [row["job"] for row in content["trials"]] == list(range(9))
    assert {row["scorer"] for row in content["baselines"]} == {
        "activation",
        "bn-scale",
        "integrated-gradients",
        "magnitude",
        "random",
        "taylor",
    }
    assert "repaired by fold, batchnorm, what is compared by all" in outcome.out
    assert re.search(r"trial 9 of 9: .* best KL \d", outcome.err)
    command = shlex.split(outcome.out.strip().splitlines()[-1].removeprefix("next: "))
    assert command[:2] == ["pxcompress", "run"]
    assert "" not in command
    assert command[command.index("--score") + 1] == f"@{out / 'composite.json'}"
    said = recipe_of({"model": "m", "ratio": 0.5, "scorer": f"@{out / 'composite.json'}"}, None)
    assert said.scorer == best["scorer"]
    page = (out / "search.html").read_text()
    assert page.isascii()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=.(?!#)", page)
    again = json.loads(_search(px, args, out, "--trials", 9, "--sampler", "random", "--no-labels", "--json").out)
    assert again == content, "nothing is measured again"


@pytest.mark.slow
def test_run_ships_what_a_search_measured(px: Px, args: list[object], tmp_path: Path) -> None:
    out = tmp_path / "found"
    more = ("--pareto", "params", "--ratios", "0.3,0.4", "--trials", 10, "--sampler", "random")
    outcome = _search(px, args, out, *more)
    content = json.loads((out / "search.json").read_text())
    commands = [outcome.out.strip().splitlines()[-1].removeprefix("next: ")]
    commands += re.findall(
        r"pxcompress run [^<\n]*front-1\.json[^<\n]*", html.unescape((out / "search.html").read_text())
    )
    assert len(commands) == 2
    for place, (command, row) in enumerate(
        zip(commands, (content["best"], content["pareto"]["front"][0]), strict=True)
    ):
        ran = px(*shlex.split(command)[1:], "--out", tmp_path / str(place), "--json", "--quiet")
        assert ran.code == 0, ran.err
        stages = json.loads(ran.out)["stages"]
        assert [stage["top1_after"] for stage in stages if stage["top1_after"] is not None][-1] == row["value"]


def test_a_longer_search_goes_on_and_a_warm_start_comes_first(px: Px, args: list[object], tmp_path: Path) -> None:
    out, other = tmp_path / "a", tmp_path / "b"
    more = ("--space", "pxp", "--sampler", "grid")
    _search(px, args, out, *more, "--trials", 7)
    first = json.loads((out / "search.json").read_text())
    _search(px, args, out, *more, "--trials", 9)
    second = json.loads((out / "search.json").read_text())
    assert second["trials"][:7] == first["trials"]
    assert [row["state"] for row in second["trials"]] == ["complete"] * 9
    chosen = json.loads((out / "composite.json").read_text())
    chosen["parameters"] |= {"low": "zplus", "mid": "gamma", "aggregate": "signed"}
    (tmp_path / "own.json").write_text(json.dumps(chosen))
    _search(px, args, other, "--objective", "pxp", "--trials", 1, "--from", tmp_path / "own.json")
    content = json.loads((other / "search.json").read_text())
    assert content["ratios"] == list(PXP_RATES)
    row = content["trials"][0]
    assert row["parameters"] == {**second["trials"][0]["parameters"], **chosen["parameters"]}


def test_values_below_zero_are_shown(px: Px, args: list[object], tmp_path: Path) -> None:
    out = tmp_path / "explained"
    outcome = _search(px, args, out, "--objective", "explained", "--trials", 1, "--repair", "none", "--ratio", "0.8")
    content = json.loads((out / "search.json").read_text())
    content["best"], content["default"] = {**content["best"], "value": -0.1}, {**content["best"], "value": -0.2}
    assert "-10.00%" in search_table(content, "c.json")
    assert "within the noise" in search_table(content, "c.json")
    assert "-0.2" in search_page(content, "c.json").replace("\N{MINUS SIGN}", "-").replace("&#8722;", "-")
    assert "explained: " in outcome.out


def test_bad_trials_end_early_but_not_the_named_composites(px: Px, args: list[object], tmp_path: Path) -> None:
    more = ("--objective", "curve", "--ratios", "0.2,0.4,0.6", "--space", "pxp", "--sampler", "random", "--no-labels")
    outcome = _search(px, args, tmp_path / "curve", *more, "--trials", 16)
    content = json.loads((tmp_path / "curve" / "search.json").read_text())
    states = [row["state"] for row in content["trials"]]
    assert set(states[:6]) == {"complete"}
    assert "pruned" in states[6:]
    assert "KL" in outcome.out
    assert content["dense"] == pytest.approx(0, abs=1e-9)
    measured = [row for row in content["trials"] if row["state"] == "complete" and row["same_as"] is None]
    assert all([point[0] for point in row["points"]] == [0.2, 0.4, 0.6] for row in measured)


def test_with_full_trials_nothing_is_measured_twice(px: Px, args: list[object], tmp_path: Path) -> None:
    outcome = _search(px, args, tmp_path / "full", "--trials", 2, "--full-trials", "--repair", "least-squares")
    content = json.loads((tmp_path / "full" / "search.json").read_text())
    assert content["trial_repair"] == content["recipe"]["repair"] == ["least-squares"]
    known = {json.dumps([row["scorer"], row["normalise"]]): row for row in content["trials"] + content["baselines"]}
    for row in content["finals"]:
        assert row["points"] == known[json.dumps([row["scorer"], row["normalise"]])]["points"]
        assert row["value"] == known[json.dumps([row["scorer"], row["normalise"]])]["value"]
    assert "what is compared by all" not in outcome.out


def test_a_front_of_quality_and_cost(px: Px, args: list[object], tmp_path: Path) -> None:
    more = ("--pareto", "params", "--ratios", "0.2,0.35", "--no-labels", "--trials", 12, "--sampler", "random")
    outcome = _search(px, args, tmp_path / "front", *more)
    content = json.loads((tmp_path / "front" / "search.json").read_text())
    assert content["ratios"] == [0.2, 0.35, 0.5]
    assert {row["ratio"] for row in content["trials"]} == {0.2, 0.35, 0.5}
    assert content["best"]["ratio"] == content["default"]["ratio"] == 0.5
    front = content["pareto"]["front"]
    assert [row["cost"] for row in front] == sorted({row["cost"] for row in front})
    assert all(0 < row["cost"] < 1 for row in content["finals"])
    for row in content["finals"]:
        assert any(other["cost"] <= row["cost"] and other["value"] >= row["value"] for other in front)
    assert "front: params left" in outcome.out
    assert {path.name for path in (tmp_path / "front").glob("front-*")} == {
        f"front-{k + 1}.json" for k in range(len(front))
    }
    chosen = json.loads((tmp_path / "front" / "front-1.json").read_text())
    assert {key: chosen[key] for key in ("scorer", "ratio", "value", "cost")} == {
        key: front[0][key] for key in ("scorer", "ratio", "value", "cost")
    }
    assert chosen["made_by"]["recipe"] == content["recipe"]
    page = (tmp_path / "front" / "search.html").read_text()
    assert page.count("<svg") == 4
    assert page.count("--ratio 0.35") == sum(row["ratio"] == 0.35 for row in front)


def test_the_price_is_that_of_the_model_that_ships(bench: Workbench) -> None:
    slim = slim_at(bench, RECIPE, 0.5)
    dense, left = (
        sum(each.numel() for each in model.parameters()) for model in (bench.scored.model, slim.pruned.model)
    )
    assert run_module.price_in("params", bench, RECIPE)(slim) == pytest.approx(left / dense)


def test_leaders_are_different_choices_that_were_measured_to_the_end() -> None:
    choice = {"scorer": "lrp", "normalise": "none", "repair": [], "ratio": 0.5}
    rows = [
        {**choice, "state": "complete", "value": 0.5},
        {**choice, "state": "complete", "value": 0.5},
        {**choice, "state": "pruned", "value": 0.9, "scorer": "ended"},
        {**choice, "state": "fail", "value": None, "scorer": "failed"},
        {**choice, "state": "complete", "value": 0.7, "repair": ["fold"]},
        {**choice, "state": "complete", "value": 0.1, "ratio": 0.4},
    ]
    assert [row["value"] for row in leaders(rows, 3)] == [0.7, 0.5, 0.1]
    assert [row["value"] for row in leaders(rows, 1)] == [0.7]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_a_front_holds_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    rows = [{"value": value, "cost": cost} for value, cost in points]
    best = {(v, c) for v, c in points if not any((a >= v and b <= c) and (a, b) != (v, c) for a, b in points)}
    found = [(row["value"], row["cost"]) for row in front([*rows, {"value": None, "cost": None}])]
    assert len(found) == len(best)
    assert set(found) == best


class _Forbidden:
    def __iter__(self) -> Iterator[Batch]:
        raise RuntimeError("a search reads test or certify")


def test_test_and_certify_are_never_read(
    px: Px, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.load_subject

    def guarded(recipe: Recipe) -> Any:
        found = real(recipe)
        splits = dataclasses.replace(found.splits, test=_Forbidden(), certify=_Forbidden())
        return dataclasses.replace(found, splits=splits)

    monkeypatch.setattr(run_module, "load_subject", guarded)
    _search(px, args, tmp_path / "a", "--trials", 1)
    assert (tmp_path / "a" / "composite.json").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective", "curv"], "did you mean curve"),
        (["--sampler", "bayes"], "known: gp, grid, random, tpe"),
        (["--space", "all"], "known: full, pxp"),
        (["--trials", 0], "1 or more"),
        (["--timeout", 0], "above 0"),
        (["--ratios", "0.3,0.5"], "no effect"),
        (["--pareto", "mac"], "did you mean macs"),
        (["--pareto", "macs", "--objective", "curve"], "operating-point"),
        (["--pareto", "macs", "--ratios", "0.3;0.5"], "as 0.3,0.5,0.7"),
        (["--objective", "curve", "--ratios", "0.3;0.5"], "as 0.3,0.5,0.7"),
        (["--objective", "curve", "--ratios", "0.3"], "two or more"),
        (["--objective", "pxp", "--no-labels"], "defined by labels"),
        (["--from", "nowhere.json"], "cannot be read"),
        (["--from", __file__], "composite.json"),
        (["--score", "@nowhere.json"], "cannot be read"),
        (["--score", f"@{__file__}"], "composite.json"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(
    px: Px, args: list[object], tmp_path: Path, more: list[object], said: str
) -> None:
    out = tmp_path / "never"
    assert said in one_line(px("search", *args, "--out", out, *more))
    assert not out.exists()


def test_places_and_storages_that_cannot_be_used(px: Px, args: list[object], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "something else" in one_line(px("search", *args, "--out", tmp_path))
    places = ["postgresql+psycopg://u:secret@127.0.0.1:1/none", "nonsense", "sqlite:////no/such/folder/x.db"]
    places += ["sqlite://", "sqlite:///:memory:", "journal:/no/such/folder/x.log", "oracle+nodriver://u:secret@h/x"]
    for storage in places:
        line = one_line(px("search", *args, "--quiet", "--out", tmp_path / "o", "--storage", storage))
        assert "cannot be used" in line
        assert "secret" not in line
    config = tmp_path / "recipe.toml"
    config.write_text("rounds = 3\n")
    assert "--rounds" in one_line(px("search", *args, "--config", config, "--out", tmp_path / "o"))


@pytest.mark.skipif(importlib.util.find_spec("MySQLdb") is not None, reason="the driver is installed")
def test_a_missing_driver_is_named() -> None:
    with (
        quiet(),
        pytest.raises(InputError, match=r"'mysql' cannot be used .*'MySQLdb', its driver; install it") as caught,
    ):
        open_storage("mysql://u:secret@h/x")
    assert "secret" not in str(caught.value)


def test_a_storage_that_is_gone_in_the_middle_is_one_line(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    study = _study(url)
    assert isinstance(study._storage, optuna.storages._CachedStorage)
    with sqlalchemy.create_engine(url).begin() as connection:
        connection.execute(sqlalchemy.text("DROP TABLE trials"))
    with (
        quiet(),
        pytest.raises(InputError, match=r"'sqlite' does not answer any more .*no such table: trials"),
        lasting(url),
    ):
        study.ask()


def test_a_search_that_had_no_time_says_so(px: Px, args: list[object], tmp_path: Path) -> None:
    assert "--timeout" in one_line(px("search", *args, "--quiet", "--out", tmp_path / "o", "--timeout", 1e-6))


def test_a_search_whose_finalists_all_fail_says_why(
    px: Px, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ResultError("it did not fit")

    monkeypatch.setattr(LeastSquares, "__call__", fail)
    outcome = px("search", *args, "--quiet", "--out", tmp_path / "o", "--trials", 1)
    assert one_line(outcome, 3).endswith("no choice is left with all repairs: it did not fit")
