"""Facts about the processor and the GPU; the GPU's come from its driver, whatever PyTorch was built for."""

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
"""Environment variable that turns TF32 off in all CUDA libraries if it is "0"."""


def get_cpu_name() -> str:
    """Model name of the processor, from Linux if possible, else from Python."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_affinity() -> str:
    """A text on which cores this process may run; ONNX Runtime pins no threads if their number is set."""
    cores = os.cpu_count() or 1
    usable_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(cores)
    if len(usable_cores) == cores:
        return f"not pinned, of {cores} cores"
    return f"bound to {len(usable_cores)} of {cores} cores ({', '.join(map(str, usable_cores))})"


def load_driver() -> ctypes.CDLL:
    """Load the library of the NVIDIA driver. Raises `OSError` where there is none."""
    return ctypes.CDLL(LIBRARY)


def explain_missing_gpu() -> str:
    """Why there is no usable GPU; "" if there is one."""
    try:
        driver = load_driver()
    except OSError:
        return f"no NVIDIA driver ({LIBRARY} is not there)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver sees no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES show which)"
    return ""


def load_tensorrt() -> None:
    """Load TensorRT from its Python package, if installed, since ONNX Runtime does not look for it there."""
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt")


def get_newest_cuda() -> str:
    """Newest CUDA version that the driver supports, such as "13.1". Raises `OSError` where there is no driver."""
    version = ctypes.c_int(0)
    load_driver().cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def explain_old_driver(needed: str) -> str:
    """Why the driver is too old for programs that need CUDA `needed`, such as "13.0"; "" if it is not.

    A driver runs all versions of the newest major one that it supports.
    """
    newest = get_newest_cuda()
    if needed and int(newest.partition(".")[0]) < int(needed.partition(".")[0]):
        return (
            f"the NVIDIA driver is too old: it runs CUDA up to {newest}, onnxruntime needs {needed}; update it, "
            f"or install an onnxruntime-gpu for CUDA {newest.partition('.')[0]}"
        )
    return ""


def measure_memory() -> int:
    """Bytes in use on the first GPU, by any program; 0 if there is no GPU or it cannot be asked.

    ONNX Runtime gives memory back only when its session ends, so growth while one runs is its peak.
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
    """The CUDA context that all libraries of this process share, or None.

    It is never released, so its own bytes cancel out.
    """
    driver, device, context = load_driver(), ctypes.c_int(0), ctypes.c_void_p()
    has_device = driver.cuDeviceGet(ctypes.byref(device), 0) == 0
    return context if has_device and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 else None
