"""Repairs: methods by which a pruned model regains quality. One file a method; files are found by themselves."""

from typing import get_args

from pxcompress.registry import Registry
from pxcompress.types import Phase, Repair

PHASES = get_args(Phase)
"""The phases of repair, in the order in which they run."""

REPAIRS: Registry[Repair] = Registry("repair", __name__, Repair)
