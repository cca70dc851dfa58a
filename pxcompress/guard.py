"""What others raise reaches the user as one line, with the trace behind it; and Ctrl-C is not lost on its way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from pxcompress.errors import InputError, PxError, StageError, describe

TASK_MODULE = "pxcompress.tasks.task"
"""Module of the class that all tasks derive from, which is not imported for this."""


@contextmanager
def name_failures(block_name: str) -> Iterator[None]:
    """`StageError` for any exception of the block that is not raised on purpose; `block_name` is in the message.

    Errors of the operating system, which say what the matter is and with which file, pass. What a user's own task
    raises is an `InputError` that names its method.
    """
    try:
        yield
    except PxError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if method := find_failing_task(error.__traceback__):
            raise InputError(f"{method} raises {describe(error)}; mend the task (--debug shows where)") from error
        layer = find_failing_layer(error.__traceback__)
        place = f" at layer {layer!r}" if layer else ""
        raise StageError(f"{block_name} failed{place}: {describe(error)}") from error


def find_failing_task(trace: TracebackType | None) -> str:
    """Class and method of the innermost code of a task that is not of this package; "" where there is none."""
    method = ""
    while trace is not None:
        frame, owner = trace.tb_frame, trace.tb_frame.f_locals.get("self")
        is_task = any(base.__module__ == TASK_MODULE for base in type(owner).__mro__)
        if is_task and not str(frame.f_globals.get("__name__", "")).startswith("pxcompress."):
            method = f"{type(owner).__module__}:{type(owner).__qualname__}.{frame.f_code.co_name}"
        trace = trace.tb_next
    return method


def find_failing_layer(trace: TracebackType | None) -> str:
    """Name of the innermost module that ran, within the outermost one; nothing where no module did, or only one."""
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


_interrupted = threading.Event()


def interrupt(number: int, frame: object) -> None:
    """A signal handler that interrupts at once, and is remembered: some libraries drop the exception on its way."""
    _interrupted.set()
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """Raise `KeyboardInterrupt` where one was asked for and dropped."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
