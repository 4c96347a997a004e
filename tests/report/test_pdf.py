"""Figures as PDF: the styles that a converter cannot know are worked out, and equal figures make equal files."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from omcda_deploy.errors import MissingExtraError
from omcda_deploy.report import pdf
from omcda_deploy.report.figures import Bar, Curve, curves_figure, grouped_bars_figure
from omcda_deploy.report.html import svg_document
from omcda_deploy.report.svg import side_by_side

BARS = {"medium": {"a": Bar(-2.0, 1.0, np.array([-1.0, -3.0])), "b": Bar(3.0, float("nan"), np.array([3.0]))}}


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    curve = Curve(np.array([0.0, 0.5, 1.0]), np.array([1.0, 1234.0, -5.0]), np.full(3, 0.5))
    panels = [
        grouped_bars_figure(BARS, "return → \u2264", ["a", *"cdefghijk", "b"]),
        curves_figure({"a & b": curve}, "T", "m"),
    ]
    path = tmp_path / "figure.svg"
    path.write_text(svg_document(side_by_side(panels)))
    return path


def test_a_figure_becomes_a_page_of_its_size(figure: Path) -> None:
    pytest.importorskip("fpdf")
    content = pdf.write_pdf(figure).read_bytes()
    width, height = ElementTree.parse(figure).getroot().get("viewBox", "").split()[2:]
    assert content.startswith(b"%PDF-")
    assert f"/MediaBox [0 0 {float(width):.2f} {float(height):.2f}]".encode() in content
    assert pdf.write_pdf(figure).read_bytes() == content


def test_every_element_carries_its_light_colours(figure: Path) -> None:
    root = pdf._plain(ElementTree.fromstring(figure.read_text()))
    plain = ElementTree.tostring(root, encoding="unicode")
    for word in ("var(", "currentColor", "class=", "<style", "title"):
        assert word not in plain
    bars = [rect for rect in root.iter(f"{pdf._SVG}rect") if rect.get("rx") == "2"]
    drawn = [(bar.get("fill"), bar.get("opacity")) for bar in bars[:2]]
    assert drawn == [("#2364aa", None), ("#2364aa", ".55")]  # of the light theme, the eleventh series paler
    curves = [path for path in root.iter(f"{pdf._SVG}path") if path.get("stroke")]
    assert [(path.get("fill"), path.get("stroke")) for path in curves] == [("none", "#2364aa")]
    texts = [text.text for text in root.iter(f"{pdf._SVG}text")]
    assert "1 000" in texts
    assert "return ? ?" in texts
    assert all(text is None or text.isascii() or text.encode("latin-1") for text in texts)


def test_without_its_extra_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fpdf", None)
    with pytest.raises(MissingExtraError, match=r"omcda-deploy\[pdf\]"):
        pdf.require_pdf()
