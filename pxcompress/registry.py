"""Registries of named methods with typed options, whose text form serves command line, recipes, reports and search.

@SCORERS.register("lrp")
@dataclass(frozen=True)
class LRP:
    gamma: float = option(0.25, "share of the positive weights added", low=0.0, high=1.0)

SCORERS.build("lrp:gamma=0.1")      -> LRP(gamma=0.1)
SCORERS.text(LRP(gamma=0.1))        -> "lrp:gamma=0.1"

A user's own class, derived from the base of its kind, needs no registration: its name is "package.module:Class".
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from pxcompress.errors import InputError, unknown
from pxcompress.imports import find_object

_REGISTERED = re.compile(r'^@[A-Z]+\.register\("([^"]+)"\)$', re.MULTILINE)
"""Matches the source line that registers a method, with its name as the group."""

_METHOD = re.compile(r"([^:=]*(?::[A-Za-z_][\w.]*(?=:|$))?):?(.*)", re.DOTALL)
"""Matches the text of a method; groups: its name, which is package.module:Class for a user's own, and its options."""

T = TypeVar("T")
C = TypeVar("C", bound=type)


def option(  # noqa: PLR0913  (all but two describe the option to those who read it)
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    choices: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    repeat: bool = False,
) -> Any:
    """Declare a dataclass field as an option: it becomes a command-line option, a JSON key and a line of help text.

    `low` and `high` are inclusive and checked when the option is set from text; `log` asks searches to draw it
    logarithmically; `choices` lists the words a string option may take. `flags` are its names on the command line, if
    not its own. A list is given there as one text with commas, or with `repeat` as an option that is said repeatedly.
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "log": log,
        "choices": choices,
        "flags": flags,
        "repeat": repeat,
    }
    return dataclasses.field(default=default, metadata=metadata)


def names_in(package: str) -> tuple[str, ...]:
    """Names that the modules of `package` register, sorted; read from the source, so that no module is imported.

    What a user registers elsewhere is not among them.
    """
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations or () if spec else ()
    files = (path for folder in folders for path in Path(folder).glob("*.py"))
    return tuple(sorted(name for path in files for name in _REGISTERED.findall(path.read_text(encoding="utf-8"))))


def search_option(field: Any) -> Any:
    """Mark a field made by `option` as one that `pxcompress search` varies, among its choices or from low to high."""
    return dataclasses.field(default=field.default, metadata={**field.metadata, "searched": True})


class Registry(Generic[T]):
    """Methods of one kind by name. All modules of `package` are imported on first use, and register themselves.

    A user's own methods derive from `base`.
    """

    def __init__(self, kind: str, package: str, base: type) -> None:
        self.kind = kind
        self._package = package
        self._base = base
        self._classes: dict[str, type[T]] = {}
        self._discovered = False
        _BY_BASE[base] = self

    def register(self, name: str) -> Callable[[C], C]:
        """A class decorator that registers a dataclass. Raises `ValueError` for a taken name or undeclared fields."""

        def add(cls: C) -> C:
            for field in dataclasses.fields(cls):
                if "help" not in field.metadata:
                    raise ValueError(f"{self.kind} {name!r}: field {field.name!r} must be declared with option(...)")
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._classes[name]} and {cls}")
            self._classes[name] = cls
            return cls

        return add

    def _all(self) -> dict[str, type[T]]:
        if not self._discovered:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._discovered = True
        return self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def get(self, name: str) -> type[T]:
        """The class registered under `name`, or the user's own of the name "package.module:Class".

        Raises `InputError`, which lists the known names, or says why the user's class cannot be taken.
        """
        if name in self._all():
            return self._classes[name]
        if ":" not in name:
            raise unknown(self.kind, name, self._all())
        cls = find_object(name, self.kind)
        if self._base not in getattr(cls, "__mro__", ()) or not dataclasses.is_dataclass(cls):
            expected = f"{self._base.__module__}.{self._base.__qualname__}"
            raise InputError(f"{self.kind} {name!r} cannot be taken; expected a dataclass derived from {expected}")
        return typing.cast("type[T]", cls)

    def options(self, name: str) -> tuple[dataclasses.Field[Any], ...]:
        """The options of a method, as dataclass fields in order."""
        return dataclasses.fields(typing.cast(Any, self.get(name)))

    def build(self, text: str) -> T:
        """Make an instance from "name" or "name:option=value,option=value".

        Commas inside brackets belong to the value. Raises `InputError` for an unknown name, option or value.
        """
        name, options_text = split_method(text)
        if name.partition(":")[0] in self._all():  # an option without a value looks like a class
            name, _, options_text = text.strip().partition(":")
        name = name.strip()
        cls, source = self.get(name), f"{self.kind} {name!r}"
        fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for part in _split(options_text):
            key, sign, value = part.partition("=")
            key = key.strip().replace("-", "_")
            if key not in fields:
                if not fields:
                    raise InputError(f"{source} has no options; given: {part!r}")
                raise unknown(f"option of {source}:", key, fields)
            if not sign:
                raise InputError(f"option {key!r} of {source} needs a value: {key}=VALUE")
            if key in values:
                raise InputError(f"option {key!r} of {source} is given twice")
            values[key] = _convert(value.strip(), hints[key], fields[key], f"option {key!r} of {source}")
        for key, field in fields.items():
            if key not in values and field.default is field.default_factory:  # both are MISSING
                raise InputError(f"option {key!r} of {source} needs a value: {key}=VALUE")
        return cls(**values)

    def text(self, instance: T) -> str:
        """The shortest text from which `build` makes an equal instance, also in another process.

        Raises `InputError` for an instance of the user's that no text gives back.
        """
        cls = type(instance)
        is_ours = cls.__module__.startswith(f"{self._package}.")
        own_name = f"{cls.__module__}:{cls.__qualname__}"
        name = next(name for name, each in self._all().items() if each is cls) if is_ours else own_name
        parts = []
        for field in dataclasses.fields(typing.cast(Any, instance)):
            value = getattr(instance, field.name)
            if value != field.default:
                parts.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
        text = f"{name}:{','.join(parts)}" if parts else name
        if "<locals>" in name or not (is_ours or self.build(text) == instance):
            raise InputError(
                f"{self.kind} {text!r} cannot be made again from this text; expected a class at the top of a module, "
                "and options that are words, numbers, true or false"
            )
        return text


_BY_BASE: dict[type, Registry[Any]] = {}
"""Base class of the methods of a kind -> their registry."""


def as_text(value: object) -> object:
    """The text of a method that is given as an object; any other value as it is. Raises as `Registry.text` does."""
    registry = next((_BY_BASE[base] for base in type(value).__mro__ if base in _BY_BASE), None)
    return value if registry is None else registry.text(value)


def split_method(text: str) -> tuple[str, str]:
    """Name and options in a method's text; the name of a user's own is "package.module:Class"."""
    name, options = typing.cast("re.Match[str]", _METHOD.fullmatch(text.strip())).groups()
    return name.strip(), options


def name_of(text: str) -> str:
    """The name in a method's text."""
    return split_method(text)[0]


def _split(text: str) -> list[str]:
    """Parts of `text` between commas that stand outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _convert(value: str, hint: Any, field: dataclasses.Field[Any], source: str) -> Any:
    """`value` converted to the field's type.

    Raises `InputError` outside of its range or choices; `source` is for messages.
    """
    choices = field.metadata.get("choices", ())
    if choices and value not in choices:
        raise InputError(f"{source} is {value!r}; expected one of: {', '.join(choices)}")
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise InputError(f"{source} is {value!r}; expected true or false")
        return value.lower() == "true"
    if hint not in (int, float):
        return value
    try:
        number = hint(value)
    except ValueError:
        raise InputError(f"{source} is {value!r}; expected {'a whole number' if hint is int else 'a number'}") from None
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if number != number or (low is not None and number < low) or (high is not None and number > high):
        lower, upper = "" if low is None else f" from {low}", "" if high is None else f" to {high}"
        raise InputError(f"{source} is {value}; expected a number{lower}{upper}")
    return number
