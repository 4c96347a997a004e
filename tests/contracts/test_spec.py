"""Team specifications: positions of agents in joined vectors."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace

import numpy as np

from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

SPEC = TeamSpec(
    task="test/slices",
    agents=(
        AgentSpec("a", 4, ActionSpec("continuous", 2)),
        AgentSpec("b", 1, ActionSpec("continuous", 3)),
        AgentSpec("c", 2, ActionSpec("continuous", 1)),
    ),
    state_size=7,
    control_rate=10.0,
)


def test_slices_divide_a_joined_vector_among_the_agents() -> None:
    assert SPEC.observation_slices == (slice(0, 4), slice(4, 5), slice(5, 7))
    assert SPEC.action_slices == (slice(0, 2), slice(2, 5), slice(5, 6))
    joined = np.arange(7)
    parts = [joined[columns] for columns in SPEC.observation_slices]
    np.testing.assert_array_equal(np.concatenate(parts), joined)


def test_cached_slices_belong_to_one_spec_and_leave_it_equal() -> None:
    fresh = replace(SPEC)
    assert SPEC.action_slices is SPEC.action_slices
    assert fresh == SPEC
    assert hash(fresh) == hash(SPEC)
    assert asdict(fresh) == asdict(SPEC)
    single = replace(SPEC, agents=SPEC.agents[1:2])
    assert single.action_slices == (slice(0, 3),)
    assert pickle.loads(pickle.dumps(SPEC)).observation_slices == SPEC.observation_slices
