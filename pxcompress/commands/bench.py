"""`pxcompress bench`: time ONNX files side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Provider, Threads
from pxcompress.errors import InputError


def bench(
    files: Annotated[list[Path], typer.Argument(help="ONNX classifiers or run folders, timed in turns.")],
    batch_size: Annotated[str, typer.Option(help="Samples per call; several with commas.")] = "1",
    provider: Provider = "auto",
    threads: Threads = 0,
    input_size: Annotated[
        int | None, typer.Option(help="Side of the square input, pixels, where the file leaves it open.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time ONNX files on ONNX Runtime: latency percentiles, throughput, and which provider ran how many nodes."""
    from pxcompress.measure import bench as time_files
    from pxcompress.report.table import bench_table

    try:
        sizes = [int(part) for part in batch_size.split(",")]
    except ValueError:
        raise InputError(f"batch-size is {batch_size!r}; expected whole numbers with commas, like 1,8,32") from None
    size = None if input_size is None else (3, input_size, input_size)
    files = [file / "model.onnx" if file.is_dir() else file for file in files]
    rows = time_files(files, sizes, provider=provider, threads=threads, input_size=size)
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if as_json else bench_table(rows))
