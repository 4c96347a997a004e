"""Limits of size: no file over 400 lines and no function over 80; generated code is exempt."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("omcda_deploy", "training", "export", "serve", "protos")
GENERATED = ("_pb2.py", "_pb2_grpc.py")
FILE_LINES = 400
FUNCTION_LINES = 80


def sources() -> list[Path]:
    """Python files of the product that people wrote."""
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))  # follows no link
    return [path for path in files if not path.name.endswith(GENERATED)]


def functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, first line and number of lines of every function, those inside others included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def oversized(path: str, text: str) -> list[str]:
    """One line for a file that is too long, and one for each function in it that is."""
    count = len(text.splitlines())
    file = [f"{path}: {count} lines, expected at most {FILE_LINES}"] if count > FILE_LINES else []
    return file + [
        f"{path}:{line}: {name} has {length} lines, expected at most {FUNCTION_LINES}"
        for name, line, length in functions(text)
        if length > FUNCTION_LINES
    ]


def test_no_file_and_no_function_is_too_long() -> None:
    paths = sources()
    assert len(paths) > 100
    assert {path.relative_to(ROOT).parts[0] for path in paths} == set(FOLDERS)
    findings = [line for path in paths for line in oversized(str(path.relative_to(ROOT)), path.read_text())]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n" * FILE_LINES, []),
        ("x = 1\n" * (FILE_LINES + 1), ["a.py: 401 lines, expected at most 400"]),
        ("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1), []),
        (
            "x = 1\n\n\nclass C:\n    async def f(self):\n" + "        x = 1\n" * FUNCTION_LINES,
            ["a.py:5: f has 81 lines, expected at most 80"],
        ),
    ],
)
def test_the_limits_are_exact(text: str, expected: list[str]) -> None:
    assert oversized("a.py", text) == expected
