"""Jobs that several workers share through one storage: each is done once, whoever dies on the way.

Job j is the j-th choice of a search. A trial takes the lowest job that no other trial has taken, so there is no queue
that could be lost: the job of a worker that died (Optuna's heartbeat says so) or was interrupted is free again, and the
trial that takes it up has the same parameters. Draws are seeded by job, whichever worker makes them.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, fail_stale_trials
from optuna.storages._heartbeat import BaseHeartbeat, get_heartbeat_thread
from optuna.trial import FrozenTrial, Trial, TrialState

from pxcompress.errors import PxError, unknown
from pxcompress.notes import Note
from pxcompress.search.space import Parameter, Value, Values
from pxcompress.search.storage import GRACE, HEARTBEAT

REDUCTION = 3
"""Of so many trials that were measured equally often, one goes on (successive halving)."""

Direction = Literal["maximize", "minimize"]

JOB, ERROR = "job", "error"
"""What a trial is about, and why it has no value."""

SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "grid": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""Seed -> sampler. Of the grid all choices are given, see `Space.grid`."""


@contextmanager
def quiet() -> Iterator[None]:
    """Neither Optuna's messages nor its warnings of what may change."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def taken(trials: Sequence[FrozenTrial]) -> set[int]:
    """Jobs that are done or in work; those of trials that died or were interrupted are not."""
    return {
        each.user_attrs[JOB]
        for each in trials
        if JOB in each.user_attrs and (each.state != TrialState.FAIL or ERROR in each.user_attrs)
    }


def _silent(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that are about to take a job; one that takes longer than `GRACE` has died before its first heartbeat."""
    since = datetime.now() - timedelta(seconds=GRACE)
    begun = [each for each in trials if each.state == TrialState.RUNNING and JOB not in each.user_attrs]
    return [each for each in begun if each.datetime_start is None or each.datetime_start > since]


def _job(trials: Sequence[FrozenTrial], number: int) -> int:
    """The job that trial `number` takes; trials before it that have not yet said theirs take the lower ones."""
    before = sum(each.number < number for each in _silent(trials))
    gone = taken(trials)
    free = (job for job in itertools.count() if job not in gone)
    return next(itertools.islice(free, before, None))


def _all(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False)


class JobSampler(BaseSampler):
    """Takes a job for every trial, and draws its parameters from a sampler seeded by it.

    `given` says the values of jobs that are not drawn; a job that was begun before keeps its values.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, given: Callable[[int], Values]) -> None:
        self._make, self._seed, self._given = make, seed, given
        self._inner = make(seed)
        self._known: Values = {}
        self.job = 0

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Take a job."""
        trials = _all(study)
        self.job = _job(trials, trial.number)
        begun = [each.params for each in trials if each.user_attrs.get(JOB) == self.job]
        self._known = begun[-1] if begun else self._given(self.job)
        self._inner = self._make((self._seed * 1_000_003 + self.job) % 2**32)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing for a job whose values are known."""
        return {} if self._known else self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values that the inner sampler draws together."""
        return self._inner.sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The known value, or one that the inner sampler draws."""
        if param_name in self._known:
            return self._known[param_name]
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Let the inner sampler know."""
        self._inner.after_trial(study, trial, state, values)


def sampler_of(name: str, seed: int, given: Callable[[int], Values]) -> JobSampler:
    """The sampler called `name`; `InputError` lists them."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return JobSampler(SAMPLERS[name], seed, given)


def open_study(
    storage: BaseStorage, name: str, sampler: JobSampler, directions: Sequence[Direction] = ("maximize",)
) -> optuna.Study:
    """The study called `name`, made where it is not there yet."""
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    return optuna.create_study(
        storage=storage, sampler=sampler, pruner=pruner, study_name=name, directions=directions, load_if_exists=True
    )


def suggest(trial: Trial, parameter: Parameter) -> Value:
    """What the sampler chooses."""
    if parameter.choices:
        return trial.suggest_categorical(parameter.name, parameter.choices)
    return trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)


Evaluate = Callable[[Trial, int], Sequence[float]]
"""A trial and its job -> one value for each direction of the study."""


def work(study: optuna.Study, jobs: int, evaluate: Evaluate, deadline: float, note: Note) -> None:
    """Do jobs 0 to `jobs` - 1 as far as other workers do not, then wait for what they have begun.

    `PxError` in `evaluate` ends the trial, not the search. After the monotonic time `deadline` nothing is begun or
    waited for.
    """
    waited = False
    while time.monotonic() < deadline:
        fail_stale_trials(study)
        trials = _all(study)
        left = set(range(jobs)) - taken(trials)
        others = [each for each in trials if each.state == TrialState.RUNNING and JOB in each.user_attrs]
        if len(left) > len(_silent(trials)):
            if not _do_one(study, jobs, evaluate):
                note("this worker was slow and taken for dead; another one does its trial again")
        elif left or others:
            if not waited:
                note("waiting for what other workers have begun ...")
            waited = True
            time.sleep(HEARTBEAT / 5)
        else:
            return


def _do_one(study: optuna.Study, jobs: int, evaluate: Evaluate) -> bool:
    """One trial, with signs of life; False where another worker has ended it since they had stopped.

    Not `Study.optimize`, which takes a trial that was ended elsewhere for an error of its own.
    """
    sampler, storage = study.sampler, study._storage
    assert isinstance(sampler, JobSampler)
    trial = study.ask()
    state, values = TrialState.FAIL, None
    try:
        if isinstance(storage, BaseHeartbeat):  # before it has a job, which would never be free again otherwise
            storage.record_heartbeat(trial._trial_id)
        with get_heartbeat_thread(trial._trial_id, storage):
            values = _evaluated(trial, sampler.job, jobs, evaluate)
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except optuna.exceptions.UpdateFinishedTrialError:
        return False
    finally:
        told = study.tell(trial, values, state=state, skip_if_finished=True)
    return told.state == state


def _evaluated(trial: Trial, job: int, jobs: int, evaluate: Evaluate) -> Sequence[float] | None:
    """Values of the job; None where it failed, and where another worker has taken the last one in the meantime."""
    if job >= jobs:
        return None
    trial.set_user_attr(JOB, job)
    try:
        return evaluate(trial, job)
    except PxError as error:
        trial.set_user_attr(ERROR, str(error))
        return None
