"""Versions and hardware that measured figures depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from pxcompress.deploy import hardware, runtime
from pxcompress.deploy.export import OPSET

_PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "zennit", "onnx", "onnxscript", "numpy")


def environment() -> dict[str, object]:
    """Versions, hardware and thread count that the figures of this process depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name.replace("-", "_"): importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "onnxruntime": runtime.VERSION,
        "onnx_opset": OPSET,
        "device_name": gpu or hardware.cpu_name(),
        "cpu_name": hardware.cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda if gpu else None,
        "nvidia_tf32_override": os.environ.get("NVIDIA_TF32_OVERRIDE"),
    }
