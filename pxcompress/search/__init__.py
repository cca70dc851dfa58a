"""Search: the attribution, its ranking and its repair chosen for the model that ships. The only door to optuna."""

from pxcompress.search.files import COMPOSITE, read_start
from pxcompress.search.objectives import OBJECTIVES
from pxcompress.search.run import SearchPlan, search
from pxcompress.search.space import SPACES
from pxcompress.search.study import SAMPLERS

__all__ = ["COMPOSITE", "OBJECTIVES", "SAMPLERS", "SPACES", "SearchPlan", "read_start", "search"]
