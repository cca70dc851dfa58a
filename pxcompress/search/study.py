"""The Optuna study of a search: where trials are stored, which come first, and what each measures."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import optuna
import sqlalchemy
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback, Study
from optuna.trial import FrozenTrial, Trial, TrialState

from pxcompress.errors import InputError, PxError, unknown
from pxcompress.notes import Note
from pxcompress.search.objectives import Workbench, masked_area, shipped_quality
from pxcompress.search.space import Parameter, Space, Value

BEAT, GRACE, PATIENCE = 5, 30, 60
"""Seconds between a worker's heartbeats, until a silent worker counts as dead, and to wait for a locked SQLite file."""

OBJECTIVES = ("operating-point", "pxp")

SAMPLERS: Mapping[str, Callable[[int | None], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Name -> function that makes an Optuna sampler from a seed."""

DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class SearchPlan:
    """Options of a search besides its recipe; `storage` is a database URL, "" for a file in the folder."""

    objective: str = "operating-point"
    sampler: str = "tpe"
    trials: int = 50
    storage: str = ""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        if self.sampler not in SAMPLERS:
            raise unknown("sampler", self.sampler, SAMPLERS)
        if self.trials < 1:
            raise InputError(f"trials is {self.trials}; expected 1 or more")


@contextmanager
def load_optuna(url: str) -> Iterator[None]:
    """A context with Optuna imported and silent. Raises `InputError`, without the password, if the database fails."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0][:120]
        raise InputError(
            f"storage {url.partition('://')[0]!r} cannot be used ({reason}); expected sqlite:///FILE, "
            "postgresql+psycopg://user@host/name or mysql+pymysql://user@host/name"
        ) from error
    finally:
        optuna.logging.set_verbosity(level)


def open_storage(url: str, attempts: int = 3) -> RDBStorage:
    """A database in which workers have heartbeats; trials of dead workers are queued again."""
    waits = {"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else None
    retry = RetryHeartbeatStaleTrialCallback()
    try:
        return RDBStorage(url, waits, heartbeat_interval=BEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry)
    except sqlalchemy.exc.DatabaseError:  # another worker may make the tables in the same moment
        if attempts == 1:
            raise
        time.sleep(1)
        return open_storage(url, attempts - 1)


def open_study(storage: BaseStorage, space: Space, plan: SearchPlan) -> Study:
    """The study of a search; equal searches share one, wherever and however often they are started."""
    facts = [asdict(space.recipe), plan.objective, [asdict(each) for each in space.parameters]]
    study = optuna.create_study(
        storage=storage,
        study_name=f"pxcompress-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}",
        direction="maximize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        load_if_exists=True,
    )
    # Workers that share a storage must not all draw the same; one alone draws the same again.
    seed = None if plan.storage else space.recipe.seed + len(study.get_trials(deepcopy=False))
    study.sampler = SAMPLERS[plan.sampler](seed)
    return study


def work(study: Study, space: Space, plan: SearchPlan, bench: Workbench, note: Note) -> None:
    """Run trials until all workers together have run as many as planned."""
    for values in space.starts():
        study.enqueue_trial(values, skip_if_exists=True)
    if len(study.get_trials(deepcopy=False, states=DONE)) >= plan.trials:
        return

    def measure(trial: Trial) -> float:
        recipe = space.recipe_at({each.name: _suggest(trial, each) for each in space.parameters})
        trial.set_user_attr("scorer", recipe.scorer)
        try:
            return (
                shipped_quality(bench, recipe)
                if plan.objective == "operating-point"
                else masked_area(bench, recipe, trial)
            )
        except PxError as error:
            trial.set_user_attr("error", str(error))
            raise

    def tell(study: Study, trial: FrozenTrial) -> None:
        words = f"{trial.value:.2%}" if trial.state == TrialState.COMPLETE else trial.state.name.lower()
        note(f"trial {trial.number + 1}: {words}  {trial.user_attrs.get('error') or trial.user_attrs.get('scorer')}")

    study.optimize(measure, catch=(PxError,), callbacks=[tell, MaxTrialsCallback(plan.trials, states=DONE)])


def _suggest(trial: Trial, parameter: Parameter) -> Value:
    if parameter.choices:
        return str(trial.suggest_categorical(parameter.name, parameter.choices))
    return trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)
