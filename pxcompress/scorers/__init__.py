"""How much a model's decisions rest on each unit: one method a file, found by itself."""

from pxcompress.registry import Registry
from pxcompress.types import Scorer

SCORERS: Registry[Scorer] = Registry("scorer", __name__)
