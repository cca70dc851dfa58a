"""What the exported files are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pxcompress.checks import check_types
from pxcompress.choices import TARGETS
from pxcompress.errors import unknown
from pxcompress.registry import option


@dataclass(frozen=True, kw_only=True)
class Export:
    """Precisions of the pruned model's files, in the order of `TARGETS`, float32 among them, and their batch size.

    Raises `InputError` for an unknown precision.
    """

    targets: Sequence[str] = option(
        ("fp32",), f"Precisions of the exported model, with commas: {', '.join(TARGETS)}; {TARGETS[0]} is always made."
    )
    fixed_batch: bool = option(False, "The exported files take --batch-size samples a call, no other number.")

    def __post_init__(self) -> None:
        check_types(self, Export)
        for name in self.targets:
            if name not in TARGETS:
                raise unknown("target", name, TARGETS)
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in {"fp32", *self.targets}))
