"""`pxcompress methods`: everything that has a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pxcompress.choices import NORMALISATIONS


def _summarise(cls: type) -> str:
    """The first paragraph of a class's docstring on one line."""
    return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())


def _format_values(metadata: Mapping[str, Any]) -> str:
    """The values that an option takes, in brackets; "" if any will do."""
    low, high = metadata["low"], metadata["high"]
    values = "|".join(metadata["choices"])
    if not values and low is not None:
        values = f"{low} or more" if high is None else f"{low} to {high}"
    return f"  [{values}]" if values else ""


def methods() -> None:
    """List scorers, budgets, repairs, tasks, normalisations and LRP rules with their options.

    For each option: its name and default, what it means, and the values that it takes.
    """
    from pxcompress.attribution import COMPOSITES, RULES, SOFTMAX_RULES
    from pxcompress.budgets import BUDGETS
    from pxcompress.repair import REPAIRS
    from pxcompress.scorers import SCORERS
    from pxcompress.tasks import TASKS

    for registry in (SCORERS, BUDGETS, REPAIRS, TASKS):
        print(f"{registry.kind}s")
        for name in registry:
            print(f"  {name:<22} {_summarise(registry.get(name))}")
            for field in registry.options(name):
                values = _format_values(field.metadata)
                print(f"      {field.name}={field.default}  {field.metadata['help']}{values}")
    tables: dict[str, Mapping[Any, str]] = {
        "normalisations": NORMALISATIONS,
        "composites: rules for the first quarter of the layers (low), the middle, the last, the classifier": COMPOSITES,
        "LRP rules": {str(rule()): _summarise(rule) for rule in RULES.values()},
        "LRP rules for softmax": SOFTMAX_RULES,
    }
    for title, table in tables.items():
        print(title)
        for name, text in table.items():
            print(f"  {name:<22} {text}")
    print("your own of any kind: package.module:Class[:option=value,...]; guides are in pxcompress/*/README.md")
    print("a composite of your own: --score @FOLDER/composite.json, which `pxcompress search` writes")
