"""Times functions against each other fairly, on a machine that does other things as well."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 10
"""Most calls of one function in a row before the next one has its turn."""

SECONDS = 5.0
"""Seconds, approximately, for which one function is timed when several are compared."""

LEAST_TURNS = 6
"""Fewest turns of each function: with fewer, their extremes would not make a 95 % interval."""

SETTLED_SHARE = 0.02
"""A warm-up ends when calls get faster by less than this share from block to block."""

USUAL_CALLS = 50
"""Fewest calls of a warm-up if there is time, as a steady machine needs them."""

WARMUP = 1000
"""Most calls of a warm-up; the clock rate of a GPU takes a while to rise."""

Array = npt.NDArray[Any]


def time_interleaved(
    runners: Mapping[str, Callable[[], None]], *, warmup: int = WARMUP, runs: int = 200, max_seconds: float = 10.0
) -> dict[str, Array]:
    """Seconds of each call, by name of the function; all take turns, so that drift of the machine affects all alike.

    A turn is up to `BLOCK` timed calls after one that is not timed and brings the runner's memory back into the
    caches. Run i of one result stands beside run i of the others. Stops after `max_seconds` (warm-up: a quarter of
    it), but not before `LEAST_TURNS` turns each.
    """
    share = max_seconds / len(runners)
    pace = max(_warm_up(call, warmup, share / 4) for call in runners.values())
    turn = int(np.clip(share / LEAST_TURNS / pace, 1, min(BLOCK, max(runs // LEAST_TURNS, 1))))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    start, turns, runs_done = time.perf_counter(), 0, 0
    while runs_done < runs and (turns < LEAST_TURNS or time.perf_counter() - start < max_seconds):
        turn = min(turn, runs - runs_done)
        for name, call in runners.items():
            call()
            seconds[name].extend(_time_call(call) for _ in range(turn))
        turns, runs_done = turns + 1, runs_done + turn
    return {name: np.array(values) for name, values in seconds.items()}


def _warm_up(call: Callable[[], None], runs: int, max_seconds: float) -> float:
    """Call a function until calls no longer get faster; returns the seconds of its fastest call.

    The warm-up ends after `USUAL_CALLS` calls or more, once the median of the last `BLOCK` calls is no longer below
    that of the block before by the share `SETTLED_SHARE`. It also ends after `runs` calls or `max_seconds`, but not
    before two calls.
    """
    start, seconds = time.perf_counter(), [_time_call(call), _time_call(call)]
    while len(seconds) < runs and time.perf_counter() - start < max_seconds:
        seconds.append(_time_call(call))
        block_is_full = len(seconds) % BLOCK == 0 and len(seconds) >= USUAL_CALLS
        if block_is_full and np.median(seconds[-BLOCK:]) > (1 - SETTLED_SHARE) * np.median(
            seconds[-2 * BLOCK : -BLOCK]
        ):
            break
    return min(seconds)


def _time_call(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
