"""`pxcompress report`: show finished runs again: a table, a comparison, a model card, or pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.terminal import notes, show
from pxcompress.errors import InputError


def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Write one page that compares the runs.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Print a Markdown model card of one run instead.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the page of --out if it exists.")] = False,
    figures: Annotated[Path | None, typer.Option(help="Folder to write the figures to, as SVG and PNG.")] = None,
) -> None:
    """Print the table of a run, or a comparison of several runs."""
    from pxcompress.cache import whole_file
    from pxcompress.report.build import check_files, read_report
    from pxcompress.report.card import to_card
    from pxcompress.report.compare import to_comparison, to_comparison_table
    from pxcompress.report.figures import write_figures
    from pxcompress.report.table import to_table
    from pxcompress.run_folder.place import check_folder, name_unwritable

    if card and len(folders) > 1:
        raise InputError(
            f"--card is of one run, and printed (redirect it into a file); {len(folders)} folders are given"
        )
    if out is not None and out.exists() and not force:
        raise InputError(f"{str(out)!r} exists; choose another --out or give --force")
    for place in filter(None, (out and out.parent, figures)):
        check_folder(place)
    names = _name_folders(folders)
    reports = {name: read_report(folder) for name, folder in zip(names, folders, strict=True)}
    for folder, run_report in zip(folders, reports.values(), strict=True):
        check_files(folder, run_report.sha256)
    first_report, note = next(iter(reports.values())), notes(quiet=False)
    if out is not None:
        with name_unwritable(out), whole_file(out) as beside:
            beside.write_text(to_comparison(reports), encoding="utf-8")
        note(f"page: {out}")
    if figures is not None:
        with name_unwritable(figures):
            note(f"figures: {len(write_figures(reports, figures))} files in {figures}")
    if card:
        print(to_card(first_report), end="")
    else:
        show(to_table(first_report) if len(reports) == 1 else to_comparison_table(reports))


def _name_folders(folders: list[Path]) -> list[str]:
    """Short names for run folders: their last part, or the whole path where two have the same. Raises `InputError`."""
    names = [folder.resolve().name for folder in folders]
    paths = [str(folder) for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path!r} is given {paths.count(path)} times; give it once")
    return names if len(set(names)) == len(names) else paths
