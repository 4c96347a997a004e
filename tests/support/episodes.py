"""Random episodes of small teams, for whatever writes or reads datasets."""

from __future__ import annotations

from typing import Any

import numpy as np

from omcda_deploy.datasets import Episode
from omcda_deploy.spec import TeamSpec
from tests.support.synthetic import continuous_spec, discrete_spec

SPECS = {"continuous": continuous_spec(), "discrete": discrete_spec()}


def random_episode(spec: TeamSpec, steps: int, seed: int = 0, *, timeout: bool = False) -> Episode:
    generator = np.random.default_rng(seed)
    agents = len(spec.agents)
    actions: Any = generator.uniform(-1, 1, (steps, agents, spec.action_size)).astype(np.float32)
    masks = None
    if spec.action_kind == "discrete":
        actions = np.stack([generator.integers(0, a.action.size, steps) for a in spec.agents], axis=1)
        masks = np.zeros((steps + 1, agents, spec.action_size), np.uint8)
        for index, agent in enumerate(spec.agents):
            masks[:, index, : agent.action.size] = 1
    observations = generator.normal(size=(steps + 1, agents, spec.observation_size)).astype(np.float32)
    for index, agent in enumerate(spec.agents):
        observations[:, index, agent.observation_size :] = 0
    return Episode(
        observations,
        generator.normal(size=(steps + 1, spec.state_size)).astype(np.float32),
        actions,
        generator.normal(size=steps).astype(np.float32),
        timeout=timeout,
        action_masks=masks,
        seed=seed,
    )


def require_equal(ours: Episode, theirs: Episode) -> None:
    for name in ("observations", "states", "actions", "rewards", "action_masks"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.timeout, ours.seed) == (theirs.timeout, theirs.seed)
    assert ours.undiscounted_return == theirs.undiscounted_return
