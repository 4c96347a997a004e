"""The observer of an experiment, which may take hours: what its caller is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from omcda_deploy.errors import OmcdaError


class Observer:
    """Told of each part of an experiment as it begins and ends; this one does nothing. Override what is wanted."""

    def progress(
        self, label: str, unit: str
    ) -> AbstractContextManager[Callable[[float, float], None] | None]:
        """Enter around a part that takes a while; what it yields is called with ``(done, total)`` in ``unit``."""
        return nullcontext()

    def recorded(self, dataset: Path) -> None:
        """A dataset was recorded."""

    def ended(self, run: Path, error: OmcdaError | None) -> None:
        """A training run ended, with ``error`` where it failed. Called from the thread that ran it."""

    def left_out(self, run: Path, error: OmcdaError) -> None:
        """A run could not be exported or played, so that a comparison leaves it out."""
