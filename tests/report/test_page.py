"""The report's page: self-contained, escaped, readable on a phone and on paper; figures with their numbers."""

from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from robust_unlearning.errors import UserError
from robust_unlearning.report.figures import FORMATS, NUMBERS, Series, new_figure, save_figure, trade_off
from robust_unlearning.report.page import Details, Figure, Page, Section, write_page
from robust_unlearning.report.tables import Table, Verdict
from robust_unlearning.stats.estimates import Estimate

VOID = {"meta", "link", "br", "img", "wbr", "hr", "input"}
HOSTILE = "<script>alert('x')</script> & \"quoted\" </table>"


class Reader(HTMLParser):
    """Collects tags with their attributes, ids, text, and whether every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, n=50, seeds=3)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two figures."""
    folder = tmp_path_factory.mktemp("figures")
    for name in ("one", "two"):
        series = [Series(f"{name} < 1 & more", [(Estimate(0.5), estimate(0.25)), (estimate(0.75), estimate(0.5))])]
        trade_off([("y\nin nats", series), ("z", series)], "x", "title", folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def written(figures: Path) -> Path:
    """A page with every kind of block."""
    rows: list[list[str | Verdict]] = [
        [HOSTILE, "1.5 [1, 2]", Verdict("holds", "n=9")],
        ["b", "-2", Verdict("does not hold")],
        ["c", "", Verdict("inconclusive", HOSTILE)],
        ["d", "0.1", Verdict("not run")],
    ]
    table = Table.of(f"Claims {HOSTILE}", ["claim", "number", "verdict"], rows, HOSTILE)
    drawn = [Figure.saved(HOSTILE, "What it shows.", figures / f"{name}.png") for name in ("one", "two", "one")]
    page = Page(
        f"Report {HOSTILE}",
        HOSTILE,
        [
            Section("claims", f"Claims {HOSTILE}", [HOSTILE, "Run `unlearn list`.", table], "Table 1"),
            Section("figures", "Figures", [*drawn[:2], Details("More", [drawn[2], table])]),
        ],
    )
    write_page(page, figures / "report.html")
    return figures / "report.html"


@pytest.fixture(scope="module")
def page(written: Path) -> Reader:
    return Reader(written.read_text(encoding="utf-8"))


def test_it_asks_nothing_of_the_network(written: Path, page: Reader) -> None:
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), (tag, key, value)
    assert not page.all("link")
    text = written.read_text(encoding="utf-8")
    shown = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)  # a namespace is a name, not an address
    assert "http:" not in shown
    assert "https:" not in shown
    assert "@import" not in shown
    assert not re.search(r"url\((?!#)", shown)


def test_it_is_well_formed_and_every_id_is_there_once(page: Reader) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes.get("href", "") for attributes in page.all("a") + page.all("use")]
    targets += [
        f"#{each}" for _, own in page.tags for value in own.values() for each in re.findall(r"url\(#(.*?)\)", value)
    ]
    inner = {each[1:] for each in targets if each.startswith("#")}
    assert {"claims", "figures"} < inner <= set(ids)
    assert any(each.startswith("figures-figure-2-") for each in inner)


def test_text_is_escaped(written: Path, page: Reader) -> None:
    assert len(page.all("script")) == 1  # the page's own
    assert "alert('x')" in "".join(page.text)
    assert "<script>alert" not in written.read_text(encoding="utf-8")
    assert page.all("code") == [{}]


def test_figures_and_tables_bring_their_numbers(figures: Path, page: Reader) -> None:
    links = page.all("a")
    saved = [each for each in links if "download" in each]
    names = [each["download"] for each in saved]
    assert [name for name in names if name.endswith(".png")] == ["one.png", "two.png", "one.png"]
    assert names.count("one.csv") == 2
    assert sum(name.startswith("claims-claims") for name in names) == 1
    contents = {each["download"]: base64.b64decode(each["href"].partition("base64,")[2]) for each in saved}
    for name in ("one.csv", "two.csv", "one.png"):
        assert contents[name] == (figures / name).read_bytes()
    (claims,) = (contents[name] for name in names if name.startswith("claims-claims"))
    rows = list(csv.reader(io.StringIO(claims.decode())))
    assert rows[0] == ["claim", "number", "verdict"]
    assert rows[1] == [HOSTILE, "1.5 [1, 2]", "holds: n=9"]
    drawings = page.all("svg")
    assert len(drawings) == 3
    assert all(each["role"] == "img" and "What it shows." in each["aria-label"] for each in drawings)


def test_tables_say_what_their_cells_belong_to(page: Reader) -> None:
    assert {each.get("scope") for each in page.all("th")} == {"col", "row"}
    text = " ".join("".join(page.text).split())
    for label in ("✓ holds", "✗ does not hold", "? inconclusive", "– not run"):
        assert label in text
    boxes = [each for each in page.all("div") if each.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table")) + len(page.all("svg"))
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in boxes)


def test_phones_paper_and_the_dark_are_thought_of(written: Path, page: Reader) -> None:
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    style = written.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    for rule in ("@media print", "@media (max-width: 36rem)", "prefers-color-scheme: dark", "overflow-x: auto",
                 "break-inside: avoid", "details-content"):  # fmt: skip
        assert rule in style, rule
    assert style.count("{") == style.count("}")
    drawn = [each["style"] for each in page.all("text") + page.all("path") if "style" in each]
    assert not any("#000000" in each or "#ffffff" in each for each in drawn)


def test_the_same_figure_and_page_are_the_same_bytes(written: Path, figures: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        figure, axes = new_figure()
        axes[0][0].plot([0, 1], [0, 1])
        axes[0][0].axvspan(0, 0.5)
        save_figure(figure, tmp_path / folder / "x.png", ["x", "y"], [[0, None], [1, 1]])
    for ending in FORMATS:
        assert (tmp_path / "a" / f"x{ending}").read_bytes() == (tmp_path / "b" / f"x{ending}").read_bytes()
    assert (tmp_path / "a" / "x.csv").read_text() == "x,y\n0,\n1,1\n"


def test_a_trade_offs_numbers(figures: Path) -> None:
    rows = list(csv.DictReader((figures / "one.csv").open(encoding="utf-8")))
    assert tuple(rows[0]) == NUMBERS
    assert [row["panel"] for row in rows] == ["y in nats"] * 2 + ["z"] * 2
    assert rows[0] | {"y_low": "", "y_high": ""} == {
        "panel": "y in nats", "series": "one < 1 & more", "label": "", "x": "0.5", "x_low": "", "x_high": "",
        "y": "0.25", "y_low": "", "y_high": "", "n": "50", "seeds": "3",
    }  # fmt: skip
    assert float(rows[1]["x_low"]) == pytest.approx(0.65)


def test_mistakes_are_said(figures: Path, tmp_path: Path) -> None:
    def fails(sections: list[Section], message: str) -> None:
        with pytest.raises(UserError, match=message):
            write_page(Page("t", "l", sections), tmp_path / "report.html")
        assert list(tmp_path.glob("*.html")) == []

    fails([Section("a", "A", []), Section("a", "B", [])], "section id 'a'")
    fails([Section("a b", "A", [])], "section id 'a b'")
    fails([Section("top", "A", [])], "not be 'top'")
    with pytest.raises(UserError, match="table 'T': row 1 has 1 cells for 2 headers"):
        Table.of("T", ["x", "y"], [["1"]])
    fails([Section("a", "A", [Figure.saved("F", "", tmp_path / "none.png")])], r"none\.png.*Draw it again")
    (tmp_path / "broken.svg").write_text("<svg")
    broken = Figure("F", "", tmp_path / "broken.svg", figures / "one.png", figures / "one.csv")
    fails([Section("a", "A", [broken])], r"broken\.svg.* cannot be read as SVG")
