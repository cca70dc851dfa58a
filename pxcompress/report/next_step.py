"""Advice after a run, in one line: the most urgent next step."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

from pxcompress.report.record import Report
from pxcompress.report.summary import (
    format_command,
    is_dense_at_chance,
    is_faster,
    loss_is_shown,
    loss_share,
    takes_images,
)

LARGE_LOSS = 0.01
"""A loss that calls for more repair: a share of the samples, or of a number's value."""


def next_step(report: Report) -> str:
    """Advice on the next command, by the first rule that applies; "" if a goal was missed, as the error says it."""
    return "" if report.missed else next(say(report) for holds, say in _RULES if holds(report))


def _is_lossy(report: Report) -> bool:
    """Whether the loss of quality is shown to be real and larger than `LARGE_LOSS`."""
    return loss_is_shown(report) and loss_share(report, report.change.value) > LARGE_LOSS


def _advise_repair(report: Report) -> str:
    repairs = report.recipe.repair
    if not repairs:
        return "to win accuracy back: leave out --repair none; or a smaller --ratio"
    if any(each.startswith("finetune") for each in repairs):
        longer = "--repair closed-form --repair finetune:steps=3000"
        return f"to lose less: a smaller --ratio, more {_name_samples(report)}, or more steps, {longer}"
    words = " ".join(f"--repair {shlex.quote(each)}" for each in (*repairs, "finetune"))
    return f"to win accuracy back: {words}; or a smaller --ratio"


def _advise_speed(report: Report) -> str:
    advice = f"a larger --batch-size (here {report.pruned.batch_size}) or --ratio"
    if report.recipe.budget.partition(":")[0] == "latency":
        return f"to be faster: {advice}"
    return f"to be faster: --speedup 2x, which plans by milliseconds measured here; or {advice}"


def _name_samples(report: Report) -> str:
    return "images" if takes_images(report) else "samples"


def _advise_own_data(report: Report) -> str:
    if not takes_images(report):
        return "the same for your own net and its inputs: pxcompress.compress_module in Python, see README"
    return f"the same on your own images: {format_command(report.recipe.but(data='path/to/images'))}"


def _advise_shipping(report: Report) -> Iterator[str]:
    """Advice on which file to ship: the fastest by its whole interval with little loss against model.onnx.

    If there is a certificate it is model.onnx, which alone is certified.
    """
    file_name = "model.onnx"
    if report.certificate is None:
        least_speedup = report.speedup.high
        for of in report.targets[2:]:
            quality_loss = loss_share(report, of.quality.value - report.pruned.quality.value)
            if of.speedup.low > least_speedup and quality_loss <= LARGE_LOSS:
                file_name, least_speedup = of.file, of.speedup.high
    runs = "; predict.py beside it runs it without pxcompress" if takes_images(report) else ""
    yield f"ship {shlex.quote(f'{report.folder}/{file_name}')}{runs}."
    worst = max(loss_share(report, end) for end in (report.change.low, report.change.high))
    if worst <= 2 * LARGE_LOSS and report.certificate is None:
        yield "A larger --ratio may cost nothing either"


_RULES: tuple[tuple[Callable[[Report], bool], Callable[[Report], str]], ...] = (
    (
        lambda report: report.certificate is not None and not report.certificate.chosen,
        lambda report: f"a smaller --ratio, more {_name_samples(report)}, or a larger --max-drop",
    ),
    (
        is_dense_at_chance,
        lambda report: (
            "give weights that know these classes (--checkpoint)"
            + (", or the image size that they know (--input-size)" if report.data.images else "")
        ),
    ),
    (_is_lossy, _advise_repair),
    (
        lambda report: any(note.code == "busy" for note in report.notes),
        lambda report: f"time it on a quiet machine: pxcompress bench {shlex.quote(report.folder)}",
    ),
    (lambda report: not is_faster(report), _advise_speed),
    (lambda report: report.weights == "trained-here", _advise_own_data),
    (lambda report: True, lambda report: " ".join(_advise_shipping(report))),
)
"""Pairs of a condition on a report and the advice for it, the most urgent first."""
