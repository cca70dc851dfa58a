"""The part of a recipe about the exported files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pxcompress.checks import check_types
from pxcompress.choices import TARGETS
from pxcompress.errors import InputError, unknown
from pxcompress.registry import option

QUANT_DROP = 0.005
"""Default of how much of the metric int8 may lose."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the pruned model is exported: in which precisions (float32 always), for which batch and image sizes.

    `targets` are sorted as `TARGETS`. Raises `InputError` for an unknown precision, and for a loss that is not between
    0 and 1.
    """

    targets: Sequence[str] = option(
        ("fp32",), f"Precisions of the exported model, with commas: {', '.join(TARGETS)}; {TARGETS[0]} is always made."
    )
    max_quant_drop: float = option(
        QUANT_DROP,
        "How much of the task's metric int8 may lose; the layers that cost most stay in float32 until that holds.",
    )
    fixed_batch: bool = option(False, "Export for exactly --batch-size samples per call, instead of any number.")
    dynamic_size: bool = option(
        False, "Export for images of any height and width that the model takes, instead of one size."
    )

    def __post_init__(self) -> None:
        check_types(self, Export)
        for name in self.targets:
            if name not in TARGETS:
                raise unknown("target", name, TARGETS)
        if not 0 <= self.max_quant_drop < 1:
            raise InputError(
                f"max-quant-drop is {self.max_quant_drop}; expected a share below 1 that int8 may lose, such as 0.005"
            )
        if self.max_quant_drop != QUANT_DROP and "int8" not in self.targets:
            raise InputError(f"max-quant-drop is {self.max_quant_drop}, but no int8 file is made; add --targets int8")
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in {"fp32", *self.targets}))
