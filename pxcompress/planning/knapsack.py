"""Widths of all groups at once: the least saliency whose cost fits, a multiple-choice knapsack.

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
    """Widths that one group may be cut to, ascending, the last one whole, and the saliency kept at each, (widths,)."""

    name: str
    widths: tuple[int, ...]
    saliency: Array


def least_saliency(choices: Sequence[Choice], meter: Meter, limit: float) -> Widths:
    """Width of every group, of cost at most `limit`; the least widths must fit.

    Not always the optimum: costs of groups depend on each other, and the best of `SWEEPS` rounds is taken.
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
    """The widths at the lowest price of cost at which the whole fits."""

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
    """`widths` with what is left of the limit spent, the most saliency undone for its cost first."""
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
