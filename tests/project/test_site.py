"""The site builds, notices broken links, describes the whole public API and needs nothing from the network.

The notebook's outputs are those of its code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import omcda_deploy
from tests.support.pages import DOCS
from tests.support.server_process import ROOT

for package in ("mkdocs", "material", "mkdocstrings", "nbclient"):
    pytest.importorskip(package)

REMOTE = re.compile(r"""(?:src=|<link[^>]+href=|@import |url\()["']?https?://""")


def build(tree: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_needs_no_network(site: Path) -> None:
    pages = {
        str(path.relative_to(DOCS).with_suffix("")).replace("README", "index") for path in DOCS.rglob("*.md")
    }
    generated = {"quickstart", "cli", "behavior-policies", "changelog", "examples", "tutorials/notebook"}
    built = {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")}
    assert built == pages | generated | {"404"}
    styles = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert [path.name for path in styles if REMOTE.search(path.read_text())] == []
    assert REMOTE.search('<script src="https://example.org/a.js">')


def test_the_pages_of_code_say_what_the_code_says(site: Path) -> None:
    commands = (site / "cli.html").read_text()
    assert "omcda-deploy describe" in commands
    assert "--control-rate" in commands
    assert "omcda-deploy convert" not in commands
    team = (site / "api" / "spec.html").read_text()
    assert ":class:" not in team
    assert "omcda_deploy.spec.TeamSpec.contract_hash" in team
    teams = re.sub(r"<[^>]+>", "", (site / "api" / "teams.html").read_text())
    assert "As TeamPolicy.act." in teams
    assert "collect mamujoco/hopper-3x1 --tier medium-expert" in re.sub(
        r"<[^>]+>", "", (site / "quickstart.html").read_text()
    )


def test_every_public_name_is_described_once() -> None:
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    described = re.findall(r"^::: (omcda_deploy[\w.]*)\.(\w+)$", text, flags=re.M)
    assert sorted(described) == sorted((module, name) for name, module in omcda_deploy._MODULES.items())
    listed = re.findall(r"`(\w+)`", (DOCS / "api" / "index.md").read_text())
    assert sorted(set(listed) - {"omcda_deploy"}) == omcda_deploy.__all__


def test_broken_links_are_noticed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "docs").mkdir(parents=True)
    settings = (ROOT / "mkdocs.yml").read_text()
    settings = settings.split("\nnav:")[0].replace("hooks: [docs/hooks.py]\n", "")
    settings = re.sub(r"\n  - mkdocstrings:.*", "\n", settings, flags=re.DOTALL)
    (tree / "mkdocs.yml").write_text(settings)
    (tree / "docs" / "index.md").write_text("# Home\n\n[a](other.md#there)\n")
    (tree / "docs" / "other.md").write_text("# Other\n\n## There\n")
    shutil.copy(DOCS / "site.css", tree / "docs")
    assert build(tree, tmp_path / "site").returncode == 0
    for broken in ("other.md#nowhere", "nowhere.md", "../README.md"):
        (tree / "docs" / "index.md").write_text(f"# Home\n\n[a]({broken})\n")
        done = build(tree, tmp_path / "site")
        assert done.returncode == 1, broken
        assert broken.rpartition("#")[2] in done.stderr


def shapes(cells: Any) -> list[str]:
    """Text that each cell prints, in however many pieces; every number replaced, as machines round differently."""
    printed = []
    for outputs in filter(None, (cell.get("outputs") for cell in cells)):
        assert all(output["output_type"] == "stream" and output["name"] == "stdout" for output in outputs)
        text = "".join("".join(output["text"]) for output in outputs)
        printed.append(re.sub(r"\s", "", re.sub(r"-?\d+(\.\d*)?", "#", text)))
    return printed


def test_the_notebook_runs_and_its_outputs_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    file = DOCS / "tutorials" / "notebook.ipynb"
    smaller = (
        file.read_text().replace("steps=1000", "steps=20").replace('\\"steps\\": 500', '\\"steps\\": 20')
    )
    assert smaller != file.read_text()
    (tmp_path / "notebook.ipynb").write_text(smaller)
    code = """if True:
        import nbclient, nbformat, sys
        notebook = nbformat.read(sys.argv[1], 4)
        nbclient.NotebookClient(notebook, timeout=120).execute()
        nbformat.write(notebook, sys.argv[1])
    """
    command = [sys.executable, "-c", code, str(tmp_path / "notebook.ipynb")]
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = json.loads((tmp_path / "notebook.ipynb").read_text())
    assert shapes(ran["cells"]) == shapes(json.loads(file.read_text())["cells"])
    assert len(shapes(ran["cells"])) >= 5
