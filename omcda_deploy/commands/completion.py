"""Completion of names in a shell (``omcda-deploy --install-completion``); it imports no simulator and no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def task_names(incomplete: str) -> list[str]:
    """Names of tasks."""
    from omcda_deploy import registry

    return _beginning(incomplete, registry.tasks())


def algorithm_names(incomplete: str) -> list[str]:
    """Names of algorithms."""
    from omcda_deploy import registry

    return _beginning(incomplete, registry.algorithms())


def tier_names(ctx: Any, incomplete: str) -> list[str]:
    """Tiers of the command line's task, or of all tasks before one is given."""
    from omcda_deploy import registry
    from omcda_deploy.play.shipped import RANDOM, tiers

    known = registry.tasks()
    # The words of a line that cannot be parsed yet are in its args.
    tasks = [word for word in (ctx.params.get("task"), *ctx.args) if word in known] or known
    return _beginning(incomplete, sorted({RANDOM, *(tier for task in tasks for tier in tiers(task))}))


def engine_names(incomplete: str) -> list[str]:
    """Names of engines."""
    from omcda_deploy.experiments.engines import OPTIONS

    return _beginning(incomplete, OPTIONS)


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
