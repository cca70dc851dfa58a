"""The part of a recipe about how latency is measured."""

from __future__ import annotations

from dataclasses import dataclass

from pxcompress.checks import check_types
from pxcompress.choices import PROVIDERS, one_of
from pxcompress.errors import InputError
from pxcompress.registry import option


@dataclass(frozen=True)
class Bench:
    """How latency is measured: samples per call, execution provider, CPU threads (0: all physical cores)."""

    batch_size: int = option(1, "Samples per call when latency is measured.")
    provider: str = option(
        "auto",
        f"What ONNX Runtime runs on (execution provider): {one_of(PROVIDERS)}; auto: CUDA if it works, else the CPU; "
        "or your own package.module:Class.",
    )
    threads: int = option(0, "Number of CPU threads of ONNX Runtime; 0: one per physical core.")

    def __post_init__(self) -> None:
        from pxcompress.deploy.runtime import check_name, check_threads

        check_types(self)
        check_name(self.provider)
        if self.batch_size < 1:
            raise InputError(f"batch-size is {self.batch_size}; expected 1 or more")
        check_threads(self.threads)
