"""The fast path of ordinary steps against the checked path: the same answers byte for byte, the same refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.errors import OmcdaError
from omcda_deploy.guard import GuardSetting, Mode
from omcda_deploy.policy import NoiseSource
from omcda_deploy.serve.session import Session
from omcda_deploy.serve.status import RangeError, RequestError
from omcda_deploy.serve.wire import WireTensors
from tests.support.bundles import continuous_spec, discrete_spec, with_references, write_test_bundle

KINDS = ("continuous", "discrete")
Arrays = dict[str, Any]


def row(bundle: Bundle, model: str, generator: np.random.Generator, *, noisy: bool) -> Arrays:
    """Return a request of one row, of which about half the actions are available."""
    agents = bundle.spec.agents if model == TEAM else (bundle.spec.agent(model),)
    inputs: Arrays = {
        "observation": generator.normal(size=(1, sum(a.observation_size for a in agents))).astype(np.float32)
    }
    if noisy:
        noise = NoiseSource(bundle.spec, int(generator.integers(1000))).draw(1)
        inputs["noise"] = np.concatenate([noise[a.name] for a in agents], axis=1)
    if bundle.spec.action_kind == "discrete":
        masks = [generator.integers(0, 2, size=(1, a.action.size), dtype=np.uint8) for a in agents]
        for mask in masks:
            mask[0, generator.integers(mask.size)] = 1
        inputs["action_mask"] = np.concatenate(masks, axis=1)
    return inputs


def wire(inputs: Arrays, batch: int = 1) -> WireTensors:
    return WireTensors(batch, **{name: values.tobytes() for name, values in inputs.items()})


def checked(session: Session, tensors: WireTensors) -> dict[str, bytes]:
    """Answer by the checked path alone."""
    outputs = session.run(session.decode(tensors))
    return {name: tensor.encode(outputs[name]) for name, tensor in session.outputs.items()}


class Watch:
    """A session, with the number of its requests that took the checked path."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session, self.checked = session, 0
        run = session.run

        def count(inputs: Arrays) -> Arrays:
            self.checked += 1
            return run(inputs)

        monkeypatch.setattr(session, "run", count)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_answered_byte_for_byte_as_any_request(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = continuous_spec() if kind == "continuous" else discrete_spec()
    bundle = with_references(write_test_bundle(tmp_path / "bundle", spec))
    generator = np.random.default_rng(0)
    for model in (*bundle.spec.names, TEAM):
        session, other = Session(bundle, model, {}), Session(bundle, model, {})
        watch = Watch(session, monkeypatch)
        for index in range(40):  # with noise and without in turn: nothing is left over from the last step
            tensors = wire(row(bundle, model, generator, noisy=index % 3 == 0))
            assert session.answer(tensors) == checked(other, tensors)
        assert watch.checked == 0
        ours, theirs = session.meter.totals(), other.meter.totals()
        assert (ours.answers, ours.rows) == (theirs.answers, theirs.rows) == (40, 40)
        np.testing.assert_array_equal(ours.divergence, theirs.divergence)
        np.testing.assert_array_equal(ours.exceeded, theirs.exceeded)
        for counted, expected_counts in zip(
            (*ours.ratios, *ours.distances), (*theirs.ratios, *theirs.distances), strict=True
        ):
            assert counted.counts == expected_counts.counts


CONTINUOUS: dict[str, Arrays] = {
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
DISCRETE: dict[str, Arrays] = {
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
def test_both_paths_refuse_the_same_in_the_same_words(
    kind: str, change: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    session = Session(bundle, "agent_0", {})
    inputs = row(bundle, "agent_0", np.random.default_rng(1), noisy=False)
    first = session.answer(wire(inputs))
    refused = wire(inputs | (CONTINUOUS if kind == "continuous" else DISCRETE)[change])
    with pytest.raises(OmcdaError) as expected:
        checked(session, refused)
    assert isinstance(expected.value, (RequestError, RangeError))
    with pytest.raises(type(expected.value)) as raised:
        session.answer(refused)
    assert str(raised.value) == str(expected.value)
    assert session.meter.totals().answers == 1
    assert session.answer(wire(inputs)) == first == checked(session, wire(inputs))  # it has left no trace


def test_more_rows_than_one_take_the_checked_path(
    continuous_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(continuous_bundle, "agent_0", {})
    watch = Watch(session, monkeypatch)
    answer = session.answer(wire({"observation": np.zeros((2, 4), np.float32)}, batch=2))
    assert (watch.checked, len(answer["divergence"])) == (1, 8)


def test_each_agent_of_a_team_needs_an_available_action(discrete_bundle: Bundle) -> None:
    session = Session(discrete_bundle, TEAM, {})  # agent_0 has 3 actions, agent_1 has 4
    inputs: Arrays = {"observation": np.zeros((1, 9), np.float32)}
    inputs["action_mask"] = np.array([[1, 1, 1, 0, 0, 0, 0]], np.uint8)
    with pytest.raises(RequestError, match="action_mask of agent_1: expected at least one available action"):
        session.answer(wire(inputs))
    inputs["action_mask"] = np.array([[0, 1, 0, 0, 0, 0, 1]], np.uint8)
    assert np.frombuffer(session.answer(wire(inputs))["action"], np.int64).tolist() == [1, 3]


@pytest.mark.parametrize("mode", ["observe", "fallback", "blend"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_acts_is_answered_byte_for_byte_as_any_request(
    kind: str, mode: Mode, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check an agent and the team, one agent of which has a guard of its own."""
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    generator = np.random.default_rng(2)
    names = bundle.spec.names
    guards = dict.fromkeys(names, GuardSetting(mode, 1.0 if kind == "continuous" else 0.3))
    guards |= {names[-1]: GuardSetting("fallback", 0.2)} if len(names) > 2 else {}
    for model in (names[0], TEAM):
        session, other = Session(bundle, model, guards), Session(bundle, model, guards)
        watch = Watch(session, monkeypatch)
        acted = 0
        for index in range(200):
            tensors = wire(row(bundle, model, generator, noisy=index % 3 != 0))
            answer = session.answer(tensors)
            assert answer == checked(other, tensors)
            acted += int((np.frombuffer(answer["policy_weight"], np.float32) < 1.0).sum())
        assert watch.checked == 0
        replaceable = 200 * (len(names) if model == TEAM else 1)
        assert 0.1 < acted / replaceable < 0.9 if mode != "observe" else acted == 0 or model == TEAM


def test_numbers_too_large_for_the_plain_guard_take_the_checked_path(
    continuous_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(continuous_bundle, "agent_1", {"agent_1": GuardSetting("blend", 0.1)})
    tensors = wire({"observation": np.ones((1, 5), np.float32)})
    expected = session.answer(tensors)
    assert np.frombuffer(expected["policy_weight"], np.float32)[0] < 1.0
    watch = Watch(session, monkeypatch)
    monkeypatch.setattr("omcda_deploy.serve.guarded_row.largest_weight", lambda *curve: 1.0 / 0.0)
    assert session.answer(tensors) == expected
    assert watch.checked == 1


def test_a_distance_limit_holds_for_single_steps_too(tmp_path: Path) -> None:
    bundle = with_references(write_test_bundle(tmp_path / "bundle", continuous_spec()))
    session = Session(bundle, "agent_1", {"agent_1": GuardSetting(distance_limit=3.0)})
    session.answer(wire({"observation": np.zeros((1, 5), np.float32)}))
    with pytest.raises(RangeError, match="within 3 of the training data"):
        session.answer(wire({"observation": np.full((1, 5), 10.0, np.float32)}))
