"""The observer of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omcda_deploy.spec import TeamSpec


class TrainObserver:
    """Notified while a run is trained; the methods of this class do nothing. Override those that matter."""

    def started(self, spec: TeamSpec, algorithm: str, steps: int, recipe: Mapping[str, Any]) -> None:
        """Everything was checked, and training to ``steps`` begins or goes on.

        ``recipe`` holds the settings that a new run takes from its task's recipe.
        """

    def cloning(self, step: int, steps: int, loss: float) -> None:
        """Cloning of the behaviour policy reached ``step`` of at most ``steps``.

        Where runs have a clone each, the steps of all count as one; a clone that is done early skips its last ones.
        ``loss`` is the held-out negative log-likelihood per agent and step, in nats.
        """

    def choosing(self, step: int, steps: int) -> None:
        """The choice of the budget took ``step`` of ``steps`` training steps."""

    def chosen(self, advice: str) -> None:
        """The budget was chosen; ``advice`` is a sentence."""

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line of metrics was written."""
