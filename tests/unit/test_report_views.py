"""What every view of a report says: of explanations, certificates, classes and changes of accuracy."""

from __future__ import annotations

import dataclasses

import pytest
from reports import CONFIDENT, REPORT, WHOLE, Page, certified, make_report, with_classes, with_top1

from pxcompress.certify.parts import Part
from pxcompress.proof import (
    ClassChange,
    ExplanationSimilarity,
)
from pxcompress.recipe import Recipe
from pxcompress.report import from_json, to_html, to_json, to_table
from pxcompress.report.card import to_card
from pxcompress.report.record import Report
from pxcompress.report.summary import (
    write_headline,
)
from pxcompress.types import Agreement, Agreements

ALIKE = ExplanationSimilarity(32, "epsilon", 0.941, 0.887, 0.83)


def test_every_view_says_how_alike_the_explanations_are() -> None:
    report = make_report(explanations=ALIKE)
    assert from_json(to_json(report)) == report
    assert from_json(to_json(REPORT)).explanations is None
    line = "explanations, dense and pruned: cosine 0.94, rank correlation 0.89, top 10 % in common 83%"
    assert [text for text in to_table(report).splitlines() if text.startswith(line)]
    assert line[1:] in to_card(report)
    page = Page(to_html(report))
    assert "Explanations before and after" in page.text
    assert "32 samples of the select split" in page.text
    for view in (to_table(REPORT), to_card(REPORT), Page(to_html(REPORT)).text):
        assert "xplanations" not in view


def test_every_view_says_how_near_the_outputs_are_on_samples_held_out() -> None:
    report = make_report(agreements=Agreements(Agreement(400, 0.9, 0.12), Agreement(380, 0.97, 0.03)))
    assert from_json(to_json(report)) == report
    line = (
        "agreement with the dense model, before export: 90.0% on 400 held-out samples (95 % interval 86.7% to 92.6%), "
        "97.0% on 380 of those that weights were fitted to"
    )
    assert line in to_table(report).splitlines()
    assert line[1:] in Page(to_html(report)).text
    assert "held-out" not in to_table(REPORT)


@pytest.mark.parametrize(
    ("errors", "title", "class_"),
    [
        ((0, 3, 90), "Certified: With 95 % confidence", "verdict"),
        ((0, 90), "Only the dense model is certified: With", "verdict caution"),
        ((90, 0), "Not certified: the dense model stays.", "verdict caution"),
    ],
)
def test_the_badge_says_what_is_certified(errors: tuple[int, ...], title: str, class_: str) -> None:
    page = Page(to_html(certified(*errors)))
    assert title in page.text
    boxes = [
        attributes["class"] for tag, attributes in page.elements if (attributes.get("class") or "")[:7] == "verdict"
    ]
    assert boxes == [class_, "verdict"]
    for text in (
        "What it does not promise",
        "data that differ",
        "single class",
        "same samples are used again",
        "digest of",
    ):
        assert text in page.text
        assert text not in Page(to_html(REPORT)).text


@pytest.mark.parametrize(
    ("risk", "title"),
    [("negative-flips", "errors"), ("accuracy-drop", "errors added"), ("loss-increase", "loss added")],
)
def test_the_sum_of_losses_is_called_what_it_is(risk: str, title: str) -> None:
    record = certified(0, 3).certificate
    assert record is not None
    report = make_report(certificate=dataclasses.replace(record, risk=risk))
    (head,) = (
        line.split() for line in to_table(report).splitlines() if line.startswith("model ") and "p-value" in line
    )
    assert head == ["model", "size", *title.split(), "p-value", "outcome"]
    assert f"modelsize{title}p-valueoutcome" in Page(to_html(report)).text


@pytest.mark.parametrize(
    ("part", "title", "shown", "limit", "absent"),
    [
        (WHOLE, "Certified", "3 of 400", "Nothing for a single class", ("samples count", "weakest", "is confident")),
        (
            CONFIDENT,
            "Certified where the dense model is confident",
            "400 of 500 samples count: those whose largest softmax probability in the dense model is at least 0.97164",
            "Nothing for predictions of which the dense model is not confident",
            ("weakest",),
        ),
        (
            Part("classes"),
            "Certified in every class",
            "3 of 200 in 'cat'",
            "Nothing for a part of a class",
            ("Nothing for a single class", "single classes", "samples count"),
        ),
    ],
)
def test_table_and_page_say_for_which_part_it_holds(
    part: Part, title: str, shown: str, limit: str, absent: tuple[str, ...]
) -> None:
    report = certified(0, 3, 90, part=part)
    page, text = Page(to_html(report)).text, to_table(report)
    assert f"{title}: With 95 % confidence" in page
    assert f"\n{title}: With 95 % confidence" in text
    assert shown in page
    assert shown in text
    assert limit in page
    for words in absent:
        assert words not in page
        assert words not in text


def test_the_table_shows_the_path_and_what_it_promises() -> None:
    lines = to_table(certified(0, 3, 90, spent="used once before")).splitlines()
    outcomes = {line.split("  ")[0]: line.rsplit("  ", 1)[1] for line in lines if line.startswith("model ")}
    assert outcomes == {"model": "outcome", "model 0": "passed", "model 1": "chosen", "model 2": "not certified"}
    assert any(line.startswith("Certified: With 95 % confidence") for line in lines)
    assert "note: used once before" in lines
    assert lines[-2] == REPORT.verdict


def test_the_class_that_lost_most_comes_first_and_unknown_ones_are_named() -> None:
    report = with_classes(0.25, None, 0.5, 0.3)
    text = Page(to_html(report)).text
    places = [text.index(f"{name}: {share} removed") for name, share in (("kind 2", "50.0%"), ("kind 3", "30.0%"))]
    assert places == sorted(places)
    assert "No sample in the score split: kind 1." in text
    line = (
        "class relevance that the removed units carried: 35.0% on average, 50.0% for 'kind 2', the most of 3 classes, "
        "before repair; 1 without samples in the score split left out"
    )
    assert line[1:] in text
    assert line in to_table(report).splitlines()
    assert to_table(report).splitlines()[-2] == REPORT.verdict


def test_the_page_shows_the_worst_of_many_classes_and_counts_the_others() -> None:
    text = Page(to_html(with_classes(*(n / 100 for n in range(30)), *[None] * 25))).text
    assert text.count("% removed") == 20
    assert "10 more in report.json." in text
    assert "kind 49 and 5 more." in text


def with_changes(*counts: tuple[int, int, int]) -> Report:
    """REPORT with samples, and right ones of both models, of so many classes."""
    return make_report(class_changes=tuple(ClassChange(f"kind {n}", *of, min(of[1:])) for n, of in enumerate(counts)))


def test_every_view_says_what_each_class_lost_the_worst_first() -> None:
    report = with_changes((50, 50, 48), (40, 40, 30), (50, 40, 45), (9, 9, 9))
    assert from_json(to_json(report)) == report
    line = "2 of 4 classes lost answers, 1 gained some; most: 'kind 1', 40 -> 30 of 40 samples right"
    assert line in to_table(report).splitlines()
    assert f"- {line}" in to_card(report).replace("\\", "").replace("&gt;", ">")
    page = Page(to_html(report))
    assert line[1:] in page.text
    heads = [text for tag, text in page.texts if tag == "span" and text.startswith("kind")]
    assert heads == ["kind 1", "kind 0", "kind 3", "kind 2"]
    assert "-25.0-40.2 to -11.1" in page.text
    many = Page(to_html(with_changes(*[(10, 9, 9)] * 30))).text
    assert "10 more in report.json." in many
    assert "0 of 30 classes lost answers, 0 gained some." in many


def test_every_view_claims_a_change_of_accuracy_only_where_its_interval_leaves_0_out() -> None:
    nothing = "no top-1 difference shown"
    for top1, words in (
        (0.96, "6.0 points top-1 gained (95 % interval of the change +2.5 to +9.7)"),
        (0.91, f"{nothing} (+1.0 points, 95 % interval of the change -3.1 to +5.1)"),
        (0.9001, f"{nothing} (0.0 points, 95 % interval of the change -4.2 to +4.2)"),
        (0.88, f"{nothing} (-2.0 points, 95 % interval of the change -6.4 to +2.4)"),
        (0.85, "5.0 points top-1 lost (95 % interval of the change -9.6 to -0.4)"),
    ):
        report = with_top1(top1)
        assert write_headline(report).endswith(words)
        assert words.partition(" (")[0] in to_card(report)
        page = Page(to_html(report)).text
        assert words.partition(" (")[0] in page
        assert ("no difference shown" in page) == (nothing in page) == words.startswith(nothing)


@pytest.mark.parametrize("scorer", ["lrp:target=label", "lrp-residual", "magnitude"])
def test_a_share_of_relevance_says_what_ratio_it_came_to(scorer: str) -> None:
    recipe = Recipe("resnet18", relevance_share=0.05, scorer=scorer)
    report = make_report(recipe=recipe)
    line = "what holds at most 5.0% of every layer's scores to remove: that came to ratio 0.750 of the MACs"
    assert line in to_table(report).splitlines()
    assert line in Page(to_html(report)).text
    assert "came to" not in to_table(REPORT)
