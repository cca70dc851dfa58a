"""Parts of reports about a certificate: its badge, its path of models, and which samples it counts."""

from __future__ import annotations

from dataclasses import dataclass

from pxcompress.certify.record import CertificateRecord
from pxcompress.report.summary import format_bytes, format_count


@dataclass(frozen=True)
class Badge:
    """A label of a few words for a certificate's result, and whether a smaller model is certified."""

    title: str
    passed: bool
    text: str


_WHERE = {"all": "", "confident": " where the dense model is confident", "classes": " in every class"}


def make_badge(record: CertificateRecord) -> Badge:
    """The badge for a certificate."""
    titles = {None: "Not certified", 0: "Only the dense model is certified"}
    where = " in every group" if record.group else _WHERE[record.part]
    title = titles.get(record.chosen, f"Certified{where}")
    return Badge(title, bool(record.chosen), record.sentence.removeprefix(f"{title}; "))


def _title_sum(record: CertificateRecord) -> str:
    """The title for sums of losses: what one loss of the certificate's risk is."""
    titles = {"accuracy-drop": "errors added", "mean-loss": "loss", "loss-increase": "loss added"}
    return titles.get(record.risk, "errors")


def list_path_rows(record: CertificateRecord) -> list[tuple[str, str, str, str, str]]:
    """Table rows, title first, for the models of a certificate's path: name, size, sum of losses, p-value, outcome.

    Where every class counts by itself, the sum is that of the weakest one.
    """
    rows = [("model", "size", _title_sum(record), "p-value", "outcome")]
    for place, (row, is_certified) in enumerate(zip(record.rows, record.certified, strict=True)):
        outcome = "chosen" if place == record.chosen else "passed" if is_certified else "not certified"
        cost = format_bytes(row.size) if record.size_unit == "bytes" else f"{format_count(row.size)} {record.size_unit}"
        cost = cost if record.size_unit else "unknown"
        part = row.weakest
        sum_text = f"{part.errors:g} of {part.n}" + (f" in {part.name!r}" if row.classes else "")
        rows.append((row.name, cost, sum_text, f"{row.p_value:.3g}", outcome))
    return rows


def describe_part(record: CertificateRecord) -> str:
    """One sentence on which samples a certificate counts; "" if it counts all."""
    noun, title = "groups" if record.group else "classes", _title_sum(record)
    sentences = {
        "all": "",
        "confident": f"{record.n} of {record.reserved} samples count: those whose largest softmax probability "
        f"in the dense model is at least {record.threshold or 0:.10g}. The select split chose it, for a coverage "
        f"of {record.coverage}.",
        "classes": f"{title} and p are those of the weakest of {len(record.rows[0].classes)} {noun} (by "
        f"{record.group or 'true label'}): all have to pass.",
    }
    return sentences[record.part]


def describe_labels(record: CertificateRecord) -> str:
    """One sentence on how many labels a certificate on unlabelled images needed; "" if all were labelled."""
    if record.labels is None:
        return ""
    asked_labels, answered_labels = record.labels.asked, record.labels.answered
    fate = "the test ends before the first of them" if record.anytime else "they count as errors"
    missing = (
        f"; {asked_labels - answered_labels} of {asked_labels} that need one have none: {fate}"
        if answered_labels < asked_labels
        else ""
    )
    return (
        f"{answered_labels} labels for {record.reserved} images: where the models agree, the loss is 0 anyway{missing}."
    )
