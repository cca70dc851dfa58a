"""Searches the LRP rules, scores and rankings that suit a model best; the only code that uses optuna."""

from pxcompress.search.run import search
from pxcompress.search.study import SearchPlan

__all__ = ["SearchPlan", "search"]
