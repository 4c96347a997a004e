"""Write docs/api from the docstrings of the public API: ``python docs/generate_api.py`` (``make docs``).

One page per part of the package. A class is shown with its fields and public methods, a function with its
signature. Roles of reStructuredText, which the docstrings use for references, become code spans.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import omcda_deploy

FOLDER = Path(__file__).parent / "api"
PAGES = {  # page -> title, and the modules whose public names it describes
    "experiments": (
        "Train and export",
        ("omcda_deploy.experiments.train", "omcda_deploy.experiments.export", "omcda_deploy.bundle"),
    ),
    "play": (
        "Play, record and measure",
        (
            "omcda_deploy.registry",
            "omcda_deploy.envs",
            "omcda_deploy.envs.adapters.parallel",
            "omcda_deploy.envs.adapters.pettingzoo",
            "omcda_deploy.play.collect",
            "omcda_deploy.play.evaluate",
            "omcda_deploy.play.replay",
        ),
    ),
    "datasets": (
        "Datasets",
        ("omcda_deploy.datasets", "omcda_deploy.datasets.writer", "omcda_deploy.datasets.record"),
    ),
    "teams": (
        "Teams, served and local",
        (
            "omcda_deploy.client.remote",
            "omcda_deploy.client.fallback",
            "omcda_deploy.client.channel",
            "omcda_deploy.local",
            "omcda_deploy.policy",
        ),
    ),
    "spec": ("Team specs", ("omcda_deploy.spec",)),
    "errors": ("Errors", ("omcda_deploy.errors",)),
}
HEADER = "<!-- Written by docs/generate_api.py; do not edit. -->"
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


def pages() -> dict[str, str]:
    """File name -> Markdown of every page, the index among them."""
    modules = omcda_deploy._NAMES
    placed = {module for _, names in PAGES.values() for module in names}
    if missing := modules.keys() - placed:
        raise SystemExit(f"no page of docs/api describes {', '.join(sorted(missing))}: add it to PAGES")
    index = [HEADER, "# Public API", "", "Everything is imported from `omcda_deploy`.", ""]
    written = {}
    for page, (title, sources) in PAGES.items():
        names = sorted(name for source in sources for name in modules.get(source, ()))
        entries = [line for name in names for line in entry(name)]
        written[f"{page}.md"] = "\n".join([HEADER, f"# {title}", "", *entries]).rstrip() + "\n"
        index += [f"* [{title}]({page}.md): {', '.join(f'`{name}`' for name in names)}"]
    written["README.md"] = "\n".join(index) + "\n"
    return dict(sorted(written.items()))


def entry(name: str) -> Iterator[str]:
    """The lines that describe one public name."""
    subject = getattr(importlib.import_module(omcda_deploy._MODULES[name]), name)
    if inspect.isclass(subject):
        yield from class_entry(name, subject)
    else:
        yield from (f"## {name}", "", *block(signature(name, subject)), *prose(subject), "")


def class_entry(name: str, subject: type[Any]) -> Iterator[str]:
    """The lines that describe a class, its fields and its public methods and properties."""
    yield from (f"## {name}", "")
    protocol = getattr(subject, "_is_protocol", False)
    if not protocol and not issubclass(subject, Exception):
        yield from block(signature(name, subject))
    yield from (*prose(subject), "")
    # What a class inherits from a base that is not public itself is described with it.
    ours = [base for base in subject.__bases__ if base.__module__.startswith("omcda_deploy.")]
    inherited = [base for base in ours if base.__name__ not in omcda_deploy._MODULES]
    if dataclasses.is_dataclass(subject):
        for described in (*inherited, subject):
            yield from fields(described)
        yield ""
    members = {key: value for described in (*inherited, subject) for key, value in vars(described).items()}
    for member, value in members.items():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            yield from (f"### {name}.{member}", "", *prose(value), "")
        elif inspect.isfunction(value) or isinstance(value, classmethod):
            function = value.__func__ if isinstance(value, classmethod) else value
            yield from (f"### {name}.{member}", "", *block(signature(member, function)))
            yield from (*member_prose(name, member, function), "")


class _Annotation:
    """An annotation that is printed as it was written, without quotation marks."""

    def __init__(self, text: object) -> None:
        self._text = str(text)

    def __repr__(self) -> str:
        return self._text


def fields(subject: type[Any]) -> Iterator[str]:
    """The fields that a dataclass defines, with the comments that give their shapes and units."""
    name = subject.__name__  # a public class names the package as its module
    module = importlib.import_module(omcda_deploy._MODULES.get(name, subject.__module__))
    text = Path(str(module.__file__)).read_text()
    (body,) = (n.body for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
    for node in body:
        if isinstance(node, ast.AnnAssign):
            comment = text.splitlines()[node.end_lineno - 1].partition("  # ")[2] if node.end_lineno else ""
            yield f"* `{ast.unparse(node.target)}: {ast.unparse(node.annotation)}`" + (
                comment and f": {comment}"
            )


def signature(name: str, subject: Any) -> str:
    """``name(parameter: type = default, …) -> type``, one parameter a line where it is long."""
    written = inspect.signature(subject)
    parameters = [
        p if p.annotation is p.empty else p.replace(annotation=_Annotation(p.annotation))
        for p in written.parameters.values()
        if p.name not in ("self", "cls")
    ]
    returned = written.return_annotation
    if returned is not written.empty:
        returned = _Annotation(returned)
    plain = written.replace(parameters=parameters, return_annotation=returned)
    if len(name) + len(str(plain)) <= 100:
        return f"{name}{plain}"
    lines, keywords = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            lines.append("    *,")
            keywords = True
        lines.append(f"    {parameter},")
    arrow = "" if returned is written.empty else f" -> {returned}"
    return "\n".join([f"{name}(", *lines, f"){arrow}"])


def member_prose(class_name: str, member: str, subject: Any) -> list[str]:
    """The docstring of a method, or a reference to the protocol whose method it implements."""
    if subject.__doc__:
        return prose(subject)
    protocol = "TeamPolicy" if class_name.endswith("Team") else "Policy"
    described = vars(getattr(omcda_deploy, protocol)).get(member)
    if described is None or not described.__doc__:
        raise SystemExit(f"{class_name}.{member} has no docstring: write one")
    return [f"As `{protocol}.{member}`."]


def block(code: str) -> list[str]:
    """A fenced block of Python."""
    return ["```python", code, "```", ""]


def prose(subject: Any) -> list[str]:
    """The docstring as Markdown."""
    text = inspect.cleandoc(subject.__doc__ or "")
    if inspect.isclass(subject) and text.startswith(f"{subject.__name__}("):
        text = ""  # of a dataclass, made from its fields
    text = _ROLE.sub(lambda match: f"`{match.group(1).rpartition('.')[2]}`", text)
    return text.replace("``", "`").replace("::\n", ":\n").splitlines()


def main() -> None:
    """Write every page, and remove pages that are not written any more."""
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for name, text in written.items():
        (FOLDER / name).write_text(text)
    for stale in {path.name for path in FOLDER.glob("*.md")} - written.keys():
        (FOLDER / stale).unlink()


if __name__ == "__main__":
    sys.exit(main())
