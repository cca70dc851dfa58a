"""Checks what works on this machine by trying it, and gives advice for the rest."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch

from pxcompress.cache import cache_dir
from pxcompress.columns import align
from pxcompress.deploy import hardware, runtime
from pxcompress.deploy.backends.onnxruntime import CUDA_VERSION, VERSION
from pxcompress.deploy.plugins import find_plugins
from pxcompress.errors import InputError

_GIGABYTE = 10**9
_NEEDED_BYTES = 5 * _GIGABYTE
"""Free disk space that a run of a large model needs: two models, each as ONNX and as safetensors."""

_HUB = "https://huggingface.co"
_SECONDS = 5
_CUDA_LIBRARIES = {
    "CUDA runtime": (r"nvidia-cuda-runtime(-cu\d+)?", "libcudart.so.{cuda}"),
    "cuDNN": (r"nvidia-cudnn-cu\d+", "libcudnn.so.9"),
}
"""Name of a CUDA library -> pattern of the package that contains it, and name of the file that ONNX Runtime loads."""


@dataclass(frozen=True)
class Finding:
    """The result of one check. `works` is None for a mere fact; `advice` is empty if there is nothing to do."""

    what: str
    works: bool | None
    result: str
    advice: str = ""


def examine() -> tuple[Finding, ...]:
    """Check versions, processor, providers, CUDA, folders and hub; takes some seconds, needs no network and no GPU."""
    return tuple(finding for look in _LOOKS for finding in look())


def to_table(findings: tuple[Finding, ...]) -> str:
    """Findings as text: a line for each, with its advice below. It has no newline at the end."""
    marks = {True: "ok", False: "NO", None: ""}
    rows = []
    for finding in findings:
        rows.append((marks[finding.works], finding.what, finding.result))
        if finding.advice:
            rows.append(("", "", f"-> {finding.advice}"))
    return "\n".join(align(rows, "<<<"))


def _check_versions() -> Iterator[Finding]:
    yield Finding("python", None, f"{platform.python_version()}, {sys.executable}")
    texts = [text for text in importlib.metadata.requires("pxcompress") or () if "extra ==" not in text]
    names = [re.split(r"[^\w.-]", text)[0] for text in texts]
    version_of = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    missing = [name for name in names if name not in version_of]
    listing = ", ".join(f"{name} {version_of[name]}" for name in names if name in version_of)
    yield Finding("packages", None, listing)
    if missing:
        yield Finding("missing packages", False, ", ".join(missing), f"pip install {' '.join(missing)}")


def _check_processor() -> Iterator[Finding]:
    limit = os.environ.get("OMP_NUM_THREADS")
    limit_note = f", OMP_NUM_THREADS={limit}" if limit else ""
    yield Finding("processor", None, f"{hardware.get_cpu_name()}, {hardware.describe_affinity()}")
    yield Finding("threads", None, f"{torch.get_num_threads()} (PyTorch and ONNX Runtime){limit_note}")


def _try_providers() -> Iterator[Finding]:
    """Try each provider by running a model of one convolution on it."""
    for name in runtime.list_providers()[1:]:
        reason = runtime.explain_failure(name)
        yield Finding(f"provider {name}", not reason, reason or "creates a session and runs", _advise(reason))


def _list_plugins() -> Iterator[Finding]:
    """List execution providers: those built into ONNX Runtime, and those from packages of their own."""
    built_in = ", ".join(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())
    yield Finding("built-in providers", None, f"{built_in} (onnxruntime {VERSION})")
    plugins = find_plugins()
    if not plugins:
        yield Finding("plugin providers", None, "no package onnxruntime-ep-* is installed")
    for plugin in plugins:
        where = f"{' and '.join(plugin.providers)} on {' and '.join(plugin.device_names)}"
        advice = "--provider plugin takes it" if plugin.devices else "use it on a machine that it is for"
        yield Finding(f"{plugin.package} {plugin.version}", bool(plugin.devices), plugin.failure or where, advice)


def _advise(reason: str) -> str:
    """Advice for a provider that does not work, chosen by words in the error message `reason`."""
    needs = CUDA_VERSION or "?"
    advice_of_part = {
        "": "",
        "onnxruntime-ep": "pip install the one for your hardware, such as onnxruntime-ep-openvino",
        "too old": "update the NVIDIA driver",
        "no NVIDIA driver": "without an NVIDIA GPU nothing is to be done; else install its driver",
        "sees no GPU": "free or plug in a GPU; check CUDA_VISIBLE_DEVICES",
        "was built without": "pip uninstall onnxruntime; pip install onnxruntime-gpu",
        "libnvinfer": "pip install tensorrt",
        "libcu": f"pip install the CUDA {needs} packages of the table below, or use the container's",
    }
    return next(
        (text for part, text in advice_of_part.items() if (part in reason if part else not reason)), "see the reason"
    )


def _check_cuda() -> Iterator[Finding]:
    """The CUDA versions that ONNX Runtime and PyTorch were built for, and the libraries and driver that are
    installed.
    """
    yield Finding("CUDA of ONNX Runtime", None, CUDA_VERSION or "built without")
    yield Finding("CUDA of PyTorch", None, torch.version.cuda or "built without")
    for library, (pattern, file) in _CUDA_LIBRARIES.items():
        yield _find_library(library, pattern, file.format(cuda=CUDA_VERSION.partition(".")[0]))
    yield Finding("NVIDIA driver", *_try_driver())
    if torch.cuda.is_available():
        for place in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(place)
            yield Finding(f"GPU {place}", True, f"{card.name}, {card.total_memory / _GIGABYTE:.0f} GB")


def _find_library(library: str, pattern: str, file: str) -> Finding:
    """Whether a CUDA library is installed, as a Python package or by the system."""
    packages = [f"{d.name} {d.version}" for d in importlib.metadata.distributions() if re.fullmatch(pattern, d.name)]
    if packages:
        return Finding(library, True, ", ".join(packages))
    try:
        ctypes.CDLL(file)
    except OSError as error:
        advice = "it comes with PyTorch for CUDA, or: pip install onnxruntime-gpu[cuda,cudnn]"
        return Finding(library, False, f"no package, and {error}", advice)
    return Finding(library, True, f"{file} of this system")


def _try_driver() -> tuple[bool, str]:
    """Whether the NVIDIA driver loads, and the newest CUDA version that it supports, or the error."""
    try:
        return True, f"runs CUDA up to {hardware.get_newest_cuda()}"
    except OSError as error:
        return False, str(error)


def _check_folders() -> Iterator[Finding]:
    try:
        cache = cache_dir()
    except InputError as error:
        yield Finding("cache", False, str(error), "set PXCOMPRESS_CACHE")
    else:
        cache_bytes = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        yield _check_folder("cache", cache, f", {cache_bytes / _GIGABYTE:.1f} GB kept")
    yield _check_folder("current folder", Path.cwd(), "")


def _check_folder(name: str, folder: Path, purpose: str) -> Finding:
    free_bytes = shutil.disk_usage(folder).free
    description = f"{folder}, {free_bytes / _GIGABYTE:.0f} GB free{purpose}"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(name, False, f"{description}, cannot be written: {error.strerror}", "choose another folder")
    is_enough = free_bytes >= _NEEDED_BYTES
    return Finding(name, is_enough, description, "" if is_enough else f"free {_NEEDED_BYTES // _GIGABYTE} GB")


def _try_hub() -> Iterator[Finding]:
    """Whether the model hub, from which pretrained weights come, can be reached."""
    place = os.environ.get("HF_ENDPOINT", _HUB)
    advice = "give weights with --checkpoint or --model local-dir:PATH"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding("model hub", False, "HF_HUB_OFFLINE is set", advice)
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=_SECONDS):
            yield Finding("model hub", True, place)
    except (OSError, ValueError) as error:
        reachable = isinstance(error, urllib.error.HTTPError) and error.code < 500
        yield Finding("model hub", reachable, f"{place}: {error}", "" if reachable else advice)


def _check_processes() -> Iterator[Finding]:
    is_available = torch.distributed.is_available()
    backends = [
        name
        for name, works in (
            ("gloo", torch.distributed.is_gloo_available),
            ("nccl", torch.distributed.is_nccl_available),
        )
        if is_available and works()
    ]
    yield Finding("several processes", bool(backends), ", ".join(backends) or "PyTorch was built without them")


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _check_versions,
    _check_processor,
    _try_providers,
    _list_plugins,
    _check_cuda,
    _check_folders,
    _try_hub,
    _check_processes,
)
