"""How long every stage of a run takes, and how much memory the process had needed by its end."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pxcompress.guard import check_interrupted, name_failures
from pxcompress.notes import Message, Note, begin
from pxcompress.passes.memory import is_out_of_memory, out_of_memory
from pxcompress.proof import Metric, StageTime


class Clock:
    """Measures the time and memory of stages in order; the function `note` is told when each starts and ends.

    With `measures` off, quality is not measured after stages that change the model.
    """

    def __init__(self, note: Note, *, measures: bool = True) -> None:
        self._note = note
        self.measures = measures
        self._stages: list[StageTime] = []
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage `name`.

        Raises `OutOfMemoryError` where memory is too small, and `StageError` for other failures.
        """
        self._note(begin(name))
        start = time.perf_counter()
        with name_failures(f"stage {name!r}"):
            try:
                yield
            except (MemoryError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise out_of_memory(f"stage {name!r}", error) from error
                raise
        check_interrupted()
        seconds = time.perf_counter() - start
        self._stages.append(StageTime(name, seconds, _peak_rss_bytes()))
        self._note(Message(f"{name}: {seconds:.1f} s", "end"))

    def say(self, message: str) -> None:
        """Pass a progress message on to the user."""
        self._note(message)

    def add_note(self, message: str) -> None:
        """Show the user a message that the report must contain as well."""
        self._note(message)
        self.notes.append(message)

    def quality(self, metric: Metric, value: float) -> None:
        """Record the quality of the model after the last stage, as a `value` of the metric."""
        self._stages[-1] = replace(self._stages[-1], quality_after=value)
        self._note(f"{self._stages[-1].name}: {metric.name} {metric.format(value)} on the select split")

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """All stages so far."""
        return tuple(self._stages)


def _peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes (Linux reports kilobytes, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
