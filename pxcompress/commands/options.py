"""Options that commands share. Those of a recipe come from its fields: names, types, help and defaults stand there."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from pxcompress.choices import one_of
from pxcompress.commands.panels import EXPERT, PANEL_OF
from pxcompress.errors import InputError
from pxcompress.recipe import GOALS, Bench, Guarantee, Recipe
from pxcompress.recipe.file import read_recipe
from pxcompress.recipe.goal import auto_normalise, auto_round_to
from pxcompress.registry import split_method


def _describe(field: Field[Any]) -> str:
    """The help text of a field's option, with its default value appended unless the text has it."""
    text = str(field.metadata["help"])
    has_no_default = any(field.default is value for value in (MISSING, None, False, (), ""))
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    return text if "[default:" in text or has_no_default else f"{text}  [default: {default}]"


_FIELDS = {field.name: field for cls in (Recipe, Guarantee, Bench) for field in fields(cls) if field.metadata}
_HELP = {name: _describe(field) for name, field in _FIELDS.items()}

Model = Annotated[str, typer.Option(help=_HELP["model"])]
Checkpoint = Annotated[Path | None, typer.Option(help=_HELP["checkpoint"])]
InputSize = Annotated[str | None, typer.Option(help=_HELP["input_size"])]
Provider = Annotated[str, typer.Option(help=Bench.__dataclass_fields__["provider"].metadata["help"])]
Threads = Annotated[int, typer.Option(help=Bench.__dataclass_fields__["threads"].metadata["help"])]
Confidence = Annotated[float | None, typer.Option(help=_HELP["confidence"])]
Risk = Annotated[str | None, typer.Option(help=_HELP["risk"])]
Part = Annotated[str | None, typer.Option(help=_HELP["part"])]
Coverage = Annotated[float | None, typer.Option(help=_HELP["coverage"])]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress to stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run folder --out if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Command = Callable[..., None]
T = TypeVar("T")


def takes_recipe(*, without: tuple[str, ...] = (), **preset: Any) -> Callable[[Command], Command]:
    """A decorator that turns the command's first parameter, a recipe, into one option for each field of a recipe.

    Fields named in `without` ("bench" and "guarantee" stand for all of theirs) have no option, but may have a
    value in `preset`. With --config a file has the recipe, and options on the command line replace its values.
    """

    def decorate(command: Command) -> Command:
        parameters_of_command = [
            each.replace(kind=each.KEYWORD_ONLY)
            for each in inspect.signature(command, eval_str=True).parameters.values()
        ][1:]
        own_options = {
            field.name: _make_parameter(cls, field)
            for part, cls in (("", Recipe), ("guarantee", Guarantee), ("bench", Bench))
            for field in fields(cls)
            if part not in without and field.name not in (*without, "bench", "guarantee")
        }
        config = Annotated[
            Path | None,
            typer.Option(
                help="Read options from a run folder's recipe.json, or .toml or .yaml; options given beside it win."
            ),
        ]
        others = [_to_its_panel(each) for each in (_make_keyword("config", config, None), *parameters_of_command)]
        parameters = [*own_options.values(), *others]

        @functools.wraps(command)
        def with_options(**arguments: Any) -> None:
            options = {name: arguments.pop(name) for name in own_options}
            options = {
                name: value for name, value in options.items() if value is not None and value is not False
            } | preset
            command(recipe_of(options, arguments.pop("config")), **arguments)

        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_options

    return decorate


def takes_record(cls: type[T]) -> Callable[[Callable[[T], None]], Command]:
    """A decorator that turns the command's parameter, a record of the dataclass `cls`, into one option for each field.

    The types of the fields say what an option is, as those of a command's parameters do.
    """

    def decorate(command: Callable[[T], None]) -> Command:
        hints = typing.get_type_hints(cls, include_extras=True)
        parameters = [_make_keyword(each.name, hints[each.name], each.default) for each in fields(cls)]  # type: ignore[arg-type]

        @functools.wraps(command)
        def with_options(**arguments: Any) -> None:
            command(cls(**arguments))

        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_options

    return decorate


def recipe_of(options: Mapping[str, Any], config: Path | None) -> Recipe:
    """The recipe of the file `config`, if any, with `options` over it, by field name. Raises `InputError`."""
    content: dict[str, Any] = {} if config is None else read_recipe(config)
    content |= {key: _read(key, value) for key, value in content.items() if isinstance(value, str)}
    options = {name: _read(name, value) for name, value in options.items()}
    for key, cls in (("bench", Bench), ("guarantee", Guarantee)):
        part = {field.name: options.pop(field.name) for field in fields(cls) if field.name in options}
        in_file = content.get(key) or {}
        if not isinstance(in_file, dict):
            raise InputError(f"{key} is {in_file!r} in {str(config)!r}; expected keys and values as in recipe.json")
        content[key] = {**in_file, **part} or None
        if key == "bench" and isinstance(content.get("budget"), str):
            content["budget"] = _drop_options(content["budget"], part)
    if content["guarantee"] and "max_drop" not in content["guarantee"]:
        raise InputError(f"--{next(iter(content['guarantee']))} has no effect without --max-drop; add it")
    content = {
        key: value for key, value in content.items() if key not in _list_replaced_fields(content, options)
    } | options
    if "model" not in content:
        raise InputError("no model is given; say --model NAME, or --config FILE with one")
    source = "the recipe" if config is None else f"config {str(config)!r}"
    return Recipe.from_dict({key: value for key, value in content.items() if value is not None}, source)


def _list_replaced_fields(content: Mapping[str, Any], options: Mapping[str, Any]) -> set[str]:
    """Fields of a file's `content` that `options` on the command line replace: other goals, and what depended on
    them.
    """
    if any(name in options for name in GOALS):
        return {*GOALS, "budget", "round_to", "normalise"}
    consequences: dict[str, Any] = {}
    budget = content.get("budget")
    if "budget" in options and isinstance(budget, str):
        consequences = {"normalise": auto_normalise(budget), "round_to": auto_round_to(budget)}
    return {name for name, value in consequences.items() if content.get(name) == value}


def _drop_options(text: str, names: Collection[str]) -> str:
    """The text of a method, "name:option=value,...", without the options `names`."""
    name, options = split_method(text)
    remaining_options = [option for option in options.split(",") if option and option.partition("=")[0] not in names]
    return ":".join([name, ",".join(remaining_options)] if remaining_options else [name])


def _make_parameter(cls: type, field: Field[Any]) -> inspect.Parameter:
    """The command-line option for one field; it has no default of its own, so that a value from a file can count."""
    hint = typing.get_type_hints(cls)[field.name]
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] or [hint]
    kind = hint if not isinstance(hint, types.UnionType) else kinds[0]
    flags = field.metadata["flags"] or (f"--{field.name.replace('_', '-')}",)
    option = typer.Option(*flags, help=_HELP[field.name], rich_help_panel=PANEL_OF.get(field.name, EXPERT))
    if kind is bool:
        return _make_keyword(field.name, Annotated[bool, option], False)
    if field.metadata["repeat"]:
        kind = list[str]
    elif field.name in _READ or _is_list(field):
        kind = str
    return _make_keyword(field.name, Annotated[kind | None, option], None)


def _to_its_panel(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter that is no field of a recipe, placed in the right panel of the help text."""
    if parameter.name not in ("config", "force", "quiet", "as_json"):
        return parameter
    kind, option = typing.get_args(parameter.annotation)
    option = copy.copy(option)
    option.rich_help_panel = EXPERT
    return parameter.replace(annotation=Annotated[kind, option])


def _make_keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _split_names(text: str) -> tuple[str, ...]:
    """Names from `text`: separated by commas, or one on each line of the file with this name. Raises `InputError`."""
    try:
        parts = Path(text).read_text(encoding="utf-8-sig").splitlines() if os.path.isfile(text) else text.split(",")
    except UnicodeDecodeError as error:
        raise InputError(f"{text!r} is not a text file; expected one with a name per line") from error
    names = tuple(name for part in parts if (name := part.strip()))
    if not names:
        raise InputError(f"{text!r} has no names; expected names with commas, or a file with one per line")
    return names


def _parse_factor(text: str) -> float:
    """Parse a factor: "2x" or "2" is 2.0. Raises `InputError`."""
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise InputError(f"speedup is {text!r}; expected a factor above 1, such as 2x") from None


def read_input_size(text: str) -> int | tuple[int, int]:
    """Parse an input size: "224" is 224, "384x640" is (384, 640). Raises `InputError` for other text."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise InputError(f"input-size is {text!r}; expected a side in pixels, such as 224, or HEIGHTxWIDTH")
    height, *others = (int(side) for side in sides)
    return (height, others[0]) if others else height


def _parse_bytes(text: str) -> int:
    """Parse a size in bytes: "20MB" or "20000000" is 20000000. Raises `InputError`."""
    parts = re.fullmatch(r"([0-9.]+) *([a-zA-Z]*)", text.strip())
    try:
        return round(float(parts[1]) * SIZES[parts[2].upper()])  # type: ignore[index]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise InputError(f"max-bytes is {text!r}; expected a size, such as 20MB") from None


def _parse_step(text: str) -> int:
    """Parse a step of widths: "8" is 8; the name of an ecosystem gives the step that suits it. Raises `InputError`."""
    from pxcompress.deploy.converters import CONVERTERS

    if text in CONVERTERS:
        return CONVERTERS.get(text).round_to
    try:
        return int(text)
    except ValueError:
        names = one_of(CONVERTERS)
        raise InputError(f"round-to is {text!r}; expected a whole number, or where the model goes: {names}") from None


def _parse_repairs(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The repairs in order; "none" alone means no repair. Raises `InputError`."""
    if "none" in texts and len(texts) > 1:
        raise InputError("--repair none is given with other repairs; leave it out, or them")
    return () if texts == ("none",) else texts


def _read_scorer(text: str) -> str:
    """The text of a scorer; "@FILE" reads it from a file, such as the composite.json of a search."""
    if not text.startswith("@"):
        return text
    try:
        return str(json.loads(Path(text[1:]).read_text(encoding="utf-8-sig"))["scorer"])
    except OSError as error:
        raise InputError(f"--score {text!r} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"--score {text!r} holds no scorer; expected a composite.json that a search wrote") from error


def _read(name: str, value: Any) -> Any:
    """The value of a field, parsed from the text of its option or from a recipe file."""
    field = _FIELDS.get(name)
    if field is not None and field.metadata["repeat"]:
        value = (value,) if isinstance(value, str) else tuple(value)
    elif field is not None and _is_list(field) and isinstance(value, str):
        value = _split_names(value)
    return _READ[name](value) if name in _READ else value


def _is_list(field: Field[Any]) -> bool:
    """Whether a field holds several texts, which are given as one with commas."""
    return str(field.type).startswith(("Sequence[str]", "tuple[str, ...]")) and not field.metadata["repeat"]


_READ: Mapping[str, Callable[[Any], Any]] = {
    "repair": _parse_repairs,
    "round_to": _parse_step,
    "scorer": _read_scorer,
    "speedup": _parse_factor,
    "input_size": read_input_size,
    "max_bytes": _parse_bytes,
}
"""Parsers by field, for options that are given as text."""
