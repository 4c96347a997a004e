"""Steps of MkDocs' build: pages that are made of other files of the tree, and links that leave docs/."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbconvert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
COPIES = {
    "omcda_deploy/policies/README.md": "behavior-policies.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
QUICK_START = ("Two commands", "From a dataset to a served team")  # sections of the README
_LINK = re.compile(r"\[([^]]*)\]\(((?:\.\./)*[\w./-]+)(#[^)]*)?\)")
NOTEBOOKS = ("tutorials/notebook.ipynb",)
_PAGE = re.compile(r"`docs/([\w/-]+\.md)`")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not written in docs/."""
    pages = {page: (ROOT / source).read_text() for source, page in COPIES.items()}
    pages |= {"cli.md": command_line(), "quickstart.md": quick_start()}
    for notebook in NOTEBOOKS:
        text, _ = nbconvert.MarkdownExporter().from_filename(ROOT / "docs" / notebook)
        pages[notebook.replace(".ipynb", ".md")] = text
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Lead links and names of pages to where they are in the site, and make text of links to the source tree."""
    uri = page.file.src_uri
    up = "../" * uri.count("/")
    source = {copy: original for original, copy in COPIES.items()}.get(uri, f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = (ROOT / source).parent.joinpath(target).resolve()
        if not path.is_relative_to(ROOT):
            return found[0]
        if path.is_relative_to(ROOT / "docs"):
            within = f"[{text}]({up}{path.relative_to(ROOT / 'docs')}{anchor})"
            return found[0] if source.startswith("docs/") else within
        copy = COPIES.get(str(path.relative_to(ROOT)))
        return f"[{text}]({up}{copy}{anchor})" if copy else text

    def named(found: re.Match[str]) -> str:
        return f"[{found[1]}]({up}{found[1]})" if files.get_file_from_path(found[1]) else found[0]

    return _PAGE.sub(named, _LINK.sub(link, markdown)).replace(".ipynb)", ".md)")


def quick_start() -> str:
    """Those sections of the README that lead to a first result."""
    sections = dict(re.findall(r"(?ms)^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text()))
    if missing := [title for title in QUICK_START if title not in sections]:
        raise PluginError(f"README.md has no section {missing[0]!r}: say in docs/hooks.py which replace it")
    return "# Quick start\n\n" + "\n".join(f"## {title}\n{sections[title]}" for title in QUICK_START)


def command_line() -> str:
    """The page of all commands and options, as typer describes them."""
    command = [sys.executable, "-m", "typer", "omcda_deploy.cli", "utils", "docs", "--name", "omcda-deploy"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"(?ms)^## `omcda-deploy convert`.*?(?=^## )", "", text)  # hidden, and listed all the same
    text = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text)  # cut off sentences; they follow whole
    return text.replace("# `omcda-deploy`", "# Command line", 1)
