"""Views of a finished run: JSON for scripts, a table for the terminal, one HTML page for people. All pure functions."""

from pxcompress.report.build import from_json, to_json
from pxcompress.report.html import to_html
from pxcompress.report.table import to_table

__all__ = ["from_json", "to_html", "to_json", "to_table"]
