"""Help in panels: first the options that most people need, then the others by what they are about."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

MAIN_PANEL = "Options"
"""Title of the help panel for options that have no other panel."""

EXPERT = "expert"

_BASICS = ("model", "data", "task", "checkpoint", "ratio", "speedup", "latency_ms", "budget")

_PANELS = {
    MAIN_PANEL: (*_BASICS, "batch_size", "provider"),
    "goal": ("max_bytes", "relevance_share", "classes", "only", "keep", "scope", "min_keep", "floors", "round_to"),
    "scoring": ("scorer", "normalise", "class_scores"),
    "repair": ("repair", "rounds", "temperature_scaling"),
    "input": ("input_size", "input_mean", "input_std", "input_scale", "layout"),
    "guarantee": ("max_drop", "confidence", "risk", "steps", "part", "group", "coverage"),
    "export": ("targets", "max_quant_drop", "fixed_batch", "dynamic_size"),
    "measuring": ("against", "threads"),
}
PANEL_OF = {name: panel for panel, names in _PANELS.items() for name in names}
"""Field of a recipe -> the help panel of its option; fields without an entry go to the panel for experts."""


class PanelCommand(TyperCommand):
    """A command whose help lists options by their `rich_help_panel`, in plain text that can be piped and searched."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then one list of options for each panel."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in _PANELS}}
        for parameter in self.get_params(ctx):
            if (line := parameter.get_help_record(ctx)) is not None:
                panel = getattr(parameter, "rich_help_panel", None) or MAIN_PANEL  # --help itself has none
                panels.setdefault("Arguments" if parameter.param_type_name == "argument" else panel, []).append(line)
        for panel, lines in panels.items():
            if lines:
                with formatter.section(panel):
                    formatter.write_dl(lines)
