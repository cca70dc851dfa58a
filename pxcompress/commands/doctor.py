"""`pxcompress doctor`: what works here, and what to install for the rest."""

from __future__ import annotations

import dataclasses
import json

from pxcompress.commands.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Try providers, CUDA, disk, cache, model hub and several processes; say what to do about what does not work."""
    from pxcompress.deploy.doctor import examine, to_table

    findings = examine()
    print(json.dumps([dataclasses.asdict(each) for each in findings], indent=1) if as_json else to_table(findings))
