"""Fixtures shared by all tests; `models` (beside this file) is importable from every test."""

from __future__ import annotations

import pytest
from models import FAMILIES, SMALL, Subject
from models import subject as subject_named


@pytest.fixture(scope="session", params=list(FAMILIES))
def subject(request: pytest.FixtureRequest) -> Subject:
    """Every family in turn."""
    return subject_named(request.param)


@pytest.fixture(scope="session", params=SMALL)
def small(request: pytest.FixtureRequest) -> Subject:
    """The cheap families in turn."""
    return subject_named(request.param)
