"""How a pruned model gets back what it lost: one method a file, found by itself."""

from typing import get_args

from pxcompress.registry import Registry
from pxcompress.types import Phase, Repair

PHASES = get_args(Phase)
"""In their order."""

REPAIRS: Registry[Repair] = Registry("repair", __name__)
