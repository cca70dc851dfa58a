"""The processor, and the GPU by its driver: neither PyTorch nor ONNX Runtime need be built for its version."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import sys
from functools import cache
from pathlib import Path

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

TF32_SWITCH = "NVIDIA_TF32_OVERRIDE"
"""Environment variable that turns TF32 off with "0", in all libraries of CUDA."""


def get_cpu_name() -> str:
    """The processor's model name, as Linux gives it; elsewhere what Python knows."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_affinity() -> str:
    """The cores that this process may run on; ONNX Runtime pins no thread to a core where their number is set."""
    cores = os.cpu_count() or 1
    usable_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(cores)
    if len(usable_cores) == cores:
        return f"not pinned, of {cores} cores"
    return f"bound to {len(usable_cores)} of {cores} cores ({', '.join(map(str, usable_cores))})"


def load_driver() -> ctypes.CDLL:
    """The driver; `OSError` where there is none."""
    return ctypes.CDLL(LIBRARY)


def explain_missing_gpu() -> str:
    """Why there is no GPU to use; "" where there is one."""
    try:
        driver = load_driver()
    except OSError:
        return f"no NVIDIA driver ({LIBRARY} is not there)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver sees no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES show which)"
    return ""


def load_tensorrt() -> None:
    """Load TensorRT from its Python package, where there is one: it lies where the system does not look for it."""
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt")


def get_newest_cuda() -> str:
    """The newest CUDA version that the driver runs, such as "13.1"; `OSError` where there is none."""
    version = ctypes.c_int(0)
    load_driver().cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def explain_old_driver(needed: str) -> str:
    """Why the driver does not run programs for CUDA `needed`, such as "13.0"; "" where it does.

    A driver runs all versions of the newest major one that it knows.
    """
    newest = get_newest_cuda()
    if needed and int(newest.partition(".")[0]) < int(needed.partition(".")[0]):
        return (
            f"the NVIDIA driver is too old: it runs CUDA up to {newest}, onnxruntime needs {needed}; update it, "
            f"or install an onnxruntime-gpu for CUDA {newest.partition('.')[0]}"
        )
    return ""


def measure_memory() -> int:
    """Bytes of the first GPU's memory that are taken, by whomever; 0 where there is no GPU, or it does not tell.

    ONNX Runtime does not give memory back before its session ends, so that growth while one runs is its peak.
    """
    context = None if explain_missing_gpu() else _retain_context()
    if context is None or load_driver().cuCtxPushCurrent_v2(context) != 0:
        return 0
    free_bytes, total_bytes = ctypes.c_size_t(0), ctypes.c_size_t(0)
    failure = load_driver().cuMemGetInfo_v2(ctypes.byref(free_bytes), ctypes.byref(total_bytes))
    load_driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    return 0 if failure else total_bytes.value - free_bytes.value


@cache
def _retain_context() -> ctypes.c_void_p | None:
    """The context that CUDA libraries share, if any. It is kept, since what it takes itself is nobody's peak."""
    driver, device, context = load_driver(), ctypes.c_int(0), ctypes.c_void_p()
    has_device = driver.cuDeviceGet(ctypes.byref(device), 0) == 0
    return context if has_device and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 else None
