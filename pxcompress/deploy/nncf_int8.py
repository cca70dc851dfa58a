"""int8 files for OpenVINO, by NNCF's post-training quantisation, from the package nncf."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from pxcompress.deploy.int8 import MOST_JUDGE_SAMPLES, Judge, QuantisedFile, Rating, outputs_of, rate_file, take_evenly
from pxcompress.deploy.qdq import read_feeds
from pxcompress.errors import ModelError, StageError, describe
from pxcompress.guard import name_failures
from pxcompress.types import Batches

SAMPLES = 300
"""Number of samples that NNCF calibrates on (its own default); they are fed one by one."""


def quantise_by_nncf(source: Path, path: Path, batches: Batches, judge: Judge) -> QuantisedFile:
    """Quantise `source` to a QDQ file at `path`; if that loses too much for `judge`, by NNCF's accuracy control.

    Raises `ModelError` where the package is missing, or does not take the model.
    """
    try:
        with name_failures("NNCF"):
            return _quantise(source, path, batches, judge)
    except StageError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise ModelError("int8 for OpenVINO needs the package nncf (pip install nncf)") from error
        raise ModelError(f"NNCF does not quantise {source.name}: {describe(error.__cause__ or error)}") from error


def _quantise(source: Path, path: Path, batches: Batches, judge: Judge) -> QuantisedFile:
    import nncf

    nncf.set_log_level("ERROR")
    model = onnx.load(source)
    calibration = nncf.Dataset(list(read_feeds(source, take_evenly(batches, SAMPLES))))
    onnx.save(nncf.quantize(model, calibration, subset_size=SAMPLES), path)
    check = take_evenly(judge.check, MOST_JUDGE_SAMPLES)
    if not check:
        return QuantisedFile(path, Rating(0.0, 0.0), "NNCF", _count(path))
    reference = outputs_of(source, check)
    made = QuantisedFile(path, rate_file(path, check, reference, judge), "NNCF", _count(path))
    if made.rating.drop <= judge.max_drop:
        return made

    def validate(quantised: Any, _: object) -> tuple[float, None]:
        """The metric's loss as a quality, so that more is better; NNCF hands over a model or its session's."""
        file = path.with_name("validated.onnx")
        onnx.save(getattr(quantised, "model", quantised), file)
        return 1.0 - rate_file(file, check, reference, judge).drop, None

    controlled = nncf.quantize_with_accuracy_control(
        onnx.load(source), calibration, nncf.Dataset([0]), validate, max_drop=judge.max_drop, subset_size=SAMPLES
    )
    onnx.save(controlled, path)
    return QuantisedFile(path, rate_file(path, check, reference, judge), "NNCF with accuracy control", _count(path))


def _count(path: Path) -> int:
    """Number of nodes that turn quantised values back into floats."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)["DequantizeLinear"]
