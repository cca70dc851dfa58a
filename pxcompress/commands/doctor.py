"""`pxcompress doctor`: what works here, and what to install for the rest.

Tries providers, CUDA, disk, cache, model hub and several processes.
"""

from __future__ import annotations

import dataclasses
import json

from pxcompress.commands.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Check what works on this machine, and what to do about the rest.

    Tries providers, CUDA, disk, cache, model hub and several processes.
    """
    from pxcompress.deploy.doctor import examine, to_table

    findings = examine()
    print(json.dumps([dataclasses.asdict(each) for each in findings], indent=1) if as_json else to_table(findings))
