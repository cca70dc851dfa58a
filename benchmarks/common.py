"""What every benchmark script shares: `--quick`, claims with their targets, the environment, the result file."""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pxcompress.deploy.environment import environment

RESULTS = Path(__file__).parent / "results"

HOLDS = {"lower": float.__le__, "higher": float.__ge__, "equal": float.__eq__}
"""What is better -> whether (value, target) holds."""


def parser(description: str) -> argparse.ArgumentParser:
    """With `--quick`; a script adds its own options."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a small version, written to results/quick/")
    return made


def claim(text: str, value: float, target: float, better: str) -> dict[str, Any]:
    """One target with its measured value; `better` is "lower", "higher" or "equal". A value of NaN never holds."""
    value, target = float(value), float(target)
    return {"claim": text, "value": value, "target": target, "better": better, "holds": HOLDS[better](value, target)}


def write(
    name: str,
    command: str,
    rows: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    claims: Sequence[Mapping[str, Any]],
) -> Path:
    """Write results/<name>.json, or results/quick/<name>.json for a command with `--quick`, and print the claims."""
    folder = RESULTS / "quick" if "--quick" in command.split() else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "name": name,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "environment": asdict(environment()),
        "rows": list(rows),
        "seeds": list(seeds),
        "claims": list(claims),
    }
    for each in claims:
        mark = "holds" if each["holds"] else "FAILS"
        print(f"{mark}  {each['claim']}: {each['value']:.4g} (target {each['target']:.4g}, {each['better']})")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
    print(path)
    return path


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
