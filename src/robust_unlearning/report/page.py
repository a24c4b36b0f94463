"""A report as one self-contained HTML page: no network, no script needed, readable on a phone and on paper.

    page = Page("Study", "What was run.", [Section("main", "Main table", [Table(...), Figure.saved(...)])])
    write_page(page, out / "report.html")

Figures are inlined as SVG. Their PNGs and all CSVs are in the page as data: links rather than files beside it, so that
a page that is mailed or moved still has them; a PNG of a figure is some 50 kB. The only script opens the folds before
printing, for browsers whose style sheets cannot. The HTML is that of the templates in `assets/report`, which escape
whatever text comes in; here is what they need prepared.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from robust_unlearning import files
from robust_unlearning.data.questions import LETTERS
from robust_unlearning.errors import UserError
from robust_unlearning.report.flips import FORMS, KINDS, SHOWN, Flips
from robust_unlearning.report.svg import inline_svg
from robust_unlearning.report.tables import Table, Verdict

TOP = "top"
NUMBER = re.compile(r"[+\-−±<>≤≥]?\s?\d")
INTERVAL = re.compile(r"\[[^\[\]]*\]")
SIGNS = {"holds": "✓", "does not hold": "✗", "mixed": "±", "inconclusive": "?", "not run": "–"}
MEDIA = {".csv": "text/csv;charset=utf-8", ".png": "image/png"}


@dataclass(frozen=True)
class Figure:
    """A figure that `figures.save_figure` wrote: it is shown as SVG, its PNG and its numbers are a click away."""

    title: str
    caption: str
    svg: Path
    png: Path
    csv: Path

    @classmethod
    def saved(cls, title: str, caption: str, png: Path) -> Figure:
        """The figure whose PNG lies at `png`, with the files beside it."""
        return cls(title, caption, png.with_suffix(".svg"), png, png.with_suffix(".csv"))


@dataclass(frozen=True)
class Details:
    """Blocks behind a summary that opens them; on paper they are open."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A part of the page, with a place in its table of contents.

    Attributes:
        id: the fragment of its address, unique in the page: letters, digits, `-`.
        title: its heading.
        blocks: paragraphs (plain text; `backticks` set code), tables, figures, folds, views of questions.
        paper: what of the paper it reproduces, such as 'Table 1, Figure 4'.
    """

    id: str
    title: str
    blocks: Sequence[Block]
    paper: str = ""


Block = str | Table | Figure | Details | Flips


@dataclass(frozen=True)
class Page:
    """A report: its title, what it says in a few sentences, and its sections."""

    title: str
    lead: str
    sections: Sequence[Section]


def write_page(page: Page, path: Path) -> None:
    """Write the page into the file `path`, whole or not at all; the same page gives the same bytes.

    Raises:
        UserError: a figure's file is missing or broken, or two sections have one id or an id is not made of letters,
            digits and `-`.
    """
    files.write_text(path, as_html(page))


def as_html(page: Page) -> str:
    """The whole page as text; raises what `write_page` does."""
    taken: set[str] = set()
    for wanted in (TOP, *(section.id for section in page.sections)):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", wanted) or wanted in taken:
            raise UserError(
                f"section id {wanted!r}: it must begin with a letter, hold letters, digits and '-', be no other "
                f"section's, and not be {TOP!r}."
            )
        taken.add(wanted)
    environment = Environment(
        loader=FileSystemLoader(files.package_dir() / "assets" / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (prose, one_line, cell, slug, grid, percent, sentence)
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals |= {"TOP": TOP, "SIGNS": SIGNS, "KINDS": KINDS, "SHOWN": SHOWN, "FORMS": FORMS}
    environment.globals |= {"LETTERS": LETTERS}
    parts = [[_part(block, section.id, taken) for block in section.blocks] for section in page.sections]
    return environment.get_template("page.html.j2").render(page=page, parts=parts)


def _part(block: Block, section: str, taken: set[str]) -> dict[str, Any]:
    """A block as the templates want it; its ids, like the names of its files, begin with the section's."""
    if isinstance(block, str):
        return {"kind": "paragraph", "text": block}
    if isinstance(block, Details):
        inner = [_part(each, section, taken) for each in block.blocks]
        return {"kind": "fold", "summary": block.summary, "parts": inner}
    if isinstance(block, Table):
        name = f"{section}-{slug(block.title)}.csv"
        about = {"id": _new_id(f"{section}-table", taken), "links": [_link(name, block.csv().encode(), "CSV")]}
        return {"kind": "table", "table": block, "notes": block.notes, **about}
    if isinstance(block, Figure):
        return {"kind": "figure", "figure": block, **_drawn(block, _new_id(f"{section}-figure", taken))}
    numbers = block.numbers().csv().encode()
    links = [_link(f"{section}-questions.csv", numbers, "every question, CSV")]
    return {"kind": "questions", "view": block, "id": _new_id(f"{section}-questions", taken), "links": links}


def _drawn(figure: Figure, name: str) -> dict[str, Any]:
    """A figure's drawing, the links to its files, and its numbers as a table."""
    png, numbers = _read(figure.png), _read(figure.csv)
    headers, *rows = csv.reader(io.StringIO(numbers.decode("utf-8")))
    columns = {str(index): header for index, header in enumerate(headers)}
    cells = [dict(zip(columns, map(_short, row), strict=False)) for row in rows]
    return {
        "id": name,
        "svg": Markup(inline_svg(figure.svg, name, f"{figure.title}. {figure.caption}")),
        "links": [_link(figure.csv.name, numbers, "CSV"), _link(figure.png.name, png, "PNG")],
        "table": Table(figure.title, columns, cells),
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the figure's file {str(path)!r} cannot be read: {error}. Draw it again.") from error


def _new_id(wanted: str, taken: set[str]) -> str:
    """The wanted id, with a number behind it where it is taken."""
    names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
    name = next(each for each in names if each not in taken)
    taken.add(name)
    return name


def _link(name: str, content: bytes, text: str) -> Mapping[str, str]:
    """A link that saves `content` as the file `name`; it holds the bytes itself."""
    data = base64.b64encode(content).decode("ascii")
    return {"name": name, "text": text, "href": f"data:{MEDIA[Path(name).suffix]};base64,{data}"}


def _short(value: str) -> str:
    """A number of a CSV with four digits that count; anything else as it is."""
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d+(\.\d+(e-?\d+)?|e-?\d+)", value) else value


# --- filters of the templates ---------------------------------------------------------------------------------------


def prose(text: str) -> Markup:
    """Text with what stands in `backticks` set as code: for what the report's author wrote."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def one_line(text: str) -> str:
    """Text for an attribute, on one line."""
    return " ".join(text.split())


def cell(text: str) -> Markup:
    """A cell's text. An interval in brackets is not broken over two lines; a path may be, after a slash."""
    unbroken = INTERVAL.sub(lambda match: match[0].replace(" ", "\u00a0"), text)
    return Markup(re.sub("(?<!<)/", "/<wbr>", str(prose(unbroken))))  # every < that is left is a tag's


def slug(text: str) -> str:
    """A name for a file, an id or a class: the first words in small letters with `-` between."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return "-".join(words[:8]) or "part"


def grid(table: Table) -> dict[str, Any]:
    """Headers and cells (text or `Verdict`), each with whether its column holds numbers: those go to the right.

    A column does if its cells that are not empty begin with a number, and there are some.
    """
    rows = [
        [value if isinstance(value := row.get(field), Verdict) else text
         for field, text in zip(table.columns, cells, strict=True)]
        for row, cells in zip(table.rows, table.cells(), strict=True)
    ]  # fmt: skip
    numeric = []
    for index in range(len(table.columns)):
        filled = [text for row in rows if (text := str(row[index]).strip())]
        numeric.append(bool(filled) and all(NUMBER.match(text) for text in filled))
    return {
        "headers": list(zip(table.headers, numeric, strict=True)),
        "rows": [list(zip(row, numeric, strict=True)) for row in rows],
    }


def percent(share: float) -> str:
    """A share in whole percent, the ends told from 0 and 1."""
    return "< 1 %" if 0 < share < 0.01 else "> 99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def sentence(words: str) -> str:
    """The words with a capital letter in front."""
    return words[0].upper() + words[1:]
