"""The episode of a client: its name and its steps, by which recordings of servers and clients are joined."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import uuid4

from omcda_deploy.errors import ConfigError
from omcda_deploy.policy import Float, ScaledNoise

NAME_LIMIT = 100  # characters that a server takes


class EpisodeClock:
    """``id``: name of the episode; ``step``: number of its last step, from 1 on, 0 before the first.

    ``temperature``: of the last step's noise, None if it is not known.
    """

    def __init__(self) -> None:
        self.temperature: float | None = None
        self.begin()

    def begin(self, episode_id: str | None = None) -> None:
        """Begin an episode, under a new name unless one is given. Raises :class:`ConfigError` for a long one."""
        if episode_id is not None and not (
            isinstance(episode_id, str) and 1 <= len(episode_id) <= NAME_LIMIT
        ):
            got = len(episode_id) if isinstance(episode_id, str) else f"{episode_id!r}"
            raise ConfigError(
                f"episode_id: expected 1 to {NAME_LIMIT} characters, got {got}: choose another name"
            )
        self.id = uuid4().hex[:16] if episode_id is None else episode_id
        self.step = 0

    def advance(self, noise: Mapping[str, Float] | None) -> None:
        """Count a step that uses ``noise``."""
        self.step += 1
        self.temperature = noise.temperature if isinstance(noise, ScaledNoise) else None
