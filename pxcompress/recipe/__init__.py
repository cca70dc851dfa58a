"""Recipes: all options of a run as one record, made of several parts.

A recipe has the fields of all its parts: each field is one keyword in Python, one option of the command line and one
key of --config and recipe.json. `Bench` and `Guarantee` are records within it. A function that needs only some of the
options takes the part with these, such as `Goal`; a recipe can be given for it, being a subclass of all its parts.
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
