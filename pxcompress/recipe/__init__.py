"""Recipes: all options of a run as one record, made of several parts.

A recipe is all of its parts side by side: each of their fields is one keyword in Python, one option of the command line
and one key of --config and recipe.json. `Bench` and `Guarantee` are records within it. What works for a part takes that
part, such as `Goal`, and is handed the recipe as one: it cannot read what it has no business with.
"""

from pxcompress.recipe.bench import Bench
from pxcompress.recipe.export import Export
from pxcompress.recipe.goal import GOALS, Goal
from pxcompress.recipe.guarantee import Guarantee
from pxcompress.recipe.model_and_data import ModelAndData
from pxcompress.recipe.recipe import Pruning, Recipe
from pxcompress.recipe.repairing import Repairing
from pxcompress.recipe.scoring import Scoring

__all__ = [
    "GOALS",
    "Bench",
    "Export",
    "Goal",
    "Guarantee",
    "Pruning",
    "ModelAndData",
    "Recipe",
    "Repairing",
    "Scoring",
]
