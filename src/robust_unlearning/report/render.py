"""Blocks of a page as HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from robust_unlearning.errors import UserError
from robust_unlearning.report.blocks import Block, Details, Figure, Section, Table
from robust_unlearning.report.cards import flips_view
from robust_unlearning.report.flips import Flips
from robust_unlearning.report.markup import Names, attribute, download, slug, table, text
from robust_unlearning.report.svg import inline_svg
from robust_unlearning.report.tables import csv_table


def section(each: Section, names: Names) -> str:
    """A section with its heading, which links to itself."""
    paper = f'<p class="paper">In the paper: {text(each.paper)}</p>' if each.paper else ""
    heading = f'<h2><a href="#{attribute(each.id)}">{text(each.title)}</a></h2>'
    return f'<section id="{attribute(each.id)}">{heading}{paper}{blocks(each.blocks, names, each.id)}</section>'


def blocks(found: Sequence[Block], names: Names, within: str) -> str:
    """Blocks one after the other; ids begin with `within`, the section's."""
    return "\n".join(_block(each, names, within) for each in found)


def _block(block: Block, names: Names, within: str) -> str:
    if isinstance(block, str):
        return f"<p>{text(block)}</p>"
    if isinstance(block, Table):
        return _table(block, names, within)
    if isinstance(block, Figure):
        return _figure(block, names, within)
    if isinstance(block, Details):
        inner = blocks(block.blocks, names, within)
        return f'<details class="fold"><summary>{text(block.summary)}</summary>\n{inner}\n</details>'
    assert isinstance(block, Flips)
    return flips_view(block, names, within)


def _table(block: Table, names: Names, within: str) -> str:
    for number, row in enumerate(block.rows, start=1):
        if len(row) != len(block.headers):
            raise UserError(
                f"table {block.caption!r}: row {number} has {len(row)} cells for {len(block.headers)} headers."
            )
    name = names.new(f"{within}-table")
    numbers = csv_table(block.headers, [[str(each) for each in row] for row in block.rows]).encode()
    link = download(f"{within}-{slug(block.caption)}.csv", numbers, "CSV")
    notes = f'<p class="notes">{text(block.notes)}</p>' if block.notes else ""
    shown = table(block.headers, block.rows, block.caption)
    caption = f'<figcaption><strong>{text(block.caption)}</strong> <span class="files">{link}</span></figcaption>'
    return f'<figure class="table" id="{name}">{caption}{shown}{notes}</figure>'


def _figure(block: Figure, names: Names, within: str) -> str:
    name = names.new(f"{within}-figure")
    png, numbers = _read(block.png), _read(block.csv)
    headers, *rows = csv.reader(io.StringIO(numbers.decode("utf-8")))
    shown = [[_short(each) for each in row] for row in rows]
    summary = f"Its numbers ({len(rows)} rows, four digits; all of them in the CSV)"
    links = f"{download(block.csv.name, numbers, 'CSV')} {download(block.png.name, png, 'PNG')}"
    drawn = inline_svg(block.svg, name, f"{block.title}. {block.caption}")
    return f"""<figure class="drawn" id="{name}">
<div class="scroll" role="group" tabindex="0" aria-label="{attribute(block.title)}">{drawn}</div>
<figcaption><strong>{text(block.title)}</strong> {text(block.caption)} <span class="files">{links}</span></figcaption>
<details class="numbers"><summary>{summary}</summary>{table(headers, shown, block.title)}</details>
</figure>"""


def _short(value: str) -> str:
    """A number of a CSV with four digits that count; anything else as it is."""
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d+(\.\d+(e-?\d+)?|e-?\d+)", value) else value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the figure's file {str(path)!r} cannot be read: {error}. Draw it again.") from error
