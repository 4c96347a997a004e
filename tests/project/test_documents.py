"""Documents that code and pages cite exist, down to the heading; docstrings begin as sentences do."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CITATION = re.compile(r"\b((?:docs/)?[\w/.-]+\.md)(#[\w-]+)?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Names of files that commands write, or that belong to somebody else.
ELSEWHERE = {"results.md", "findings.md"}
IN_THE_SITE = {"cli.md", "quickstart.md"}  # pages that docs/hooks.py makes; the build checks links to them
INVENTED = {
    Path(__file__),
    Path(__file__).with_name("test_packaging.py"),
}  # tests name pages that do not exist
FIRST_WORDS = ("What", "Where", "Whether", "How", "Of", "That", "Who", "Which")


def tracked(*patterns: str) -> list[Path]:
    """Files of the tree that match."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    return [
        ROOT / name for name in listed if name and (ROOT / name).is_file() and not (ROOT / name).is_symlink()
    ]


def sources() -> list[Path]:
    """Python files that people wrote."""
    return [path for path in tracked("*.py") if "_pb2" not in path.name]


@cache
def headings(page: Path) -> frozenset[str]:
    """Anchors of a Markdown page, by GitHub's rule."""
    counts: dict[str, int] = {}
    anchors = set()
    fenced = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        if fenced or not (heading := re.match(r"#{1,6} (.+)", line)):
            continue
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1])
        slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        count = counts.get(slug, 0)
        counts[slug] = count + 1
        anchors.add(f"{slug}-{count}" if count else slug)
    return frozenset(anchors)


def citations() -> Iterator[tuple[Path, str, str]]:
    """Every Markdown page that a Python file or pyproject.toml names: file, page, anchor."""
    for path in [*sources(), ROOT / "pyproject.toml", ROOT / "Makefile"]:
        for name, anchor in CITATION.findall(path.read_text()):
            yield path, name, anchor.removeprefix("#")


def links() -> Iterator[tuple[Path, str]]:
    """Every relative link of a page below docs."""
    for page in tracked("docs/*.md", "docs/**/*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in LINK.findall(text):
            if not re.match(r"[a-z]+:", target):
                yield page, target


def test_every_citation_of_a_page_resolves() -> None:
    broken = []
    cited = 0
    for path, name, anchor in citations():
        if path in INVENTED or not name.startswith("docs/"):
            continue
        cited += 1
        page = ROOT / name
        if not page.is_file() or (anchor and anchor not in headings(page)):
            broken.append(f"{path.relative_to(ROOT)}: {name}{'#' + anchor if anchor else ''}")
    assert not broken
    assert cited > 20


def test_pages_are_cited_by_their_path() -> None:
    """A page without its folder is a page that a reader cannot open."""
    elsewhere = {ROOT / "tests", ROOT / "docs"}  # pages that tests write, and pages beside the one that cites
    bare = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, name, _ in citations()
        if "/" not in name and name not in ELSEWHERE and not elsewhere & set(path.parents)
        if not (ROOT / name).is_file()
    ]
    assert not bare


def test_every_link_between_pages_resolves() -> None:
    broken = []
    followed = 0
    for page, target in links():
        followed += 1
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if other.name in IN_THE_SITE:
            continue
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in headings(other)):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
    assert followed > 20


@pytest.mark.parametrize("text", ["docs/derivation.md#no-such-heading", "docs/nowhere.md"])
def test_a_wrong_citation_would_be_noticed(text: str) -> None:
    ((name, anchor),) = CITATION.findall(text)
    page = ROOT / name
    assert not page.is_file() or anchor.removeprefix("#") not in headings(page)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if text := ast.get_docstring(node):
            yield getattr(node, "lineno", 1), text


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sources()
        for line, text in docstrings(path)
        if re.match(r"\w+", text) and re.match(r"\w+", text)[0] in FIRST_WORDS  # type: ignore[index]
    ]
    assert not wrong
