"""Versions and hardware that measured figures depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from pxcompress import __version__
from pxcompress.deploy import hardware
from pxcompress.deploy.backends.onnxruntime import VERSION
from pxcompress.deploy.export import OPSET
from pxcompress.proof import Environment

_PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "zennit", "onnx", "onnxscript", "numpy")


def environment(threads: int | None = None) -> Environment:
    """Hardware, versions and number of threads; `threads` are ONNX Runtime's, else PyTorch's are reported."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return Environment(
        pxcompress=__version__,
        python=platform.python_version(),
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in _PACKAGES},
        onnxruntime=VERSION,
        onnx_opset=OPSET,
        device_name=gpu or hardware.get_cpu_name(),
        cpu_name=hardware.get_cpu_name(),
        cpu_count=os.cpu_count(),
        threads=threads or torch.get_num_threads(),
        platform=platform.platform(),
        cuda=torch.version.cuda if gpu else None,
        nvidia_tf32_override=os.environ.get(hardware.TF32_SWITCH),
    )
