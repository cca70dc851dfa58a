"""Turns unexpected exceptions into one line for the user, and makes sure that Ctrl-C is not lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from pxcompress.errors import InputError, PxError, StageError, describe

BASES = ("pxcompress.tasks.task", "pxcompress.types", "pxcompress.deploy.backends")
"""Names of the modules with the base classes of all methods, so that they need not be imported here."""


@contextmanager
def name_failures(block_name: str) -> Iterator[None]:
    """A context that turns unexpected exceptions into a `StageError`, whose message names `block_name`.

    Errors of the operating system, which name the problem and the file, pass unchanged. Exceptions from a user's own
    task, scorer or the like become an `InputError` that names its method.
    """
    try:
        yield
    except PxError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if method := find_failing_method(error.__traceback__):
            raise InputError(f"{method} raises {describe(error)}; mend it (--debug shows where)") from error
        layer = find_failing_layer(error.__traceback__)
        place = f" at layer {layer!r}" if layer else ""
        raise StageError(f"{block_name} failed{place}: {describe(error)}") from error


def find_failing_method(trace: TracebackType | None) -> str:
    """Class and method of the innermost code of a user's own method in a traceback; "" if there is none."""
    method = ""
    while trace is not None:
        frame, owner = trace.tb_frame, trace.tb_frame.f_locals.get("self")
        is_own = any(base.__module__ in BASES for base in type(owner).__mro__)
        if is_own and not str(frame.f_globals.get("__name__", "")).startswith("pxcompress."):
            method = f"{type(owner).__module__}:{type(owner).__qualname__}.{frame.f_code.co_name}"
        trace = trace.tb_next
    return method


def find_failing_layer(trace: TracebackType | None) -> str:
    """Name of the innermost module that ran in a traceback, relative to the outermost one; "" if there were not two."""
    modules: list[Any] = []
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if callable(getattr(type(owner), "named_modules", None)):
            modules.append(owner)
        trace = trace.tb_next
    if not modules:
        return ""
    names = {id(module): name for name, module in modules[0].named_modules()}
    return next((name for module in reversed(modules) if (name := names.get(id(module)))), "")


class Terminated(SystemExit):
    """The process was asked to end, unlike other `SystemExit`, which a user's own code may raise."""


def terminate(number: int, frame: object) -> None:
    """A signal handler that ends the process; its exit code is that of a shell for the signal."""
    raise Terminated(128 + number)


_interrupted = threading.Event()


def interrupt(number: int, frame: object) -> None:
    """A signal handler that raises `KeyboardInterrupt`, and remembers it, since some libraries swallow the
    exception.
    """
    _interrupted.set()
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """Raise `KeyboardInterrupt` if there was one that a library swallowed."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
