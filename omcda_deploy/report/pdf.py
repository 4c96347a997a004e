"""Figures as PDF, for papers: SVG files of :func:`omcda_deploy.report.html.svg_document`, with their light colours.

fpdf2 draws; it knows classes but neither variables nor ``currentColor``, so the style of every element is worked
out here first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from omcda_deploy.errors import MissingExtraError
from omcda_deploy.files import atomic

_SVG = "{http://www.w3.org/2000/svg}"
_DRAWN = ("fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity")
# The built-in fonts of PDF have the characters of Latin-1 alone.
_LATIN = str.maketrans({"\u202f": " ", "\u2212": "-", "\u2013": "-", "\u221e": "inf"})


def require_pdf() -> tuple[Any, Any]:
    """Return what draws PDF files; raises :class:`MissingExtraError` where it is not installed."""
    try:
        from fpdf import FPDF
        from fpdf.svg import SVGObject
    except ImportError as error:
        raise MissingExtraError("fpdf2", "pdf") from error
    return FPDF, SVGObject


def write_pdf(figure: Path) -> Path:
    """Write the SVG file ``figure`` as a PDF of one page beside it, and return that file."""
    document, drawing = require_pdf()
    root = _plain(ElementTree.fromstring(figure.read_text()))
    width, height = (float(number) for number in root.get("viewBox", "").split()[2:])
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    page = document(unit="pt", format=(width, height))
    page.creation_date = datetime(2000, 1, 1, tzinfo=UTC)  # equal figures make equal files
    page.set_margin(0)
    page.set_auto_page_break(False)
    page.add_page()
    page.set_font("helvetica", size=12)
    drawing(ElementTree.tostring(root, encoding="unicode")).draw_to_page(page, 0, 0)
    target = figure.with_suffix(".pdf")
    with atomic(target) as path:
        path.write_bytes(bytes(page.output()))
    return target


def _plain(root: Any) -> Any:
    """Give every element its style as attributes, and drop what is not drawn."""
    sheet = "".join(element.text or "" for element in root.iter(f"{_SVG}style"))
    sheet = re.sub(r"@media[^{]*\{[^{}]*\{[^{}]*\}\}", "", sheet)
    rules = [
        (selector.strip(), dict(part.split(":", 1) for part in body.split(";") if ":" in part))
        for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", sheet)
        for selector in selectors.split(",")
    ]
    variables = {name: value for _, body in rules for name, value in body.items() if name.startswith("--")}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}title"):
                parent.remove(child)
    for element in root.iter():
        style = _style(element, rules, variables)
        for name in _DRAWN:
            if name in style:
                element.set(name, style[name])
        if element.tag == f"{_SVG}text":
            element.text = (
                (element.text or "").translate(_LATIN).encode("latin-1", "replace").decode("latin-1")
            )
            element.set("font-size", style.get("font-size", "12px").removesuffix("px"))
            element.set("font-family", "helvetica")
        for name in ("class", "style"):
            element.attrib.pop(name, None)
    return root


def _style(
    element: Any, rules: list[tuple[str, dict[str, str]]], variables: Mapping[str, str]
) -> dict[str, str]:
    """Declarations for an element: of its tag, its classes and itself, the later winning."""
    names = {element.tag.removeprefix(_SVG), *(f".{name}" for name in element.get("class", "").split())}
    style: dict[str, str] = {}
    for selector, body in rules:
        if selector.removeprefix("svg ") in names:
            style |= body
    style |= dict(part.split(":", 1) for part in element.get("style", "").split(";") if ":" in part)

    def value_of(match: re.Match[str]) -> str:
        return variables[match[1]]

    resolved = {name: re.sub(r"var\((--[\w-]+)\)", value_of, value) for name, value in style.items()}
    colour = resolved.get("color", "#000")
    return {name: value.replace("currentColor", colour) for name, value in resolved.items()}
