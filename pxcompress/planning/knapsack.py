"""Chooses the widths of all groups together: the least loss of saliency that fits the cost, as a knapsack problem.

A ranking pays for every unit what it costs in the dense model. But a channel gets cheaper while its neighbours get
narrower, and milliseconds go in steps. Here every group chooses among its widths by saliency + price * cost, with costs
taken at the widths that the others have; the price is bisected until the whole fits (Lagrange relaxation), then costs
are taken anew. Related: HALP (https://arxiv.org/abs/2110.10811), MDP (https://arxiv.org/abs/2406.12079).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pxcompress.types import Meter

Array = npt.NDArray[np.float64]
Widths = dict[str, int]

SWEEPS = 8
HALVINGS = 40


@dataclass(frozen=True, eq=False)
class Choice:
    """The widths that a group may have, ascending up to the whole, and the saliency lost at each, (widths,)."""

    name: str
    widths: tuple[int, ...]
    saliency: Array


def choose_widths(choices: Sequence[Choice], meter: Meter, limit: float) -> Widths:
    """Choose the width of every group so that the cost is at most `limit` and little saliency is lost.

    The smallest widths must fit. It is not always the optimum: costs of groups depend on each other, and the best of
    `SWEEPS` rounds is taken.
    """
    current = {choice.name: choice.widths[-1] for choice in choices}
    best_widths, least_harm = {choice.name: choice.widths[0] for choice in choices}, np.inf
    for _ in range(SWEEPS):
        costs = [np.array([meter({**current, of.name: width}) for width in of.widths]) for of in choices]
        widths = _fill_limit(choices, costs, meter, limit, _choose_at_price(choices, costs, meter, limit))
        harm = sum(float(choice.saliency[choice.widths.index(widths[choice.name])]) for choice in choices)
        if harm < least_harm:
            best_widths, least_harm = widths, harm
        if widths == current:
            break
        current = widths
    return best_widths


def _choose_at_price(choices: Sequence[Choice], costs: Sequence[Array], meter: Meter, limit: float) -> Widths:
    """The widths that minimise lost saliency + price * cost, for the lowest price at which they fit the limit."""

    def at(price: float) -> Widths:
        cheapest_places = (
            int(np.argmin(choice.saliency + price * cost)) for choice, cost in zip(choices, costs, strict=True)
        )
        return {choice.name: choice.widths[place] for choice, place in zip(choices, cheapest_places, strict=True)}

    harm = max(float(np.abs(choice.saliency).max()) for choice in choices) or 1.0
    high = harm / limit
    while meter(at(high)) > limit:
        if high > 1e30 * harm / limit:
            return {choice.name: choice.widths[0] for choice in choices}
        high *= 8
    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if meter(at(middle)) <= limit else (middle, high)
    return at(high)


def _fill_limit(
    choices: Sequence[Choice], costs: Sequence[Array], meter: Meter, limit: float, widths: Widths
) -> Widths:
    """`widths` enlarged as far as the limit allows, by the steps that regain the most saliency for their cost."""
    widths = dict(widths)
    steps = []
    for choice, cost in zip(choices, costs, strict=True):
        place = choice.widths.index(widths[choice.name])
        for wider in range(place + 1, len(choice.widths)):
            regained_saliency = choice.saliency[place] - choice.saliency[wider]
            steps.append((regained_saliency / max(cost[wider] - cost[place], 1e-12), choice.name, choice.widths[wider]))
    for _, name, width in sorted(steps, key=lambda step: step[0], reverse=True):
        if width > widths[name] and meter({**widths, name: width}) <= limit:
            widths[name] = width
    return widths
