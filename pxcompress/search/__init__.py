"""Search: the attribution, its ranking and its repair chosen for the model that ships. The only door to optuna."""

from pxcompress.search.run import search
from pxcompress.search.study import SearchPlan

__all__ = ["SearchPlan", "search"]
