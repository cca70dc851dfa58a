"""What a width costs: one unit a file, found by itself."""

from pxcompress.registry import Registry
from pxcompress.types import Budget

BUDGETS: Registry[Budget] = Registry("budget", __name__)
