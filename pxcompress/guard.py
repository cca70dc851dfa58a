"""What others raise reaches the user as one line, with the trace behind it; and Ctrl-C is not lost on its way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from pxcompress.errors import PxError, StageError, describe


@contextmanager
def name_failures(block_name: str) -> Iterator[None]:
    """`StageError` for any exception of the block that is not raised on purpose; `block_name` is in the message.

    Errors of the operating system, which say what the matter is and with which file, pass.
    """
    try:
        yield
    except PxError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        layer = find_failing_layer(error.__traceback__)
        place = f" at layer {layer!r}" if layer else ""
        raise StageError(f"{block_name} failed{place}: {describe(error)}") from error


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
