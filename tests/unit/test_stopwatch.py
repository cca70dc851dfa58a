"""Times of calls that take turns, and warm-ups that end."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from exports import Exported

from pxcompress.deploy import runtime, stopwatch


def _recorder(order: list[str], name: str, seconds: float = 0.0) -> Callable[[], None]:
    def run() -> None:
        order.append(name)
        time.sleep(seconds)

    return run


def test_runners_take_turns() -> None:
    order: list[str] = []
    runners = {name: _recorder(order, name) for name in "ab"}
    seconds = stopwatch.time_interleaved(runners, warmup=3, runs=25)
    expected = "aaabbb"
    for timed in (4, 4, 4, 4, 4, 4, 1):  # at least six turns, and what is left
        expected += "a" * (timed + 1) + "b" * (timed + 1)
    assert "".join(order) == expected
    assert [len(values) for values in seconds.values()] == [25, 25]


@pytest.mark.parametrize(
    ("slower", "calls"),
    [
        (lambda call: 1.0, 50),  # steady from the first call on
        (lambda call: 1.0 + 2.0 * (call < 45), 70),  # a clock that rises in the fifth block
        (lambda call: 3.0 - 0.03 * call, 80),  # ever faster, until it may go on no longer
    ],
)
def test_a_warm_up_ends_when_calls_no_longer_get_faster(
    monkeypatch: pytest.MonkeyPatch, slower: Callable[[int], float], calls: int
) -> None:
    done: list[float] = []

    def call(_: Callable[[], None]) -> float:
        done.append(slower(len(done)))
        return done[-1]

    monkeypatch.setattr(stopwatch, "_time_call", call)
    assert stopwatch._warm_up(lambda: None, 80, 1e9) == min(done)
    assert len(done) == calls


def test_slow_runners_stop_in_time_with_equally_many_runs() -> None:
    order: list[str] = []
    runners = {"a": _recorder(order, "a", 0.02), "b": _recorder(order, "b", 0.005)}
    start = time.perf_counter()
    seconds = stopwatch.time_interleaved(runners, warmup=50, runs=200, max_seconds=0.4)
    assert time.perf_counter() - start < 1.5
    assert len(seconds["a"]) == len(seconds["b"]) >= stopwatch.LEAST_TURNS
    assert np.median(seconds["a"]) == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize("runs", [1, 3, 7])
def test_as_many_runs_as_asked(runs: int) -> None:
    assert len(stopwatch.time_interleaved({"a": lambda: None}, warmup=0, runs=runs)["a"]) == runs


def test_time_runs_times_every_session(wide_cnn: Exported, slim_cnn: Exported) -> None:
    sessions = {name: runtime.open_session(e.path, "cpu", threads=1) for name, e in (("w", wide_cnn), ("s", slim_cnn))}
    seconds = runtime.time_runs(sessions, wide_cnn.example.numpy(), batch_size=4, warmup=5, runs=50, max_seconds=3)
    assert len(seconds["w"]) == len(seconds["s"]) > 0
    assert all((values > 0).all() for values in seconds.values())
