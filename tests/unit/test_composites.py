"""Composites: their text form, and which layer gets which rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pxcompress.attribution import COMPOSITES, RULES, attributed, parse_composite
from pxcompress.attribution.attention import SOFTMAX_RULES
from pxcompress.attribution.composites import PARTS, split_by_depth
from pxcompress.attribution.rules import AlphaBeta, Epsilon, Flat, Gamma, ZBox, ZPlus
from pxcompress.errors import InputError


@pytest.mark.parametrize("name", COMPOSITES)
def test_named_composites_parse_and_print_as_their_name(name):
    composite = parse_composite(name)
    assert str(composite) == name
    assert parse_composite(COMPOSITES[name]) == composite


def test_gamma_is_smaller_for_linear_layers():
    low = parse_composite("gamma").low
    assert (low.convolution, low.linear) == (Gamma(0.25), Gamma(0.05))
    low = parse_composite("gamma(0.1)").low
    assert (low.convolution, low.linear) == (Gamma(0.1), Gamma(0.1))


def test_every_part_and_parameter_is_read():
    text = "first=zbox(-2;3)|low=alphabeta(3;2)|mid=zplus/epsilon(0.5)|high=gamma|classifier=flat|softmax=attn"
    composite = parse_composite(text)
    assert composite.first.convolution == ZBox(-2.0, 3.0)
    assert composite.low.linear == AlphaBeta(3.0, 2.0)
    assert (composite.mid.convolution, composite.mid.linear) == (ZPlus(), Epsilon(0.5))
    assert composite.classifier.linear == Flat()
    assert composite.softmax == "attn"
    assert str(composite) == text


def test_parts_can_be_changed_on_top_of_a_named_composite():
    composite = parse_composite("pxp-cnn | first = flat | softmax = zplus")
    assert composite.high == parse_composite("pxp-cnn").high
    assert composite.choice("first").convolution == Flat()
    assert parse_composite("gamma").choice("first") == parse_composite("gamma").low
    assert (
        str(parse_composite("low=epsilon|mid=epsilon|high=epsilon|classifier=epsilon|softmax=attn"))
        == "epsilon|softmax=attn"
    )


numbers = st.floats(0, 100).map(lambda value: float(f"{value:g}"))
rules = st.one_of(
    st.sampled_from([name for name in RULES if name not in ("gamma", "alphabeta")]),
    st.sampled_from(
        ["gamma", "alpha2beta1", "zplus/epsilon", "epsilon/gamma(0.05)", "gamma(0.25)", "gamma(0.25)/gamma"]
    ),
    st.builds("gamma({:g})".format, numbers),
    st.builds("epsilon({:g})".format, numbers),
    st.integers(0, 9).map(lambda beta: f"alphabeta({beta + 1};{beta})"),
    st.builds("zbox({:g};{:g})".format, numbers.map(float.__neg__), numbers),
)


@given(
    st.fixed_dictionaries(dict.fromkeys(PARTS[1:], rules)),
    st.one_of(st.none(), rules),
    st.sampled_from(list(SOFTMAX_RULES)),
)
def test_text_round_trips_and_has_no_commas_or_square_brackets(parts, first, softmax):
    parts = {**parts, "softmax": softmax} | ({"first": first} if first else {})
    composite = parse_composite("|".join(f"{part}={rule}" for part, rule in parts.items()))
    assert parse_composite(str(composite)) == composite
    assert not set(str(composite)) & set(",[]{}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama", "did you mean gamma"),
        ("epsilom|first=flat", "did you mean epsilon"),
        ("epsilon|lo=zplus", "unknown part of a composite 'lo'"),
        ("epsilon|low=zpls", "did you mean zplus"),
        ("epsilon|softmax=ct", "unknown softmax rule"),
        ("alphabeta(2;0.5)", "alpha - beta = 1"),
        ("gamma(x)", "expected numbers"),
        ("gamma(0.1;0.2)", r"expected gamma\(gamma\)"),
        ("zplus(1)", "expected zplus without parameters"),
        ("alpha2beta1(2;1)", "takes no parameters"),
        ("gamma(0.25", "cannot be read"),
        ("epsilon/gamma/zplus", "names 3 rules"),
        ("low=epsilon|high=epsilon", "no rule for: mid, classifier"),
        ("epsilon|low=zplus|low=gamma", "'low' twice"),
        ("epsilon||low=zplus", "empty part"),
        ("", "empty part"),
        ("epsilon|zplus", "is not part=rule"),
        ("gamma(-1)", "from 0 up"),
        ("epsilon(inf)", "finite"),
    ],
)
def test_wrong_text_gets_one_clear_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_composite(text)
    assert "\n" not in str(error.value)


@given(st.integers(0, 60), st.integers(0, 3))
def test_hidden_layers_are_split_in_a_quarter_a_half_and_a_quarter(hidden, classifier):
    parts = split_by_depth([False] * hidden + [True] * classifier)
    assert parts.count("classifier") == classifier
    assert parts[hidden:] == ["classifier"] * classifier
    if hidden:
        assert parts[0] == "first"
        low, high = parts.count("first") + parts.count("low"), parts.count("high")
        assert abs(low - hidden / 4) < 1
        assert high <= low <= hidden
        order = [("first", "low", "mid", "high").index(part) for part in parts[:hidden]]
        assert order == sorted(order)


class Backwards(nn.Module):
    """Registered in the opposite order of execution; the classifier runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(7)])
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        for layer in reversed(self.layers):
            x = layer(x).relu()
        return self.fc(x.mean((2, 3)))


def test_parts_follow_the_order_of_execution_not_of_registration():
    text = "first=flat|low=zplus|mid=gamma|high=epsilon(0.5)|classifier=epsilon"
    with attributed(Backwards(), parse_composite(text), torch.randn(1, 3, 4, 4)) as ruled:
        rows = [(layer.name, layer.part, str(layer.rule)) for layer in ruled.layers]
    assert rows == [
        ("stem", "first", "flat"),
        ("layers.6", "low", "zplus"),
        *((f"layers.{index}", "mid", "gamma(0.25)") for index in (5, 4, 3, 2)),
        *((f"layers.{index}", "high", "epsilon(0.5)") for index in (1, 0)),
        ("fc", "classifier", "epsilon(1e-06)"),
    ]
