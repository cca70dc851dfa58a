"""Finds execution providers of ONNX Runtime that come in packages of their own, onnxruntime-ep-*.

Such a package, imported as onnxruntime_ep_*, says where its library is and what its providers are called. A provider
runs where it has a device; one that is built into ONNX Runtime stays what it is beside it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from pxcompress.deploy.quiet import capture_output, shorten_message

PREFIX = "onnxruntime_ep_"
_ERRORS: tuple[type[Exception], ...] = (
    ImportError,
    OSError,
    AttributeError,
    RuntimeError,
    ValueError,
    ort_errors.Fail,
    ort_errors.EPFail,
    ort_errors.InvalidArgument,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
)
"""Exceptions of a package that does not fit this machine, and of ONNX Runtime where it cannot load its library."""


@dataclass(frozen=True, eq=False)
class Plugin:
    """A package with an execution provider: the devices it offers here, or why it cannot be used."""

    package: str
    version: str
    providers: tuple[str, ...] = ()
    devices: tuple[Any, ...] = ()
    failure: str = ""

    @property
    def device_names(self) -> tuple[str, ...]:
        """Kinds of its devices, such as "CPU" or "GPU", each once."""
        return tuple(dict.fromkeys(each.device.type.name for each in self.devices))


@cache
def find_plugins() -> tuple[Plugin, ...]:
    """All installed packages with a provider, sorted by name; each is loaded only once."""
    names = sorted(module.name for module in pkgutil.iter_modules() if module.name.startswith(PREFIX))
    return tuple(_load(name) for name in names)


def choose_plugin() -> Plugin | None:
    """The first package whose provider has a device on this machine; None if there is none."""
    return next((plugin for plugin in find_plugins() if plugin.devices), None)


def explain_no_plugin() -> str:
    """Why no plug-in provider can be used; "" if one can."""
    if choose_plugin() is not None:
        return ""
    reasons = [f"{plugin.package}: {plugin.failure}" for plugin in find_plugins()]
    return "; ".join(reasons) or "no package onnxruntime-ep-* is installed"


def _load(name: str) -> Plugin:
    """Import a package and register its library with ONNX Runtime; returns the `Plugin`, also if that fails."""
    package, version = _describe_package(name)
    try:
        with capture_output():
            module = importlib.import_module(name)
            ask = getattr(module, "get_ep_names", None)
            providers = tuple(ask() if ask is not None else [module.get_ep_name()])
            ort.register_execution_provider_library(name, module.get_library_path())
            devices = tuple(device for device in ort.get_ep_devices() if device.ep_name in providers)
    except _ERRORS as error:
        return Plugin(package, version, failure=shorten_message(str(error)) or type(error).__name__)
    failure = "" if devices else f"{' and '.join(providers)} has no device that it takes on this machine"
    return Plugin(package, version, providers, devices, failure)


def _describe_package(module: str) -> tuple[str, str]:
    """Name and version of the installed package that a module comes from."""
    packages = importlib.metadata.packages_distributions().get(module, [])
    package = packages[0] if packages else module.replace("_", "-")
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package, "of unknown version"
