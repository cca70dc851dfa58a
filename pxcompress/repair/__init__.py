"""How a pruned model gets back what it lost: one method a file, found by itself."""

from pxcompress.registry import Registry
from pxcompress.types import Repair

REPAIRS: Registry[Repair] = Registry("repair", __name__)
