"""Budgets: units in which the cost of a model at any widths is counted. One file a budget, found by itself."""

from pxcompress.registry import Registry
from pxcompress.types import Budget

BUDGETS: Registry[Budget] = Registry("budget", __name__, Budget)
