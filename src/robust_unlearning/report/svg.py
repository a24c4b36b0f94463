"""A figure's SVG, made fit to stand inside a page beside others."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from robust_unlearning.errors import UserError

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK = {"#000000": "currentColor", "#ffffff": "none"}
"""Black takes the colour of the page's text, white lets the page through: in a dark page it is light on dark."""

PIXELS = 4 / 3
"""CSS pixels a point: the unit of matplotlib's viewBox."""


def inline_svg(path: Path, name: str, label: str) -> str:
    """The `<svg>` element of a file, scaled by the page and read aloud as `label`.

    Ids that something refers to get `name` in front, so that two figures of a page share none; others, and what says
    who made the file, are left out.

    Raises:
        UserError: no such file, or it is not an SVG.
    """
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"the figure {str(path)!r} cannot be read as SVG: {error}. Draw it again.") from error
    if root.tag != f"{{{SVG}}}svg" or "viewBox" not in root.attrib:
        raise UserError(f"{str(path)!r} is no SVG with a viewBox; figures are written by `save_figure`.")
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    used = set()
    for element in root.iter():
        for key, value in element.items():
            used |= set(re.findall(r"url\(#([^)]+)\)", value))
            if key in ("href", f"{{{XLINK}}}href") and value.startswith("#"):
                used.add(value[1:])
    for element in root.iter():
        if element.get("id") in used:
            element.set("id", f"{name}-{element.get('id')}")
        else:
            element.attrib.pop("id", None)
        for key, value in element.items():
            element.set(key, _recoloured(re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", value)))
        target = element.attrib.pop(f"{{{XLINK}}}href", None) or element.get("href")
        if target and target.startswith("#"):
            element.set("href", f"#{name}-{target[1:]}")
    width = float(root.get("viewBox", "").split()[2]) * PIXELS
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": label, "style": f"--width: {width:.0f}px"}
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{SVG}"', "", 1)


def _recoloured(style: str) -> str:
    for colour, ink in INK.items():
        style = style.replace(colour, ink)
    return style
