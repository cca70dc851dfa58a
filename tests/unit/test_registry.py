from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxcompress import choices
from pxcompress.budgets import BUDGETS, macs
from pxcompress.certify import path
from pxcompress.data.embedded import EMBEDDED
from pxcompress.deploy import runtime
from pxcompress.deploy.backends import BACKENDS
from pxcompress.errors import InputError
from pxcompress.planning import order
from pxcompress.registry import Registry, names_in, option
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS


class Toy:
    """Base of all toys."""


TOYS: Registry[Toy] = Registry("toy", "pxcompress.budgets", Toy)
fast = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@TOYS.register("ball")
@dataclass(frozen=True)
class Ball(Toy):
    __module__ = macs.__name__  # as in a file of the package
    radius: float = option(0.5, "in metres", low=0.0, high=10.0)
    seams: int = option(3, "how many", low=0, high=100, log=True)
    bouncy: bool = option(True, "jumps")
    colour: str = option("red", "paint", choices=("red", "green"))
    label: str = option("", "printed on it")
    weight: float = option(1.0, "in kilograms")
    light_up: bool = option(False, "has a lamp")
    at_least: float = option(1.0, "has no upper end", low=0.0)


@TOYS.register("plain-block")
@dataclass(frozen=True)
class Block(Toy):
    __module__ = macs.__name__


def _refused(text: str) -> str:
    with pytest.raises(InputError) as caught:
        TOYS.build(text)
    message = str(caught.value)
    assert "\n" not in message
    assert "None" not in message, "shows the absence of a limit as a limit"
    return message


def test_build_by_hand() -> None:
    assert TOYS.build("ball") == Ball()
    assert TOYS.build("plain-block") == Block()
    assert TOYS.build("ball:radius=2,seams=4,bouncy=false,colour=green") == Ball(2.0, 4, False, "green")
    built = TOYS.build("ball:radius=2")
    assert isinstance(built, Ball)
    assert isinstance(built.radius, float)


@pytest.mark.parametrize(
    "text", ["ball:", " ball ", "ball: radius = 0.5 ", "ball:radius=0.5,", "ball:bouncy=True", "ball:radius=5e-1"]
)
def test_ways_to_write_the_same(text: str) -> None:
    assert TOYS.build(text) == Ball()


def test_dashes_and_underscores_are_the_same_in_options() -> None:
    assert TOYS.build("ball:light-up=true") == TOYS.build("ball:light_up=true") == Ball(light_up=True)


@pytest.mark.parametrize("value", ["f(1,2)", "f(1,2)|g(3,4,5)", "(a,b),", "x=y", "f(1,g(2,3),4)", "a(b(c,d))|e"])
def test_commas_in_brackets_belong_to_the_value(value: str) -> None:
    assert TOYS.build(f"ball:label={value},seams=7") == Ball(label=value.rstrip(","), seams=7)


def test_text_is_the_shortest() -> None:
    assert TOYS.text(Ball()) == "ball"
    assert TOYS.text(Block()) == "plain-block"
    assert TOYS.text(Ball(radius=2, bouncy=False)) == "ball:radius=2,bouncy=false"
    assert TOYS.text(TOYS.build("ball:seams=3,radius=1.50")) == "ball:radius=1.5"


labels = (
    st.text("abc()|=;.-+ 0", max_size=12).map(str.strip).filter(lambda text: text.count("(") == text.count(")") == 0)
)


@fast
@given(
    st.builds(
        Ball,
        st.floats(0, 10),
        st.integers(0, 100),
        st.booleans(),
        st.sampled_from(["red", "green"]),
        labels,
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.floats(0, 1e9),
    )
)
def test_text_round_trip(ball: Ball) -> None:
    text = TOYS.text(ball)
    assert TOYS.build(text) == ball
    assert TOYS.text(TOYS.build(text)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bal", "did you mean ball?"),
        ("", "known: ball, plain-block"),
        ("zzz", "known: ball, plain-block"),
        ("Ball:radius=1", "unknown toy 'Ball'"),
        ("ball:radios=1", "did you mean radius?"),
        ("ball:zzz=1", "known: at_least, bouncy, colour"),
        ("plain-block:size=1", "'plain-block' has no options"),
        ("ball:radius", "radius=VALUE"),
        ("ball:radius=1,radius=2", "given twice"),
        ("ball:radius=wide", "expected a number"),
        ("ball:radius=", "expected a number"),
        ("ball:seams=2.5", "expected a whole number"),
        ("ball:radius=-0.1", "from 0.0 to 10.0"),
        ("ball:radius=10.1", "from 0.0 to 10.0"),
        ("ball:radius=inf", "from 0.0 to 10.0"),
        ("ball:radius=nan", "from 0.0 to 10.0"),
        ("ball:seams=101", "from 0 to 100"),
        ("ball:bouncy=1", "expected true or false"),
        ("ball:bouncy=yes", "expected true or false"),
        ("ball:colour=blue", "expected one of: red, green"),
        ("ball:weight=nan", "weight"),
        ("ball:at_least=-1", "at_least"),
    ],
)
def test_refusals_say_what_was_given_and_what_was_expected(text: str, words: str) -> None:
    assert words in _refused(text)


def test_limits_are_inclusive() -> None:
    assert TOYS.build("ball:radius=0,seams=100") == Ball(radius=0.0, seams=100)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        TOYS.register("ball")(Block)
    assert TOYS.get("ball") is Ball


def test_registering_returns_the_class() -> None:
    own: Registry[Toy] = Registry("own", "pxcompress.budgets", type("Base", (Toy,), {}))

    @own.register("b")
    @dataclass(frozen=True)
    class B:
        pass

    @own.register("a")
    @dataclass(frozen=True)
    class A:
        pass

    assert dataclasses.is_dataclass(A)
    assert list(own) == ["a", "b"]
    assert own.get("b") is B


def test_options_describe_themselves() -> None:
    names = [field.name for field in TOYS.options("ball")]
    assert names[:4] == ["radius", "seams", "bouncy", "colour"]
    radius, seams = TOYS.options("ball")[:2]
    assert radius.metadata["help"] == "in metres"
    assert (radius.metadata["low"], radius.metadata["high"], radius.metadata["log"]) == (0.0, 10.0, False)
    assert seams.metadata["log"] is True
    assert TOYS.options("plain-block") == ()


@pytest.mark.parametrize(
    ("package", "registry"),
    [
        ("pxcompress.scorers", SCORERS),
        ("pxcompress.budgets", BUDGETS),
        ("pxcompress.repair", REPAIRS),
        ("pxcompress.demo", EMBEDDED),
        ("pxcompress.deploy.backends", BACKENDS),
    ],
)
def test_names_are_listed_without_loading_what_they_name(package: str, registry: Registry[object]) -> None:
    ours = [name for name in registry if registry.get(name).__module__.startswith(f"{package}.")]
    assert list(names_in(package)) == ours


def test_words_that_options_take_are_the_keys_of_their_tables() -> None:
    assert tuple(path.RISKS) == (*choices.RISKS, *choices.LOSS_RISKS)
    assert tuple(order.NORMALISATIONS) == tuple(choices.NORMALISATIONS)
    assert runtime.list_providers() == choices.PROVIDERS


@pytest.mark.parametrize("registry", [SCORERS, BUDGETS, REPAIRS], ids=["scorers", "budgets", "repairs"])
def test_every_registered_method_is_found_described_and_written_as_text(registry: Registry[object]) -> None:
    names = list(registry)
    assert names == sorted(names)
    assert len(names) >= 2
    for name in names:
        cls = registry.get(name)
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen, f"{name} is not frozen"  # type: ignore[attr-defined]
        assert (cls.__doc__ or "").strip(), f"{name} has no docstring"
        assert registry.text(registry.build(name)) == name
        for field in registry.options(name):
            assert field.metadata.get("help"), f"option {field.name} of {name} has no help"
            assert field.default is not dataclasses.MISSING
            low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
            assert not choices or field.default in choices
            assert low is None or low <= field.default
            assert high is None or field.default <= high
            assert not field.metadata["log"] or low is not None
