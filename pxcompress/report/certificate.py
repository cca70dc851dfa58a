"""How report.html shows a certificate: a badge, the path that was tested, and what is not promised."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.report.markup import node, pairs, section, table
from pxcompress.report.record import Report
from pxcompress.report.summary import badge, describe_part, path_rows

_TESTED = (
    "the exported files, through ONNX Runtime on the CPU, on samples that no other stage has seen. "
    "`pxcompress verify` recomputes it."
)
_NO_PART = {
    "all": "Nothing for a single class or another part of the data: it holds for the mean over all of them.",
    "confident": "Nothing for predictions of which the dense model is not confident, and nothing for a single class of "
    "the others: it holds for the mean over all of them.",
    "classes": "Nothing for a part of a class, and nothing for a class as a model predicts it: the true label counts.",
}
"""What the certificate leaves open about parts of the data, by the part that it is about."""


def badge_box(report: Report) -> Sequence[Element]:
    """What is certified, in one box; nothing where no guarantee was asked for."""
    if report.certificate is None:
        return ()
    said = badge(report.certificate)
    words = node("p", node("strong", f"{said.title}: "), said.text)
    return (node("div", words, class_="verdict" if said.passed else "verdict caution"),)


def _limits(part: str) -> Sequence[str]:
    """What it does not promise, one sentence each."""
    return (
        "Nothing for data that differ from these: other cameras, other places, later times.",
        _NO_PART[part],
        "Nothing for one prediction, and nothing about why it changes.",
        "Nothing where the same samples are used again, for certificates or for choosing anything.",
    )


def certificate_section(report: Report) -> Sequence[Element]:
    """The path that was tested, and what the certificate does not promise."""
    if report.certificate is None:
        return ()
    record = report.certificate
    return (
        section(
            "Certificate",
            node("p", f"Learn then Test: the path was frozen, then tested from the dense model on {_TESTED}"),
            *(node("p", text[0].upper() + text[1:]) for text in (describe_part(record),) if text),
            table(
                f"{record.risk} at most {record.alpha} with confidence {1 - record.delta:g}; a model "
                f"passes where p is at most {record.delta} for it and for all before it",
                ("model", "size", "errors", "p-value", "outcome"),
                path_rows(record),
            ),
            node("h3", "What it does not promise"),
            node("ul", *(node("li", text) for text in _limits(record.part))),
            pairs("Hashes (sha256)", record.hashes),
        ),
    )
