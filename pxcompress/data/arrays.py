"""Data in files that NumPy writes: .npz with an array for each of a model's inputs, by name, or .npy for its only one.

    inputs.npz   arrays (n, ...) of equally many samples, by input
    inputs.npy   (n, ...)
    folder/      such files, each a batch; also one sample a file without the axis n, where the model is an ONNX file
    folder/train/, folder/val/   the same in two splits

A .npz may also have targets, under one of the names in `TARGETS`: classes (n,), masks (n, height, width), or numbers.
Nothing that is pickled is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.folder import HELD_OUT_FOLDERS, TRAIN_FOLDERS
from pxcompress.data.items import Item, Value, collect_items
from pxcompress.data.samples import UserData
from pxcompress.errors import DataError, short, suggest_path
from pxcompress.models.onnx_file import Ports

SUFFIXES = (".npz", ".npy")

TARGETS = ("target", "targets", "label", "labels")
"""Names of arrays in a .npz file that are targets, not inputs."""

ONLY = 0
"""Key for the single array of a .npy file, which has no name."""

Array = NDArray[Any]


def is_arrays(spec: str) -> bool:
    """Whether `spec` is a .npz or .npy file, or a folder of such files."""
    path = Path(spec).expanduser()
    return spec.lower().endswith(SUFFIXES) or (bool(spec) and path.is_dir() and bool(_find_splits(path)))


def open_arrays(spec: str, ports: Ports | None = None) -> UserData:
    """All samples of the files, read into memory; `ports` are the inputs of the ONNX file they are for.

    Raises `DataError`.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return collect_items(
            spec, {split: list(_read_all(files, ports)) for split, files in _find_splits(path).items()}, ports
        )
    if not path.is_file():
        raise DataError(f"data file {spec!r} does not exist{suggest_path(path) or '; check the path'}")
    return collect_items(spec, {"all": list(_read_file(path, ports))}, ports)


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """Files by split, "train" before "val"; all files of the folder as "all" where it has no such sub-folders."""
    inner = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    train = next((inner[name] for name in TRAIN_FOLDERS if name in inner), None)
    held_out = next((inner[name] for name in HELD_OUT_FOLDERS if name in inner), None)
    folders = {"train": train, "val": held_out} if train and held_out else {"all": train or folder}
    files = {split: _files(path) for split, path in folders.items() if path is not None}
    return files if all(files.values()) else {}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _read_all(files: list[Path], ports: Ports | None) -> Iterator[Item]:
    for path in files:
        yield from _read_file(path, ports)


def _read_file(path: Path, ports: Ports | None) -> Iterator[Item]:
    """The samples of one file, one after the other. Raises `DataError`."""
    arrays = _read_arrays(path)
    inputs: dict[str | int, Array] = {
        name: array for name, array in arrays.items() if name not in TARGETS or _is_port(name, ports)
    }
    targets = [array for name, array in arrays.items() if name not in inputs]
    if not inputs or len(targets) > 1:
        raise DataError(
            f"{path.name} holds {', '.join(map(str, arrays)) or 'nothing'}; expected inputs, and one target at most"
        )
    if _is_one_sample(inputs, ports):
        yield Item(path.name, _value(inputs, ports), targets[0] if targets else None)
        return
    samples = _count_samples(path, arrays)
    for number in range(samples):
        value = {name: array[number] for name, array in inputs.items()}
        yield Item(f"{path.name}/{number}", _value(value, ports), targets[0][number] if targets else None)


def _is_port(name: str | int, ports: Ports | None) -> bool:
    return ports is not None and any(port.name == name for port in ports.inputs)


def _read_arrays(path: Path) -> dict[str | int, Array]:
    """The arrays of a file by name. Raises `DataError` where it cannot be read without executing anything."""
    try:
        content = np.load(path, allow_pickle=False)
        arrays: dict[str | int, Array] = {ONLY: content} if isinstance(content, np.ndarray) else dict(content)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path.name} cannot be read ({short(error, 80)}); expected arrays of numbers, as numpy.savez and "
            "numpy.save write them"
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path.name}: {name!r} holds {array.dtype}; expected numbers")
    return {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}


def _is_one_sample(inputs: Mapping[str | int, Array], ports: Ports | None) -> bool:
    """Whether arrays hold one sample, without a first axis of samples.

    Without `ports`, the inputs of an ONNX file, False.
    """
    if ports is None:
        return False
    axes = {port.name: len(port.shape) for port in ports.inputs} | {ONLY: len(ports.inputs[0].shape)}
    return all(array.ndim == axes.get(name) for name, array in inputs.items())


def _count_samples(path: Path, arrays: Mapping[str | int, Array]) -> int:
    """Number of samples in a file: the length of all its arrays. Raises `DataError` where lengths differ."""
    counts = {name: len(array) if array.ndim else None for name, array in arrays.items()}
    first = next(iter(counts))
    for name, count in counts.items():
        if count is None:
            raise DataError(f"{path.name}: {name!r} is a single number; expected an array (n, ...)")
        if count != counts[first]:
            raise DataError(
                f"{path.name}: {first!r} has {counts[first]} samples, {name!r} {count}; expected arrays (n, ...) of "
                "one n"
            )
    if not counts[first]:
        raise DataError(f"{path.name} holds no samples; expected arrays (n, ...)")
    return counts[first] or 0


def _value(inputs: dict[str | int, Array], ports: Ports | None) -> Value:
    """The inputs of one sample by name; an array alone if it is the only input, of floats, and not for an ONNX file.

    Else all by name.
    """
    (first, *others) = inputs.values()
    return first if not others and ports is None and first.dtype.kind == "f" else inputs
