"""Extension of Griffe that reads this package's docstrings for the site.

Roles of reStructuredText become code spans, the comment behind a field becomes its description, and a method
without a docstring refers to the protocol whose method it implements.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Changes of docstrings while a package is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write roles and double backticks as Markdown's code spans."""
        if obj.docstring:
            text = _ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = text.replace("``", "`").replace("::\n", ":\n")

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Describe a field by its comment."""
        is_field = attr.parent is not None and attr.parent.is_class and attr.annotation is not None
        if (
            is_field
            and not attr.docstring
            and attr.lines
            and (comment := attr.lines[-1].partition("  # ")[2])
        ):
            attr.docstring = griffe.Docstring(comment, parent=attr)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Refer from a team's or a policy's methods to those of the protocol."""
        owner = func.parent.name if func.parent and func.parent.is_class else ""
        if func.docstring or func.name.startswith("_"):
            return
        for end, protocol in (("Team", "TeamPolicy"), ("Policy", "Policy")):
            if owner.endswith(end) and owner != protocol and func.name in ("act", "reset"):
                func.docstring = griffe.Docstring(f"As `{protocol}.{func.name}`.", parent=func)
