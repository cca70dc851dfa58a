"""Chooses the strength of ridge regularisation by the error on samples that a regression was not fitted to."""

from __future__ import annotations

from collections.abc import Callable

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidate ridge strengths, as shares of the mean variance of the inputs."""

USUAL = RIDGES.index(1e-2)


def choose_ridge(error: Callable[[float], float]) -> float:
    """The one of `RIDGES` with the least `error`, searched downhill from the usual one, so that few are tried."""
    place, least_error = USUAL, error(RIDGES[USUAL])
    for step in (1, -1):
        while 0 <= place + step < len(RIDGES) and (next_error := error(RIDGES[place + step])) < least_error:
            place, least_error = place + step, next_error
        if place != USUAL:
            break
    return RIDGES[place]
