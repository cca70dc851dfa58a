"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], sides: str = "") -> list[str]:
    """Rows of cells as lines of text in columns: each as wide as its widest cell, with two blanks between columns.

    `sides` has "<" (left) or ">" (right) for every column; by default the first and the last are aligned left, the
    others right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides or f"<{'>' * (len(widths) - 2)}<"
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
