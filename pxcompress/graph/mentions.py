"""Whether any code could call a layer: one that no method of the modules around it mentions can never run."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Containers whose children are reached by index or key, not by a name in the code."""

BY_ANY_NAME = {"getattr", "get_submodule", "children", "named_children", "modules", "named_modules"}
BY_ANY_NAME |= {"_modules", "__dict__", "vars"}
"""What reaches children without naming them."""

BUILDERS = frozenset({"__init__", "__setstate__", "extra_repr", "__repr__"})


def could_run(model: nn.Module, layer: str) -> bool:
    """Whether the code of the modules around `layer` mentions its name, or reaches children without naming them."""
    parts = layer.split(".")
    names: set[str] = set()
    for depth, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:depth]))
        names |= _list_names(parent)
        if not isinstance(parent, LISTS) and part not in names and not names & BY_ANY_NAME:
            return False
    return True


def _list_names(module: nn.Module) -> set[str]:
    """Names in the methods of a module's own classes, in functions that it holds, and in functions that these call."""
    own_classes = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.nn.modules")]
    members = [value for kind in own_classes for key, value in vars(kind).items() if key not in BUILDERS]
    pending = [function for value in (*members, *vars(module).values()) for function in _list_functions(value)]
    visited_codes: set[CodeType] = set()
    names: set[str] = set()
    while pending:
        function = pending.pop()
        for code in _list_codes(function.__code__):
            if code in visited_codes:
                continue
            visited_codes.add(code)
            names |= {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
            pending += [each for name in code.co_names for each in _list_functions(function.__globals__.get(name))]
        cells = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
        pending += [each for value in cells for each in _list_functions(value)]
    return names


def _list_functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions in a member of a class or module, such as a method or a property."""
    if isinstance(value, property):
        yield from (each for each in (value.fget, value.fset) if isinstance(each, FunctionType))
        return
    if isinstance(value, MethodType | staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, FunctionType) and not (value.__module__ or "").startswith("torch."):
        yield value
        yield from _list_functions(getattr(value, "__wrapped__", None))


def _list_codes(code: CodeType) -> Iterator[CodeType]:
    """The code object of a function and of all functions defined inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _list_codes(inner)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
