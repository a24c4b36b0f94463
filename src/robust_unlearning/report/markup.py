"""Small pieces of HTML: escaped text, links that hold a file, tables. Whatever text comes in is escaped here."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robust_unlearning.report.blocks import Verdict

NUMBER = re.compile(r"[+\-−±<>≤≥]?\s?\d")
INTERVAL = re.compile(r"\[[^\[\]]*\]")
SIGNS = {"holds": "✓", "does not hold": "✗", "cannot be told": "?", "not run": "–"}
MEDIA = {".csv": "text/csv;charset=utf-8", ".png": "image/png"}


class Names:
    """Ids of a page, each given once."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def new(self, wanted: str) -> str:
        """The wanted id, with a number behind it where it is taken."""
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}-{number}"
        self.taken.add(name)
        return name


def plain(value: str) -> str:
    """Text as HTML, escaped, nothing else: for what others wrote, such as questions."""
    return html.escape(value)


def text(value: str) -> str:
    """Text as HTML, escaped; what stands in `backticks` is set as code: for what the report's author wrote."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", plain(value))


def attribute(value: str) -> str:
    """Text for an attribute in double quotes, on one line."""
    return html.escape(" ".join(value.split()))


def download(name: str, content: bytes, shown: str) -> str:
    """A link that saves `content` as the file `name`; it holds the bytes itself."""
    media = MEDIA["." + name.rsplit(".", 1)[-1]]
    data = base64.b64encode(content).decode("ascii")
    return f'<a download="{attribute(name)}" href="data:{media};base64,{data}">{text(shown)}</a>'


def slug(value: str) -> str:
    """A name for a file or an id: the first words in small letters with `-` between."""
    words = re.findall(r"[a-z0-9]+", value.lower())
    return "-".join(words[:8]) or "part"


def cell(value: str | Verdict) -> str:
    """A cell's content; a verdict becomes a label whose sign and words say it, whatever its colour.

    An interval in brackets is not broken over two lines; a path may be, after a slash.
    """
    if isinstance(value, str):
        kept = INTERVAL.sub(lambda match: match[0].replace(" ", "\u00a0"), value)
        return re.sub("(?<!<)/", "/<wbr>", text(kept))  # every < that is left is a tag's
    note = f' <span class="note">{text(value.note)}</span>' if value.note else ""
    sign = f'<span aria-hidden="true">{SIGNS[value.finding]}</span>'
    return f'<span class="verdict {slug(value.finding)}">{sign} {text(value.finding)}</span>{note}'


def table(headers: Sequence[str], rows: Sequence[Sequence[str | Verdict]], label: str) -> str:
    """A table in a box of its own, which scrolls where the table is wider than the page. The first column names rows.

    Columns whose cells are numbers are set to the right.
    """
    numeric = [_numeric([row[index] for row in rows]) for index in range(len(headers))]
    kinds = [' class="number"' if each else "" for each in numeric]
    head = "".join(f'<th scope="col"{kind}>{text(each)}</th>' for each, kind in zip(headers, kinds, strict=True))
    body = []
    for row in rows:
        first, *rest = (cell(each) for each in row)
        cells = "".join(f"<td{kind}>{each}</td>" for each, kind in zip(rest, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row"{kinds[0]}>{first}</th>{cells}</tr>')
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>", label)


def scrolling(content: str, label: str) -> str:
    """Content in a box that scrolls sideways, also by keyboard."""
    return f'<div class="scroll" role="group" tabindex="0" aria-label="{attribute(label)}">{content}</div>'


def _numeric(values: Sequence[str | Verdict]) -> bool:
    """Whether a column holds numbers: those of its cells that are not empty begin with one, and there are some."""
    filled = [each for each in values if not isinstance(each, str) or each.strip()]
    return bool(filled) and all(isinstance(each, str) and NUMBER.match(each.strip()) for each in filled)
