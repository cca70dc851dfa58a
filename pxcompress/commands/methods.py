"""`pxcompress methods`: everything that has a name."""

from __future__ import annotations


def methods() -> None:
    """List scorers, budgets, repairs, tasks and LRP rules with their options."""
    from pxcompress.attribution import COMPOSITES, RULES, SOFTMAX_RULES
    from pxcompress.budgets import BUDGETS
    from pxcompress.repair import REPAIRS
    from pxcompress.scorers import SCORERS
    from pxcompress.tasks import TASKS

    for registry in (SCORERS, BUDGETS, REPAIRS, TASKS):
        print(f"{registry.kind}s")
        for name in registry:
            print(f"  {name:<22} {(registry.get(name).__doc__ or '').splitlines()[0]}")
            for field in registry.options(name):
                low, high = field.metadata["low"], field.metadata["high"]
                span = "|".join(field.metadata["choices"]) or (f"{low} to {high}" if low is not None else "")
                print(f"      {field.name}={field.default}  {field.metadata['help']}{f'  [{span}]' if span else ''}")
    rules = {str(rule()): (rule.__doc__ or "").splitlines()[0] for rule in RULES.values()}
    for title, table in (("composite", COMPOSITES), ("rule", rules), ("softmax rule", SOFTMAX_RULES)):
        print(f"{title}s")
        for name, text in table.items():
            print(f"  {name:<22} {text}")
    print("your own of any kind: package.module:Class[:option=value,...]; the guides are in pxcompress/*/README.md")
    print(
        "your own rules: --score @composite.json, as `pxcompress search` writes it; those listed are not from a search"
    )
