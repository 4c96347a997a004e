"""Pages whose blocks are run: commands in this process, or all of a page in a shell of its own."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from omcda_deploy import cli
from omcda_deploy.bundle import read_bundle
from tests.support.server_process import free_port, server_process

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```', re.M | re.S)
_ENDPOINTS = re.compile(r"127\.0\.0\.1:85\d\d(-85\d\d)?")
NOT_RUN = "sh"  # the language of blocks that only a reader runs


def blocks(text: str) -> list[tuple[str, str, str]]:
    """Language, file (empty without a title) and text of every block of a page, in order."""
    return _BLOCK.findall(text)


def run_in_shell(
    page: str, folder: Path, smaller: Sequence[tuple[str, str]] = (), *, admin_port: int = 9500
) -> str:
    """Run a page's ``bash`` and ``python`` blocks in ``folder``, in one shell, and return what they print.

    Servers, which lines that end in ``&`` and name ``serve`` start, get free ports and are waited for. What still
    runs in the background at the end is ended.
    """
    ports = {str(port): str(free_port()) for port in (8500, admin_port)}
    ready = f"until (exec 3<>/dev/tcp/127.0.0.1/{ports[str(admin_port)]}) 2> /dev/null; do sleep 0.1; done"
    lines = ["set -e -o pipefail"]
    for number, (language, _, text) in enumerate(blocks(page)):
        placed = re.sub("|".join(ports), lambda found: ports[found[0]], text)
        if language == "python":
            (folder / f"block{number}.py").write_text(placed)
            lines.append(f"{sys.executable} block{number}.py")
        elif language == "bash":
            for pattern, replacement in smaller:
                placed = re.sub(pattern, replacement, placed)
            lines.append(re.sub(r"^(.* serve .*)&$", rf"\1&\n{ready}", placed, flags=re.M))
    lines.append("jobs -p | xargs -r kill\nwait")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMCDA_CACHE": str(folder / "cache"),
    }
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def run_blocks(
    page: str,
    smaller: Sequence[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    *,
    toml: Callable[[str], None] | None = None,
    before: Callable[[list[str]], None] = lambda words: None,
    python: Callable[[str], object] = lambda file: runpy.run_path(file, run_name="__main__"),
) -> list[list[str]]:
    """Run a page's blocks in the working folder, each server on a free port, and return the commands.

    Blocks with a title become files; ``toml`` takes those of that language instead. ``smaller`` are pairs for
    :func:`re.sub`, by which commands become cheaper. ``before`` is called with a command's words before it runs,
    ``python`` with the file of ``python FILE``.
    """
    commands, endpoint = [], ""
    with ExitStack() as servers:

        def placed(text: str) -> str:
            return _ENDPOINTS.sub(endpoint, text) if endpoint else text

        for language, file, text in blocks(page):
            if language == "toml" and toml:
                toml(text)
            elif file:
                Path(file).write_text(placed(text))
            for line in text.replace("\\\n", " ").splitlines() if language == "bash" else ():
                for pattern, replacement in smaller:
                    line = re.sub(pattern, replacement, line)
                program, *words = shlex.split(placed(line.removesuffix("&")), comments=True)
                if program == "python":
                    python(words[0])
                elif words[0] == "serve":
                    bundle = read_bundle(Path(words[1]))
                    models = ("team",) if "--team" in words else bundle.spec.names
                    endpoint = servers.enter_context(server_process(bundle, *models)).endpoint
                else:
                    assert program == "omcda-deploy", line
                    before(words)
                    run_command(words, monkeypatch)
                commands.append(words)
    return commands


def run_command(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``omcda-deploy`` in this process, and require that it succeeds."""
    monkeypatch.setattr(sys, "argv", ["omcda-deploy", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0, words
