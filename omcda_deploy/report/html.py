"""A report as one self-contained HTML file, and the HTML that its sections are made of.

A report is a list of sections, each made from one measurement or from several side by side::

    write_report("report.html", "HalfCheetah", [
        comparison_section({"dataset": episode_returns, "BC": bc, "OMCDA": omcda}),
        evaluation_section(omcda, "OMCDA"),
        replay_section(replayed),
    ])

The file loads nothing: no script, no font, no image. It follows the reader's light or dark preference. Functions
take plain text and return HTML in which it is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from omcda_deploy.files import write_text


@dataclass(frozen=True)
class Section:
    """A part of a report: a plain heading, and a body of HTML whose every text is escaped already."""

    heading: str
    body: str


def write_report(path: str | Path, title: str, sections: Sequence[Section], summary: str = "") -> None:
    """Write the HTML file, whole or not at all. ``summary`` is a line of plain text under the title.

    Raises :class:`ConfigError` where ``path`` cannot be written.
    """
    lead = f'<p class="lead">{escape(summary)}</p>' if summary else ""
    body = "".join(f"<section><h2>{escape(s.heading)}</h2>{s.body}</section>" for s in sections)
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1>{lead}</header>{body}</main></body></html>\n",
    )


def captioned(content: str, caption: str) -> str:
    """A figure or table with a line of plain text under it."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers side by side; an entry is (name, value, detail)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div><span class="what">{escape(name)}</span><strong>{escape(value)}</strong>'
            f'<span class="detail">{escape(detail)}</span></div>'
            for name, value, detail in entries
        )
        + "</div>"
    )


def folded(summary: str, content: str) -> str:
    """HTML that is hidden until the reader opens it by its ``summary``."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def provenance_list(entries: Mapping[str, str]) -> str:
    """Names and plain texts that say where numbers come from."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries.items())
    return f'<h3>Provenance</h3><dl class="provenance">{rows}</dl>'


def svg_document(svg: str) -> str:
    """Make a figure of :mod:`omcda_deploy.report.figures` a file of its own, which brings its style along."""
    opening, _, content = svg.partition(">")
    return (
        opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        + f">\n<style>{_COLOURS}{_FIGURES}</style>\n"
        + f'<rect width="100%" height="100%" style="fill:var(--page)"/>{content}\n'
    )


_COLOURS = """
:root{color-scheme:light dark;--font:system-ui,-apple-system,"Segoe UI","Helvetica Neue",Arial,sans-serif;
--page:#fff;--text:#1b1f24;--soft:#5b6570;--rule:#dde2e7;--panel:#f6f8fa;
--data:#2364aa;--limit:#b3460f;--s0:#2364aa;--s1:#cf6a16;--s2:#2e8b57;--s3:#b8324f;--s4:#75519a;--s5:#8a6a2c;
--s6:#158f96;--s7:#c9509a;--s8:#66717d;--s9:#8f9a17}
@media (prefers-color-scheme:dark){:root{--page:#14181d;--text:#e3e7eb;--soft:#9aa5b1;--rule:#313942;
--panel:#1c2229;--data:#6fb1f2;--limit:#f0a35e;--s0:#6fb1f2;--s1:#f0a35e;--s2:#6cc79a;--s3:#f0788f;--s4:#b89be0;
--s5:#cfae6a;--s6:#57c9cf;--s7:#ee92c8;--s8:#a9b3be;--s9:#c9d356}}
""".replace("\n", "")
_FIGURES = """
svg{display:block;width:100%;height:auto;font-family:var(--font)}
svg text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .name,svg .mark{fill:var(--text)}
svg .limit-text{fill:var(--limit)}
svg .grid{stroke:var(--rule)}
svg .axis{stroke:var(--soft)}
svg .dot{fill:var(--data);fill-opacity:.45}
svg .mean,svg .bar{fill:var(--data)}
svg .mean{stroke:var(--page);stroke-width:1.5}
svg .whisker{stroke:var(--data);stroke-width:2.5}
svg .curve{fill:none;stroke:var(--data);stroke-width:1.5;stroke-linejoin:round}
svg .quantile{stroke:var(--text);stroke-dasharray:2 3}
svg .limit{stroke:var(--limit);stroke-width:2}
svg .s0{color:var(--s0)}svg .s1{color:var(--s1)}svg .s2{color:var(--s2)}svg .s3{color:var(--s3)}
svg .s4{color:var(--s4)}svg .s5{color:var(--s5)}svg .s6{color:var(--s6)}svg .s7{color:var(--s7)}
svg .s8{color:var(--s8)}svg .s9{color:var(--s9)}svg .pale{opacity:.55}
svg .filled{fill:currentColor}
svg .stroked{fill:none;stroke:currentColor;stroke-width:1.75;stroke-linejoin:round}
svg .run{fill:var(--page);stroke:var(--text);stroke-width:1}
svg .error{stroke:var(--text);stroke-width:1.5}
svg .dashed{stroke-width:1.5;stroke-dasharray:6 4}
""".replace("\n", "")
_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.5 var(--font)}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .35rem}
h2{font-size:1.3rem;font-weight:650;margin:0 0 1rem}
h3{font-size:1rem;font-weight:650;margin:2rem 0 .6rem}
.lead{color:var(--soft);margin:0}
section{margin-top:2.5rem;padding-top:1.75rem;border-top:1px solid var(--rule)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:.75rem;margin-bottom:1.75rem}
.tiles div{background:var(--panel);border-radius:8px;padding:.8rem 1rem .75rem}
.tiles span{display:block;font-size:.8rem;color:var(--soft)}
.tiles strong{display:block;font-size:1.3rem;font-weight:600;line-height:1.4}
.tiles strong,table,dd{font-variant-numeric:tabular-nums}
figure{margin:1.75rem 0}
figcaption{font-size:.85rem;color:var(--soft);margin-top:.35rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(24rem,1fr));gap:1rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr));gap:1rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:.4rem .75rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child{text-align:left;padding-left:0}
thead th{font-weight:500;font-size:.8rem;color:var(--soft);vertical-align:bottom}
tbody th{font-weight:500}
td:last-child,th:last-child{padding-right:0}
details{margin:1.5rem 0}
summary{cursor:pointer;color:var(--soft);font-size:.9rem}
.provenance{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.25rem;margin:0;font-size:.85rem}
.provenance dt{color:var(--soft)}
.provenance dd{margin:0;overflow-wrap:anywhere}
@media print{body{font-size:12px}main{max-width:none;padding:0}section{break-inside:auto}figure{break-inside:avoid}}
""".replace("\n", "")
_STYLE = _COLOURS + _PAGE + _FIGURES
