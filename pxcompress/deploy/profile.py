"""The share of time that each type of operator takes, from ONNX Runtime's profile."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import onnxruntime as ort

from pxcompress.deploy.backends.onnxruntime import OrtSession
from pxcompress.deploy.session import Array, Session

RUNS = 20


def operator_shares(session: Session, inputs: Mapping[str, Array]) -> Mapping[str, float]:
    """Type of operator -> its share of the run time, largest first, over some calls with `inputs`, (n, ...) by name.

    Shares use each operator's median, since profiling slows every one down. The result is empty if the profile cannot
    be written or names no operator, on other runtimes, and on a GPU, whose profile has the time to launch an operator,
    not to run it.
    """
    if not isinstance(session, OrtSession) or session.placement.asked not in ("auto", "cpu") or session.device != "cpu":
        return {}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = session.threads
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        model = ort.InferenceSession(session.path, options, providers=list(session.providers))
        for _ in range(RUNS):
            model.run(None, dict(inputs))
        try:
            events = json.loads(Path(model.end_profiling()).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a full disk is no reason to lose the run
            return {}
    calls: dict[tuple[str, str], list[float]] = {}
    for each in events:
        if each.get("cat") == "Node" and each["name"].endswith("_kernel_time"):
            calls.setdefault((each["args"]["op_name"], each["name"]), []).append(each["dur"])
    time_of: dict[str, float] = {}
    for (operator, _), microseconds in calls.items():
        time_of[operator] = time_of.get(operator, 0.0) + median(microseconds)
    total = sum(time_of.values())
    return (
        {name: time_of[name] / total for name in sorted(time_of, key=time_of.__getitem__, reverse=True)}
        if total
        else {}
    )
