"""The path of one ordinary control step against the path of all requests, and what it leaves to that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.guard import GuardSetting
from omcda_deploy.policy import NoiseSource
from omcda_deploy.serve.session import Session
from omcda_deploy.serve.status import RangeError
from tests.support.bundles import continuous_spec, discrete_spec, with_references, write_test_bundle

KINDS = ("continuous", "discrete")


def row(bundle: Bundle, model: str, generator: np.random.Generator, *, noisy: bool) -> dict[str, Any]:
    """A request of one row, of which about half the actions are available."""
    agents = bundle.spec.agents if model == TEAM else (bundle.spec.agent(model),)
    given: dict[str, Any] = {
        "observation": generator.normal(size=(1, sum(a.observation_size for a in agents))).astype(np.float32)
    }
    if noisy:
        drawn = NoiseSource(bundle.spec, int(generator.integers(1000))).draw(1)
        given["noise"] = np.concatenate([drawn[a.name] for a in agents], axis=1)
    if bundle.spec.action_kind == "discrete":
        masks = [generator.integers(0, 2, size=(1, a.action.size), dtype=np.uint8) for a in agents]
        for mask in masks:
            mask[0, generator.integers(mask.size)] = 1
        given["action_mask"] = np.concatenate(masks, axis=1)
    return given


def stepped(session: Session, given: dict[str, Any]) -> dict[str, bytes] | None:
    assert session.step is not None
    names = ("observation", "noise", "action_mask")
    return session.step(*(given[name].tobytes() if name in given else b"" for name in names))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_answered_byte_for_byte_as_any_request(kind: str, tmp_path: Path) -> None:
    spec = continuous_spec() if kind == "continuous" else discrete_spec()
    bundle = with_references(write_test_bundle(tmp_path / "bundle", spec))
    generator = np.random.default_rng(0)
    for model in (*bundle.spec.names, TEAM):
        session, other = Session(bundle, model, {}), Session(bundle, model, {})
        for index in range(40):  # with noise and without in turn: nothing is left over from the last step
            given = row(bundle, model, generator, noisy=index % 3 == 0)
            answer = stepped(session, given)
            expected = other.encode(other.answer(given))
            assert answer == expected
        ours, theirs = session.meter.totals(), other.meter.totals()
        assert (ours.answers, ours.rows) == (theirs.answers, theirs.rows) == (40, 40)
        np.testing.assert_array_equal(ours.divergence, theirs.divergence)
        np.testing.assert_array_equal(ours.exceeded, theirs.exceeded)
        for counted, expected_counts in zip(
            (*ours.ratios, *ours.distances), (*theirs.ratios, *theirs.distances), strict=True
        ):
            assert counted.counts == expected_counts.counts


CONTINUOUS: dict[str, dict[str, Any]] = {
    "short": {"observation": np.zeros((1, 3), np.float32)},
    "two rows": {"observation": np.zeros((2, 4), np.float32)},
    "nothing": {"observation": np.zeros((1, 0), np.float32)},
    "long noise": {"noise": np.zeros((1, 2), np.float32)},
    "NaN": {"observation": np.array([[0, np.nan, 0, 0]], np.float32)},
    "infinite": {"observation": np.array([[0, 0, -np.inf, 0]], np.float32)},
    "infinite noise": {"noise": np.array([[np.inf]], np.float32)},
    "overflow": {"observation": np.array([[0, 0, 3.4e38, 0]], np.float32)},
    "a mask": {"action_mask": np.ones((1, 1), np.uint8)},
}
DISCRETE: dict[str, dict[str, Any]] = {
    "no mask": {"action_mask": np.zeros((1, 0), np.uint8)},
    "short mask": {"action_mask": np.ones((1, 2), np.uint8)},
    "nothing available": {"action_mask": np.zeros((1, 3), np.uint8)},
    "a two": {"action_mask": np.array([[1, 2, 0]], np.uint8)},
    "NaN": {"observation": np.full((1, 5), np.nan, np.float32)},
    "noise that outweighs the mask": {
        "noise": np.array([[0, 3.4e38, 0]], np.float32),
        "action_mask": np.array([[1, 0, 1]], np.uint8),
    },
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [("continuous", change) for change in CONTINUOUS] + [("discrete", change) for change in DISCRETE],
)
def test_what_is_not_ordinary_is_left_to_the_session(
    kind: str, change: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    session = Session(bundle, "agent_0", {})
    given = row(bundle, "agent_0", np.random.default_rng(1), noisy=False)
    assert stepped(session, given) is not None
    assert stepped(session, given | (CONTINUOUS if kind == "continuous" else DISCRETE)[change]) is None
    assert session.meter.totals().answers == 1
    assert stepped(session, given) == session.encode(session.answer(given))  # and it has left no trace


def test_each_agent_of_a_team_needs_an_available_action(discrete_bundle: Bundle) -> None:
    session = Session(discrete_bundle, TEAM, {})  # agent_0 has 3 actions, agent_1 has 4
    given: dict[str, Any] = {"observation": np.zeros((1, 9), np.float32)}
    given["action_mask"] = np.array([[1, 1, 1, 0, 0, 0, 0]], np.uint8)
    assert stepped(session, given) is None
    given["action_mask"] = np.array([[0, 1, 0, 0, 0, 0, 1]], np.uint8)
    answer = stepped(session, given)
    assert answer is not None
    assert np.frombuffer(answer["action"], np.int64).tolist() == [1, 3]


def test_a_guard_that_acts_is_the_sessions(continuous_bundle: Bundle) -> None:
    generator, limit = np.random.default_rng(2), 2.0
    for mode in ("observe", "fallback"):
        session = Session(continuous_bundle, "agent_1", {"agent_1": GuardSetting(mode, limit)})
        left = 0
        for _ in range(50):
            given = row(continuous_bundle, "agent_1", generator, noisy=True)
            answer, expected = stepped(session, given), session.answer(given)
            exceeded = expected["divergence"][0] > limit
            assert (answer is None) == (mode == "fallback" and exceeded)
            assert (expected["policy_weight"][0] == 0.0) == (answer is None)
            left += exceeded
        assert 5 < left < 45


def test_where_far_observations_are_refused_no_step_passes_by(tmp_path: Path) -> None:
    bundle = with_references(write_test_bundle(tmp_path / "bundle", continuous_spec()))
    session = Session(bundle, "agent_1", {"agent_1": GuardSetting(distance_limit=3.0)})
    assert session.step is None
    with pytest.raises(RangeError, match="within 3 of the training data"):
        session.answer({"observation": np.full((1, 5), 10.0, np.float32)})
