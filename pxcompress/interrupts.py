"""Ctrl-C that is not lost: some libraries drop the exception on its way."""

from __future__ import annotations

import threading

_interrupted = threading.Event()


def interrupt(number: int, frame: object) -> None:
    """A signal handler that interrupts at once, and is remembered."""
    _interrupted.set()
    raise KeyboardInterrupt


def check() -> None:
    """Raise `KeyboardInterrupt` where one was asked for and dropped."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
