"""The part of a recipe about what is to be certified of the model."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING

from pxcompress.checks import check_types
from pxcompress.choices import LOSS_RISKS, PARTS, RISKS, one_of
from pxcompress.errors import InputError, unknown
from pxcompress.registry import option

if TYPE_CHECKING:
    from pxcompress.certify.parts import Part
    from pxcompress.certify.path import RiskLimit


@dataclass(frozen=True)
class Guarantee:
    """What to certify: with this confidence the risk, one of `certify.path.RISKS`, is at most `max_drop`.

    It is tested on `steps` ever smaller models, the last of which has the recipe's ratio; the smallest that passes
    is the result. `part` and `coverage` say which samples count, as `parts.Part` does; with a `group`, a column of the
    table of data, the risk is bounded for each of its values, which are words.
    """

    max_drop: float = option(MISSING, "Largest risk to certify, see --risk: a share of the samples, such as 0.03.")
    confidence: float = option(
        0.95, "Probability with which a certificate has to hold, over the random choice of its samples."
    )
    risk: str = option(
        "negative-flips",
        f"Which risk --max-drop bounds. For classes: {one_of(RISKS)} (negative-flips: right in the dense model, "
        f"wrong in the pruned one); for any task: {one_of(LOSS_RISKS)}.",
    )
    steps: int = option(8, "How many ever smaller models, up to --ratio, are tested for --max-drop.")
    part: str = option(
        "all",
        f"Which samples the risk is taken over: {one_of(PARTS)}. confident: those of which the dense model is "
        "surest, see --coverage; classes: the risk must hold within each true class.",
    )
    coverage: float | None = option(
        None, "With --part confident: share of the samples that count as confident.  [default: 0.8]"
    )
    group: str = option(
        "", "A text column of the table given as --data; the bound on the risk must hold for each of its values."
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; expected a share between 0 and 1, such as 0.95")
        if not 0 < self.max_drop < 1:
            raise InputError(f"max-drop is {self.max_drop}; expected a share of the predictions, such as 0.03")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; expected 1 or more models to test")
        if self.risk not in (*RISKS, *LOSS_RISKS):
            raise unknown("risk", self.risk, (*RISKS, *LOSS_RISKS))
        if self.group and self.part != "all":
            raise InputError(
                f"part {self.part!r} is given with --group, which says what the risk holds for; leave one out"
            )
        object.__setattr__(self, "coverage", self.counted_part.coverage)

    @property
    def limit(self) -> RiskLimit:
        """The risk and its limits, as functions in `certify` take them."""
        from pxcompress.certify.path import RiskLimit

        return RiskLimit(self.risk, alpha=self.max_drop, delta=round(1 - self.confidence, 12))

    @property
    def counted_part(self) -> Part:
        """Which samples count, as a `Part`."""
        from pxcompress.certify.parts import Part

        return Part(self.part, self.coverage)

    def ratios(self, last: float) -> tuple[float, ...]:
        """Pruning ratios of the models to test, ascending in equal steps to `last`.

        Fixed before any certify sample is seen.
        """
        return tuple(last * step / self.steps for step in range(1, self.steps + 1))
