"""Whatever is typed or written into a recipe file, the command ends with a code that says whose fault it is."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pxcompress import cli
from pxcompress.recipe import Bench, Guarantee, Recipe

FIELDS = [field.name for cls in (Recipe, Bench, Guarantee) for field in fields(cls)]
NOWHERE = "/nonexistent/images"
words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
values = st.one_of(
    words,
    st.integers(-(2**40), 2**40).map(str),
    st.floats().map(str),
    st.sampled_from(["0.5", "2x", "20MB", "lrp", "lrp:composite=", "fold", "macs:", "none", "all", "cpu", "resnet10t"]),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
fuzz = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _code(*words: str) -> tuple[int, str]:
    """Exit code and stderr of a command in this process."""
    error, handler = io.StringIO(), signal.getsignal(signal.SIGTERM)
    argv, sys.argv = sys.argv, ["pxcompress", *words]
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as stop:
        return int(stop.code or 0), error.getvalue()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    raise AssertionError("no exit")


@given(
    command=st.sampled_from(["run", "sweep"]),
    options=st.dictionaries(
        st.sampled_from(FIELDS).map(lambda name: f"--{name.replace('_', '-')}"), values, max_size=5
    ),
)
@fuzz
def test_any_options(command: str, options: dict[str, str]) -> None:
    """The data is not there, so that nothing runs for long; nothing may end in a traceback."""
    said = [word for pair in options.items() for word in pair]
    code, error = _code(command, "--model", "resnet10t", *said, "--data", NOWHERE, "--quiet")
    assert code == 2, (said, error)
    assert "Traceback" not in error


@given(content=st.dictionaries(st.sampled_from(FIELDS) | words, json_values, max_size=5))
@fuzz
def test_any_recipe_file(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(content))
    code, error = _code("run", "--config", str(path), "--data", NOWHERE, "--quiet")
    assert code == 2, (content, error)
    assert len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "\ud800", "a = 1\n[[["])
@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"recipe.{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    code, error = _code("run", "--config", str(path), "--quiet")
    assert (code, len(error.strip().splitlines())) == (2, 1), error
