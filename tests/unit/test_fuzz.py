"""Whatever is typed or written into a recipe file, the command ends with a code that says whose fault it is."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import sys
from dataclasses import fields
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from typer.main import get_command

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
    words = [word for pair in options.items() for word in pair]
    code, error = _code(command, "--model", "resnet10t", *words, "--data", NOWHERE, "--quiet")
    assert code == 2, (words, error)
    assert "Traceback" not in error


COMMANDS = dict(get_command(cli.app).commands)  # type: ignore[attr-defined]
ARGUMENTS = {"bench", "certify", "explain", "report", "verify"}
"""Commands that take files or folders."""

SMALL = {
    "inspect": ["--model", "models:FlattenCNN"],
    **{name: ["--model", "resnet10t", "--data", NOWHERE] for name in ("run", "sweep", "search")},
    **{name: ["--data", NOWHERE] for name in ("certify", "explain", "verify")},
}
"""What keeps a command short; it is said last, so that it counts."""

sizes = st.sampled_from(["-1", "0", "1", "3", "1e3", "999999999999"])  # none that a machine only just has memory for


def _places(folder: Path) -> list[str]:
    """An ONNX classifier, and what is none; a run folder, nearly."""
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", shape[:1], shape[1:])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "it.onnx")
    (folder / "text.onnx").write_text("no model")
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "recipe.json").write_text(Recipe("resnet10t", 0.5, data=NOWHERE).to_json())
    shutil.copy(folder / "it.onnx", folder / "run" / "model.onnx")
    shutil.copy(folder / "it.onnx", folder / "run" / "dense.onnx")
    return ["it.onnx", "text.onnx", "run", ".", "nothing"]


@st.composite
def _command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command and some of its options, with values or, where it takes none, without; and one more word at times."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    given_options = []
    options = [each for each in COMMANDS[name].params if each.param_type_name == "option"]
    some = st.lists(st.sampled_from(options), max_size=4, unique_by=lambda each: each.name) if options else st.just([])
    for each in draw(some):
        value = words | sizes | st.sampled_from(["it.onnx", "run", "lrp", "cpu", "cpu,cuda-graph", "fp16", "0.5", "2x"])
        given_options += [draw(st.sampled_from(each.opts))] + ([] if each.is_flag else [draw(value)])
    return name, [*given_options, *draw(st.lists(words, max_size=1))]


@given(line=_command_lines(), place=st.integers(0, 4))
@settings(fuzz, max_examples=60)
def test_any_command(tmp_path: Path, line: tuple[str, list[str]], place: int) -> None:
    """All commands, also those that get as far as to work on something small."""
    name, words = line
    with contextlib.chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        argument = [_places(tmp_path)[place]] if name in ARGUMENTS else []
        code, error = _code(name, *argument, *words, *SMALL.get(name, []))
    assert code in (0, 2, 3), (name, words, error)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "words", [["--provider", ""], ["--threads", "-1"], ["--threads", "999999999999"], ["--batch-size", "-1"]]
)
def test_what_it_has_found(words: list[str]) -> None:
    code, error = _code("inspect", "--model", "models:FlattenCNN", "--latency", *words)
    assert code == 2, error
    assert error.splitlines()[-1].startswith("pxcompress: ")


@given(
    content=st.dictionaries(st.sampled_from(FIELDS) | words, json_values, max_size=5),
    suffix=st.sampled_from(["json", "yaml"]),
)
@fuzz
def test_any_recipe_file(tmp_path: Path, content: dict[str, object], suffix: str) -> None:
    """What is JSON is YAML as well."""
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(json.dumps(content))
    code, error = _code("run", "--config", str(path), "--data", NOWHERE, "--quiet")
    assert code == 2, (content, error)
    assert len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "\ud800", "a = 1\n[[[", "a: 2001-99-99", "[" * 100_000])
@pytest.mark.parametrize("suffix", ["json", "toml", "yaml"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"recipe.{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    code, error = _code("run", "--config", str(path), "--quiet")
    assert (code, len(error.strip().splitlines())) == (2, 1), error
