"""Imports point one way: a module may use what stands before it in the line, never what comes after."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import pxcompress

ROOT = Path(pxcompress.__file__).parent

LINE = (
    ("errors", "types", "state", "elimination", "notes", "columns"),
    ("guard",),
    ("imports",),
    ("registry",),
    ("checks", "cache", "proof", "layout", "processes"),
    ("choices",),
    ("passes", "certify", "onnx_in"),
    ("models",),
    ("tasks",),
    ("deploy",),
    ("data", "graph", "attribution"),
    ("demo", "agreement", "cost"),
    ("scorers", "repair", "clock", "directions"),
    ("budgets", "planning", "inspection", "exchange_rates"),
    ("recipe",),
    ("workload", "report", "run"),
    ("module_folder",),
    ("run_folder", "temperature", "preparation"),
    ("stages", "explain"),
    ("pipeline",),
    ("own_module", "sweep", "search"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
PLACE = {name: place for place, names in enumerate(LINE) for name in names}
DOORS = {
    "torch_pruning": {"graph"},
    "onnxruntime": {"deploy"},
    "openvino": {"deploy"},
    "nncf": {"deploy"},
    "tensorrt": {"deploy"},
    "coremltools": {"deploy"},
    "executorch": {"deploy"},
    "litert_torch": {"deploy"},
    "zennit": {"attribution"},
    "optuna": {"search"},
}


def _room(path: Path) -> str:
    """The part of the package a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def _imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions."""
    package = ".".join(["pxcompress", *path.relative_to(ROOT).parts[:-1]])
    return _names_in(path.read_text(), package)


def _names_in(source: str, package: str) -> set[str]:
    """The same of source text in `package`; relative imports are resolved, `import_module` of a text is seen as well.

    What `import_module` is given that is no text counts as "?".
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names.add(_text_of(node.args[0]) if node.args else "?")
    return names


def _text_of(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else "?"


def _with_loose_dicts(source: str) -> set[str]:
    """Public functions and classes of a module with a `dict[str, Any]` in a signature, or as a public field."""

    def annotations(node: ast.AST) -> Iterator[ast.expr | None]:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield each.annotation
            yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                name = getattr(part, "name", None) or ast.unparse(getattr(part, "target", ast.Constant("")))
                if not name.startswith("_") or name.startswith("__"):
                    yield from annotations(part)

    return {
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if any(LOOSE.search(ast.unparse(each)) for each in annotations(node) if each is not None)
    }


LOOSE = re.compile(r"(dict|Mapping)\[str, (Any|object)\]")
LOOSE_ON_PURPOSE = {
    "checks.check_keys": "content of JSON, whose keys it checks",
    "models.Architecture": "arguments of whatever builds a model",
    "recipe.Recipe": "content of JSON, which becomes a recipe",
    "recipe.read_recipe": "keys and values of a file before options are put over them",
}
"""What may, and why."""

BY_TEXT = {
    "imports": "a user's own module",
    "registry": "a package's methods",
    "deploy": "packages of converters, and of providers, which need not be installed",
}
"""Rooms that import by a name they are told, and what it names."""


FILES = sorted(path for path in ROOT.rglob("*.py") if _room(path) != "__init__")
TESTS = sorted(Path(__file__).parent.rglob("*.py"))


def test_every_room_has_its_place() -> None:
    assert {_room(path) for path in FILES} == set(PLACE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    here = _room(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "pxcompress" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] == here or PLACE[parts[1]] < PLACE[here], f"{here} imports {name}"
        if parts[0] in DOORS:
            assert here in DOORS[parts[0]], f"{here} imports {name}; its door is {DOORS[parts[0]]}"


def test_imports_of_all_kinds_are_seen() -> None:
    source = """
from . import a
from .b import c
from ..d import e
import f.g as h
def later():
    importlib.import_module("i.j"), import_module(name), __import__("k")
"""
    seen = {"p.q.a", "p.q.b.c", "p.d.e", "f.g", "i.j", "?", "k"}
    assert _names_in(source, "p.q") == seen


def test_only_some_rooms_import_by_a_name_that_they_are_told() -> None:
    assert {_room(path) for path in FILES if "?" in _imports(path)} == set(BY_TEXT)


def test_no_dict_of_anything_goes_from_room_to_room() -> None:
    """What another room imports takes and returns records: none of its types is a mapping of names to just anything."""
    loose = {f"{_room(path)}.{name}" for path in FILES for name in _with_loose_dicts(path.read_text())}
    crossing = {
        name
        for path in FILES
        for parts in (imported.split(".") for imported in _imports(path))
        if parts[0] == "pxcompress" and len(parts) > 2 and parts[1] != _room(path)
        if (name := f"{parts[1]}.{parts[-1]}") in loose
    }
    assert crossing == set(LOOSE_ON_PURPOSE)


def test_dicts_of_anything_are_seen_wherever_they_stand() -> None:
    source = """
def takes(a: int, *, b: Mapping[str, Any] | None = None): ...
def returns() -> list[dict[str, object]]: ...
def typed(a: Mapping[str, int]) -> dict[int, Any]: ...
def _private(a: dict[str, Any]): ...
class Record:
    facts: Mapping[str, Any]
class Methods:
    def __init__(self, facts: Mapping[str, Any]) -> None: ...
    def _inner(self, facts: dict[str, Any]) -> None: ...
class Fine:
    def method(self, facts: Mapping[str, str]) -> None:
        inside: dict[str, Any] = {}
"""
    assert _with_loose_dicts(source) == {"takes", "returns", "Record", "Methods"}


def test_the_product_reaches_demo_by_name_alone() -> None:
    outside = [path for path in FILES if _room(path) != "demo"]
    assert not [path for path in outside if any(name.startswith("pxcompress.demo") for name in _imports(path))]


def test_public_names_resolve() -> None:
    for name in pxcompress.__all__:
        assert getattr(pxcompress, name) is not None
    with pytest.raises(AttributeError):
        pxcompress.nothing  # noqa: B018


def test_modules_and_functions_are_short() -> None:
    """At most 400 lines a module, also of tests, and 50 a function, its signature and docstring included."""
    too_long = []
    for path in (*FILES, *TESTS):
        text = path.read_text()
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1, 50) for node in functions]
        for name, length, limit in [("the module", len(text.splitlines()), 400), *lengths]:
            too_long += [f"{path}, {name}: {length} lines"] * (length > limit)
    assert not too_long


PARTICIPLES = {"found", "said", "known", "kept", "gone", "taken", "given", "moved", "asked", "tried"}
"""What says that something was done with a value, and not what the value is."""


def _participles(tree: ast.AST) -> set[str]:
    """Arguments and variables of functions that are called by a participle alone."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    names: set[str] = set()
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names & PARTICIPLES


def test_text_files_name_their_encoding() -> None:
    """The default is that of the machine: on some, class names would be written that nobody else can read."""
    for path in ROOT.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                is_text = call.func.attr in ("read_text", "write_text")
                assert not is_text or "encoding" in {each.arg for each in call.keywords}, f"{path}:{call.lineno}"


def test_names_say_what_they_hold() -> None:
    assert not {path: names for path in (*FILES, *TESTS) if (names := _participles(ast.parse(path.read_text())))}


def test_participles_are_seen() -> None:
    source = """
kept = lambda said: 1
class Record:
    asked: int
    def method(self, found):
        for gone, _ in found:
            known = gone.moved(tried=1)
"""
    assert _participles(ast.parse(source)) == {"said", "found", "gone", "known"}


def _names_of(tree: ast.AST) -> set[str]:
    """Everything that is named in code, and the words of its short strings, docstrings aside."""
    names: set[str] = set()
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in (each for each in ast.walk(tree) if id(each) not in docstrings):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names |= {node.name.rpartition(".")[2], node.asname or ""}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
            names |= set(re.findall(r"\w+", node.value))
    return names


def _stale_names(tree: ast.AST, elsewhere: set[str]) -> set[str]:
    """Words in backticks of docstrings that neither the module has nor the package defines."""
    own = _names_of(tree)
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)]
    words = {word for node in documented for word in re.findall(r"`(_?[a-z]\w+)`", ast.get_docstring(node) or "")}
    return words - own - elsewhere


def _broken_summaries(tree: ast.Module) -> list[str]:
    """First paragraphs of docstrings that end in the middle of a sentence, as after a cut at the wrong place."""
    documented = (each for each in ast.walk(tree) if isinstance(each, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    summaries = ((ast.get_docstring(each) or ".").split("\n\n")[0] for each in documented)
    return [summary for summary in summaries if not re.search(r"[.:?!\])]$", summary)]


def test_summaries_are_whole_sentences() -> None:
    broken = {str(path): _broken_summaries(ast.parse(path.read_text())) for path in FILES}
    assert not {path: summaries for path, summaries in broken.items() if summaries}
    assert _broken_summaries(ast.parse('"""T = |W\n\n| + b."""')) == ["T = |W"]


def test_docstrings_name_what_there_is() -> None:
    """A parameter that was renamed must not live on in the sentence about it."""
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    elsewhere = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                elsewhere |= {
                    node.name,
                    *re.findall(r"register\('([\w]+)'\)", "".join(map(ast.unparse, node.decorator_list))),
                }
    stale = {path: words for path, tree in trees.items() if (words := _stale_names(tree, elsewhere | set(dir(torch))))}
    assert not stale


def test_stale_names_are_seen() -> None:
    source = (
        'def f(new: int) -> int:\n    """`new` and `old`, as `len` and `known` have it."""\n    return len(str(new))\n'
    )
    assert _stale_names(ast.parse(source), {"known"}) == {"old"}
