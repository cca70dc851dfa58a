"""Captures what C++ libraries print, so that it can be read instead of reaching the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def capture_output() -> Iterator[Callable[[], str]]:
    """A context in which nothing is printed, logged or warned.

    It yields a function that, after the block, returns what was written to stderr by C++ code (file descriptor 2).
    """
    sys.stderr.flush()
    terminal, level = os.dup(2), logging.root.manager.disable
    text, nowhere = "", io.StringIO()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        logging.disable(logging.CRITICAL)
        try:
            with (
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
                warnings.catch_warnings(action="ignore"),
            ):
                yield lambda: text
        finally:
            logging.disable(level)
            os.dup2(terminal, 2)
            os.close(terminal)
            file.seek(0)
            text = file.read().decode(errors="replace")


def shorten_message(message: str) -> str:
    """The useful part of a runtime's error message: the library that could not be loaded, else its first line.

    That line is without error codes, and at most 300 characters long.
    """
    message = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    if cause := re.search(r"with error: (.+)", message):
        return cause[1].strip()
    message = re.sub(r"(Exception from|Check '.*' failed at) [^\n]*:\n", "", message)  # OpenVINO's, one a line
    message = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message)
    return message.splitlines()[0][:300] if message else ""
