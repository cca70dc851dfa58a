"""Where trials are kept: a database or a journal, each with signs of life of the workers that share it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from pxcompress.errors import InputError

HEARTBEAT = 5
"""Seconds between signs of life of a worker."""

GRACE = 20
"""Seconds without one after which a worker counts as dead."""

PATIENCE = 60
"""Seconds for which a worker waits for an SQLite file that others write to."""

ATTEMPTS = 5
"""To find the tables of a database."""

BEAT = "pxcompress:beat"
"""Under which a trial of a journal counts the signs of life of its worker."""


class Journal(JournalStorage, BaseHeartbeat):
    """A journal file with signs of life, which Optuna's has not.

    Every worker judges by its own clock since when a count stands still: those of several machines need not agree.
    """

    def __init__(self, path: str) -> None:
        super().__init__(JournalFileBackend(path))
        self._since: dict[tuple[int, int], float] = {}

    def record_heartbeat(self, trial_id: int) -> None:
        """One more sign of life."""
        try:
            count = self.get_trial(trial_id).system_attrs.get(BEAT, 0)
            self.set_trial_system_attr(trial_id, BEAT, count + 1)
        except UpdateFinishedTrialError:
            return  # another worker took this one for dead, and it finds that out when its trial ends

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        beats = [(each._trial_id, each.system_attrs[BEAT]) for each in running if BEAT in each.system_attrs]
        now = time.monotonic()
        self._since = {beat: self._since.get(beat, now) for beat in beats}
        return [trial_id for (trial_id, _), since in self._since.items() if now - since > GRACE]

    def get_heartbeat_interval(self) -> int:
        """Seconds."""
        return HEARTBEAT

    def get_heartbeat_stale_trial_callback(self) -> None:
        """Nothing more is done where a worker died: its job is free by that alone."""


def open_storage(text: str) -> BaseStorage:
    """A database by its URL, or a journal by "journal:PATH". Raises `InputError` where it cannot be opened."""
    try:
        if text.startswith("journal:"):
            return Journal(text.removeprefix("journal:"))
        if text.startswith("sqlite:"):
            return _sqlite_storage(text)
        return _database(text)
    except Exception as error:  # a driver may raise anything
        raise InputError(
            f"storage {_kind(text)!r} cannot be used ({_said(error)}); expected a database URL such as "
            "sqlite:///search.db, postgresql+psycopg://user@host/name or mysql+pymysql://user@host/name, or "
            "journal:PATH"
        ) from error


@contextmanager
def lasting(text: str) -> Iterator[None]:
    """`InputError` where the storage `text`, which could be opened, is gone in the middle of the work."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        raise InputError(
            f"storage {_kind(text)!r} does not answer any more ({_said(error)}); what was measured is kept there, "
            "the same command goes on"
        ) from error


def _kind(text: str) -> str:
    """What stands before user and password."""
    return text.partition("://")[0]


def _said(error: BaseException) -> str:
    """The first line of an error's message, where Optuna wrapped one of its cause; of a missing driver its name."""
    if isinstance(error, ImportError) and error.__cause__:
        return f"{error.__cause__}, its driver; install it with pip"
    if isinstance(error, StorageInternalError) and error.__cause__:
        return _said(error.__cause__)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]


def _database(url: str, options: dict[str, Any] | None = None, attempts: int = ATTEMPTS) -> RDBStorage:
    """A database; where another worker makes its tables in the same moment, those that it has made."""
    try:
        return RDBStorage(url, engine_kwargs=options, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    except sqlalchemy.exc.DatabaseError as error:
        twice = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
        if attempts == 1 or not twice:
            raise
        time.sleep(1)
        return _database(url, options, attempts - 1)


def _sqlite_storage(url: str) -> RDBStorage:
    """An SQLite file whose commits wait for other workers, but not for the disk: a killed process loses nothing."""
    if sqlalchemy.make_url(url).database in (None, "", ":memory:"):
        raise ValueError("it names no file")
    storage = _database(url, {"connect_args": {"timeout": PATIENCE}})

    def prepare(connection: Any, record: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    sqlalchemy.event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()  # connections from before know nothing of it
    return storage


def sqlite(path: Path) -> str:
    """The URL of an SQLite file."""
    return f"sqlite:///{path}"
