"""A report as one self-contained HTML page: no network, no script needed, readable on a phone and on paper.

    page = Page("Study", "What was run.", [Section("main", "Main table", [Table(...), Figure.saved(...)])])
    write_page(page, out / "report.html")

Figures are inlined as SVG. Their PNGs and all CSVs are in the page as data: links rather than files beside it, so that
a page that is mailed or moved still has them; a PNG of a figure is some 50 kB. The only script opens the folds before
printing, for browsers whose style sheets cannot.
"""

from __future__ import annotations

import re
from pathlib import Path

from robust_unlearning import files
from robust_unlearning.errors import UserError
from robust_unlearning.report import render
from robust_unlearning.report.blocks import Block as Block
from robust_unlearning.report.blocks import Details as Details
from robust_unlearning.report.blocks import Figure as Figure
from robust_unlearning.report.blocks import Page as Page
from robust_unlearning.report.blocks import Section as Section
from robust_unlearning.report.blocks import Table as Table
from robust_unlearning.report.blocks import Verdict as Verdict
from robust_unlearning.report.flips import Flips as Flips
from robust_unlearning.report.markup import Names, attribute, plain, text

TOP = "top"


def write_page(page: Page, path: Path) -> None:
    """Write the page into the file `path`, whole or not at all; the same page gives the same bytes.

    Raises:
        UserError: a figure's file is missing or broken, two sections have one id or an id is not made of letters,
            digits and `-`, or a table's row has another number of cells than its headers.
    """
    files.write_text(path, as_html(page))


def as_html(page: Page) -> str:
    """The whole page as text; raises what `write_page` does."""
    names = Names()
    for wanted in (TOP, *(each.id for each in page.sections)):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", wanted) or names.new(wanted) != wanted:
            raise UserError(
                f"section id {wanted!r}: it must begin with a letter, hold letters, digits and '-', be no other "
                f"section's, and not be {TOP!r}."
            )
    here = files.package_dir() / "report"
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    contents = "".join(f'<li><a href="#{attribute(each.id)}">{text(each.title)}</a></li>' for each in page.sections)
    sections = "\n".join(render.section(each, names) for each in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{plain(page.title)}</title>
<style>
{style}</style>
</head>
<body>
<header class="top" id="{TOP}">
<h1>{text(page.title)}</h1>
<p class="lead">{text(page.lead)}</p>
</header>
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>
{sections}
</main>
<script>
{script}</script>
</body>
</html>
"""
