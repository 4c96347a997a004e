"""Reports of play to a team that records what became of its steps."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from omcda_deploy.play.episodes import PlayedStep
from omcda_deploy.policy import TeamPolicy


@runtime_checkable
class TakesReports(Protocol):
    """A team whose servers do not see rewards and ends."""

    @property
    def reporting(self) -> bool:
        """True if it wants reports."""
        ...

    def report(self, reward: Any, terminated: Any, truncated: Any, **unseen: Any) -> None:
        """Take the outcome of the step that it answered last; ``unseen`` is what its servers were not shown."""
        ...


def report_step(team: TeamPolicy, step: PlayedStep) -> None:
    """Report a step to a team that wants it. Episodes that the simulator lost have no end."""
    if not (isinstance(team, TakesReports) and team.reporting):
        return
    result, ended = step.result, step.ended & ~step.discarded
    team.report(
        result.reward,
        result.terminated & ended,
        result.truncated & ended,
        active=step.active,
        next_observations=result.observations,
        next_action_masks=result.action_masks,
        state=step.previous.state,
        next_state=result.state,
    )
