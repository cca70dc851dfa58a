"""Scorers: measures of how much a model's decisions rest on each unit. One file a method; they register themselves."""

from pxcompress.registry import Registry
from pxcompress.types import Scorer

SCORERS: Registry[Scorer] = Registry("scorer", __name__, Scorer)
