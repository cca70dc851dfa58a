"""The part of a recipe about how units are scored."""

from __future__ import annotations

from dataclasses import dataclass

from pxcompress.checks import check_types
from pxcompress.choices import one_of
from pxcompress.registry import names_in, option

AUTO = "auto"

AUTO_SCORERS = ("lrp-residual", "lrp-residual:metric=weights")
"""The scorers among which held-out samples choose by default: errors weighed by relevance, or all alike."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How units are scored: `scorer` is a text like "lrp:centre=true", checked and stored in short form.

    "auto" means the one of `AUTO_SCORERS` that does best on held-out samples. Raises `InputError` for anything unknown.
    """

    scorer: str = option(
        AUTO,
        f"How units are scored, as NAME:option=value,...: {one_of(names_in('pxcompress.scorers'))}; "
        "`pxcompress methods` lists options; or your own package.module:Class. auto: tries lrp-residual in two ways "
        "and takes the one whose pruned "
        "model is nearer to the dense one on held-out samples.",
        flags=("--score", "--scorer"),
    )
    class_scores: bool = option(
        False, "Also save how relevant every unit is for each class, to class_scores.safetensors; needs labels."
    )

    def __post_init__(self) -> None:
        from pxcompress.scorers import SCORERS

        check_types(self, Scoring)
        if self.scorer != AUTO:
            object.__setattr__(self, "scorer", SCORERS.text(SCORERS.build(self.scorer)))

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers to try: one, or for "auto" several among which held-out samples choose.

        Without held-out samples the first one is used.
        """
        return AUTO_SCORERS if self.scorer == AUTO else (self.scorer,)
