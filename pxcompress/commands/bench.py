"""`pxcompress bench`: time ONNX files side by side."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pxcompress.choices import PROVIDERS, TARGETS
from pxcompress.commands.options import AsJson, Threads
from pxcompress.errors import InputError


def bench(
    files: Annotated[list[Path], typer.Argument(help="ONNX files, or run folders for all of theirs.")],
    batch_size: Annotated[
        str, typer.Option(help="Samples per call; several with commas.  [default: 1, or what the first file takes]")
    ] = "",
    provider: Annotated[str, typer.Option(help=f"Execution providers, with commas: {', '.join(PROVIDERS)}.")] = "auto",
    strict_provider: Annotated[
        bool, typer.Option("--strict-provider", help="Exit with 3 where any node runs on another provider.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(help=f"Convert to these first: {', '.join(TARGETS)}, with commas.  [default: as they are]"),
    ] = "",
    data: Annotated[
        str,
        typer.Option(help="Images to calibrate --precision on, as for `run`.  [default: none; fp16: random numbers]"),
    ] = "",
    threads: Threads = 0,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the square input, pixels, where the file leaves it open.", min=1)
    ] = None,
    shapes: Annotated[
        str, typer.Option(help="Sizes of one sample of inputs that the file leaves open: ids:128,image:3x224x224.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Time ONNX files: latency, throughput, nodes per provider.

    A provider that cannot be used is left out and named, unless it is the only one. With --precision every file is
    converted first, and the converted files are deleted at the end: `run --targets` writes files to ship.
    """
    from pxcompress.deploy.bench import BenchConditions, choose_providers
    from pxcompress.deploy.bench import bench as time_files
    from pxcompress.deploy.feeds import Sizes
    from pxcompress.deploy.variants import check_precisions
    from pxcompress.report.table import format_bench

    batches = _read_batch_sizes(batch_size)
    size = None if input_size is None else (3, input_size, input_size)
    files = [part for file in files for part in (_list_models(file, bool(precision)) if file.is_dir() else [file])]
    working, left_out = choose_providers([name.strip() for name in provider.split(",")], strict=strict_provider)
    for reason in left_out:
        print(f"pxcompress: {reason}", file=sys.stderr)
    precisions = [name.strip() for name in precision.split(",") if name.strip()]
    check_precisions(precisions, data=bool(data))
    with _convert_files(files, precisions, data, size) as sources:
        conditions = BenchConditions(working, threads, strict_provider)
        rows = time_files(list(sources), batches, conditions=conditions, sizes=Sizes.parse(size, shapes))
        rows = tuple(dataclasses.replace(row, path=sources[Path(row.path)]) for row in rows)
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if as_json else format_bench(rows))


def _read_batch_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise InputError(f"batch-size is {text!r}; expected whole numbers with commas, like 1,8,32") from None


@contextmanager
def _convert_files(
    files: Sequence[Path], precisions: Sequence[str], data: str, size: tuple[int, int, int] | None
) -> Iterator[dict[Path, str]]:
    """A context with the files to time -> names to show: `files` converted to each of `precisions`, or as they are.

    Converted files are deleted when the block ends.
    """
    from pxcompress.deploy.variants import convert_files
    from pxcompress.run_folder.calibration import read_calibration

    if not precisions:
        yield {file: str(file) for file in files}
        return
    with tempfile.TemporaryDirectory() as folder:
        yield convert_files(files, precisions, lambda of: read_calibration(of, data, size), Path(folder))


def _list_models(folder: Path, float32: bool) -> list[Path]:
    """The ONNX files of a run folder, the dense model first; with `float32` only those of float32 models."""
    names = ["dense.onnx", "model.onnx"] + ([] if float32 else ["model.fp16.onnx", "model.int8.onnx"])
    return [folder / name for name in names if (folder / name).is_file()] or [folder / "model.onnx"]
