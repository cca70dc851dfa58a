"""Fixtures shared by all tests; `models` (beside this file) is importable from every test."""

from __future__ import annotations

import functools

import pytest
from models import FAMILIES, SMALL, Subject
from models import subject as subject_named
from torch.onnx._internal.exporter._registration import ONNXRegistry

ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
"""PyTorch's exporter parses the sources of its 500 operators anew for each file, half of what a small one takes."""


@pytest.fixture(scope="session", params=list(FAMILIES))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Every family in turn."""
    return subject_named(request.param)


@pytest.fixture(scope="session", params=SMALL)
def small(request: pytest.FixtureRequest) -> Subject:
    """The cheap families in turn."""
    return subject_named(request.param)
