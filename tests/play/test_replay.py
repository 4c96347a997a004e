"""Replay against episodes whose every row says which episode and step it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.bundle import read_bundle
from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import ConfigError, ContractError, DatasetError
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.play import replay as module
from omcda_deploy.play import sending
from omcda_deploy.play.collect import collect
from omcda_deploy.play.replay import replay
from omcda_deploy.play.shipped import POLICIES
from omcda_deploy.policy import Decision
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

LENGTHS = (4, 7, 2, 5)
SPEC = TeamSpec(
    task="stub/recorded",
    agents=(
        AgentSpec("left", 2, ActionSpec("continuous", 2)),
        AgentSpec("right", 3, ActionSpec("continuous", 1)),
    ),
    state_size=5,
    control_rate=10.0,
)
DISCRETE = replace(
    SPEC, agents=tuple(AgentSpec(a.name, a.observation_size, ActionSpec("discrete", 4)) for a in SPEC.agents)
)


def recorded(
    spec: TeamSpec = SPEC, lengths: tuple[int, ...] = LENGTHS, actions: NDArray[Any] | None = None
) -> Dataset:
    """Observations are (episode, step, 0…); every recorded action is 0 unless ``actions`` [R, N, A] are given."""
    lengths_ = np.array(lengths, np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths_ + 1)[:-1]]).astype(np.int64)
    rows = int((lengths_ + 1).sum())
    observations = np.zeros((rows, len(spec.agents), spec.observation_size), np.float32)
    for episode, (start, length) in enumerate(zip(starts, lengths_, strict=True)):
        observations[start : start + length + 1, :, 0] = episode
        observations[start : start + length + 1, :, 1] = np.arange(length + 1)[:, None]
    if actions is None:
        actions = np.zeros((rows, len(spec.agents), spec.action_size), np.float32)
    transitions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths_, strict=True)])
    return Dataset(
        spec=spec,
        observations=observations,
        states=np.zeros((rows, spec.state_size), np.float32),
        actions=actions,
        rewards=np.zeros(rows, np.float32),
        transitions=transitions,
        terminal=np.zeros(len(transitions), np.bool_),
        timeout=np.zeros(len(transitions), np.bool_),
        episode_start=starts,
        episode_length=lengths_,
        episode_returns=np.zeros(len(lengths_)),
        episode_seeds=None,
        episode_behaviors=None,
        behaviors=(),
        metadata={},
        digest="d1ce",
    )


class StubTeam:
    """Acts ``offset`` in every entry; its divergence is the step that it sees."""

    def __init__(self, spec: TeamSpec = SPEC, offset: float = 0.25) -> None:
        self.spec, self.offset = spec, offset
        self.seen: list[dict[str, NDArray[Any]]] = []

    def reset(self) -> None:
        pass

    def act(
        self, observations: Mapping[str, Any], *, noise: Any = None, action_masks: Any = None
    ) -> dict[str, Decision]:
        self.seen.append({name: np.array(rows) for name, rows in observations.items()})
        decisions = {}
        for agent in self.spec.agents:
            rows = observations[agent.name]
            shape = (len(rows), agent.action.size)
            action: NDArray[Any] = np.full(shape, self.offset, np.float32)
            if agent.action.kind == "discrete":
                action = np.full(len(rows), int(self.offset), np.int64)
            decisions[agent.name] = Decision(
                action, rows[:, 1], {"mean": np.full(shape, self.offset, np.float32)}
            )
        return decisions


class Clock:
    """Time that passes only while somebody sleeps or a team thinks."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sending, "perf_counter", clock)
    monkeypatch.setattr(sending, "sleep", clock.sleep)
    return clock


class ThinkingTeam(StubTeam):
    """Takes the seconds of ``times`` for one step after another."""

    def __init__(self, clock: Clock, times: list[float]) -> None:
        super().__init__()
        self.clock, self.times, self.asked_at = clock, list(times), list[float]()

    def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
        self.asked_at.append(self.clock.time)
        self.clock.time += self.times[len(self.asked_at) - 1]
        return super().act(observations, **rest)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9])
def test_every_recorded_step_is_sent_once_and_batches_are_constant(batch: int) -> None:
    team = StubTeam()
    result = replay(team, recorded(), episodes=10, batch=batch)
    assert result.episodes == (0, 1, 2, 3)
    assert result.steps == sum(LENGTHS)
    assert {len(seen["left"]) for seen in team.seen} == {min(batch, 4)}
    # Mean, p99 and curve are those of the recorded steps alone, whatever waited beside them.
    steps = np.concatenate([np.arange(n) for n in LENGTHS])
    assert result.divergence["left"].mean == pytest.approx(steps.mean())
    assert result.divergence["right"].p99 == pytest.approx(np.percentile(steps, 99))
    assert result.divergence["left"].by_step.tolist() == list(range(max(LENGTHS)))
    assert all(seen["left"].shape[1] == 2 and seen["right"].shape[1] == 3 for seen in team.seen)


def test_single_file_replay_sends_the_episodes_in_order() -> None:
    team = StubTeam()
    replay(team, recorded())
    sent = [(int(seen["left"][0, 0]), int(seen["left"][0, 1])) for seen in team.seen]
    assert sent == [(episode, step) for episode, length in enumerate(LENGTHS) for step in range(length)]


def test_a_seeded_draw_without_replacement() -> None:
    dataset = recorded(lengths=(2,) * 50)
    first = replay(StubTeam(), dataset, episodes=8, seed=1)
    again = replay(StubTeam(), dataset, episodes=8, seed=1)
    other = replay(StubTeam(), dataset, episodes=8, seed=2)
    assert len(set(first.episodes)) == 8
    assert first.episodes == again.episodes != other.episodes


def test_agreement_of_continuous_actions() -> None:
    dataset = recorded()
    dataset.actions[:, 0, 0], dataset.actions[:, 0, 1] = 0.25, -0.75  # left: off by 0 and 1
    dataset.actions[:, 1, 0] = 0.5  # right: off by 0.25
    dataset.actions[:, 1, 1] = 99.0  # padding that must not count
    final = dataset.episode_start + dataset.episode_length
    dataset.actions[final] = 77.0  # the action after the end means nothing
    result = replay(StubTeam(), dataset, batch=3)
    assert result.agreement == {"left": pytest.approx(0.5), "right": pytest.approx(0.25)}
    assert result.to_json()["agreement"]["measure"] == "mean |a - a_recorded|"


def test_agreement_of_discrete_actions() -> None:
    rows = sum(LENGTHS) + len(LENGTHS)
    choices = np.full((rows, 2), 2, np.int64)
    choices[:7, 1] = 0  # right: the first episode and, of the second, steps 0 and 1
    dataset = recorded(DISCRETE, actions=choices)
    result = replay(StubTeam(DISCRETE, offset=2), dataset, batch=2)
    assert result.agreement == {"left": 1.0, "right": pytest.approx(1 - 6 / sum(LENGTHS))}
    assert result.to_json()["agreement"]["measure"] == "share of equal actions"


def test_a_miss_flat_out_is_a_slow_answer(clock: Clock) -> None:
    times = [0.02, 0.09, 0.11, 0.02]
    team = ThinkingTeam(clock, times)
    result = replay(team, recorded(lengths=(4,)))
    assert result.rate == SPEC.control_rate
    assert result.misses == 1
    assert result.miss_share == 0.25
    assert result.step_latency.seconds == pytest.approx(times)
    assert result.to_json()["deadline"] == {
        "rate_hz": 10.0,
        "deadline_ms": 100.0,
        "paced": False,
        "misses": 1,
        "miss_share": 0.25,
    }
    assert replay(ThinkingTeam(clock, times), recorded(lengths=(4,)), rate=40.0).misses == 2


def test_a_miss_in_real_time_is_an_answer_after_the_next_tick(clock: Clock) -> None:
    times = [0.02, 0.25, 0.02, 0.04, 0.01, 0.02]
    team = ThinkingTeam(clock, times)
    result = replay(team, recorded(lengths=(6,)), paced=True)
    # Ticks 0, 0.1 … 0.5. Step 1 stalls until 0.35; step 2, due at 0.3, is answered at 0.37, and step 3, due at
    # 0.4, at 0.41: three misses for one stall. Step 4 is back in time.
    assert [t - 100.0 for t in team.asked_at] == pytest.approx([0.0, 0.1, 0.35, 0.37, 0.41, 0.5])
    assert result.misses == 3
    assert result.step_latency.seconds == pytest.approx(times)


def test_pacing_holds_the_rate_for_each_episode(clock: Clock) -> None:
    team = ThinkingTeam(clock, [0.01] * 6)
    result = replay(team, recorded(lengths=(3, 3)), rate=20.0, paced=True)
    assert result.misses == 0
    gaps = np.diff(team.asked_at)
    assert gaps[[0, 1, 3, 4]] == pytest.approx(0.05)


def test_the_local_bundle_is_asked_off_the_clock(clock: Clock) -> None:
    local = ThinkingTeam(clock, [9.0] * 18)
    result = replay(ThinkingTeam(clock, [0.01] * 18), recorded(), local=local, paced=True)
    assert result.misses == 0
    assert result.parity is not None
    assert result.parity.exact
    assert len(local.asked_at) == 18


@pytest.mark.parametrize("what", ["action", "divergence", "parameters"])
def test_parity_is_the_largest_difference(what: str) -> None:
    class Other(StubTeam):
        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            answers = super().act(observations, **rest)
            d = answers["right"]
            late = (observations["right"][:, 1] == 6).astype(np.float32)  # one step of the longest episode
            shift = 0.5 * late
            answers["right"] = Decision(
                d.action + shift[:, None] if what == "action" else d.action,
                d.divergence + shift if what == "divergence" else d.divergence,
                {"mean": d.parameters["mean"] - shift[:, None]} if what == "parameters" else d.parameters,
            )
            return answers

    parity = replay(StubTeam(), recorded(), local=Other()).parity
    assert parity is not None
    assert not parity.exact
    differences = {
        "action": parity.action,
        "divergence": parity.divergence,
        "parameters": parity.parameters,
    }
    assert differences == {**dict.fromkeys(differences, 0.0), what: 0.5}


def test_parity_of_values_that_do_not_subtract() -> None:
    zero, logits = np.zeros(1, np.float32), {"logits": np.array([[-np.inf, 0.0]])}
    masked = Decision(zero, zero, logits)
    broken = Decision(zero, np.full(1, np.nan, np.float32), logits)
    silent = Decision(zero, zero)
    assert set(module._differences(masked, masked).values()) == {0.0}
    assert module._differences(masked, broken)["divergence"] == np.inf
    assert module._differences(masked, silent)["parameters"] == np.inf


def test_without_a_local_bundle_there_is_no_parity() -> None:
    data = replay(StubTeam(), recorded()).to_json()
    assert data["parity"] is None
    json.dumps(data, allow_nan=False)
    assert data["dataset_digest"] == "d1ce"


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_a_bundle_agrees_with_itself_exactly(
    tmp_path: Path, kind: str, batch: int, temperature: float
) -> None:
    pytest.importorskip("onnx")
    from tests.support.bundles import write_test_bundle

    spec = SPEC if kind == "continuous" else DISCRETE
    actions = None if kind == "continuous" else np.zeros((sum(LENGTHS) + len(LENGTHS), 2), np.int64)
    bundle = write_test_bundle(tmp_path / "bundle", spec)
    other = write_test_bundle(tmp_path / "other", spec, seed=1)
    dataset = recorded(spec, actions=actions)

    def parity(team: Any) -> Any:
        result = replay(team, dataset, batch=batch, temperature=temperature, local=LocalTeam(bundle))
        assert result.team.bundle_digest == team.bundle.digest
        assert result.parity is not None
        assert result.parity.local_digest == bundle.digest
        return result.parity

    assert parity(LocalTeam(bundle)).exact
    assert parity(JointTeam(bundle)).parameters < 1e-4
    assert parity(LocalTeam(other)).parameters > 1e-2


def test_contracts_are_compared_before_the_first_step() -> None:
    slower = replace(SPEC, control_rate=5.0)
    team = StubTeam(slower)
    with pytest.raises(ContractError, match="control_rate"):
        replay(team, recorded())
    assert not team.seen
    with pytest.raises(ContractError, match="the local bundle"):
        replay(StubTeam(), recorded(), local=StubTeam(slower))


@pytest.mark.parametrize(
    "setting", [{"episodes": 0}, {"batch": 0}, {"seed": -1}, {"rate": 0.0}, {"rate": float("nan")}]
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: expected"):
        replay(StubTeam(), recorded(), **setting)


def test_a_dataset_without_a_closed_episode() -> None:
    dataset = recorded(lengths=(3,))
    empty = np.empty(0, np.int64)
    with pytest.raises(DatasetError, match="no closed episode"):
        replay(StubTeam(), replace(dataset, episode_start=empty, episode_length=empty))


def test_progress_reaches_its_total() -> None:
    calls: list[tuple[int, int]] = []
    replay(StubTeam(), recorded(), batch=2, progress=lambda *c: calls.append(c))
    total = max(LENGTHS[:2]) + max(LENGTHS[2:])
    assert calls == [(n + 1, total) for n in range(total)]


def test_needs_no_simulator() -> None:
    assert importlib.util.find_spec("omcda_deploy.envs")
    code = (
        "import sys, omcda_deploy.play.replay; "
        "print([m for m in sys.modules if m.startswith('omcda_deploy.envs')"
        " or m in ('mujoco', 'gymnasium', 'torch', 'grpc')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


SIMULATORS = ("mujoco", "gymnasium", "gymnasium_robotics", "jax", "jaxmarl", "torch")


@pytest.mark.parametrize(("task", "tier"), [("smax/5m_vs_6m", "medium"), ("mamujoco/hopper-3x1", "medium")])
def test_recorded_episodes_are_replayed_without_any_simulator(tmp_path: Path, task: str, tier: str) -> None:
    """Real episodes through a shipped policy by the command line, in a process that has no simulator."""
    pytest.importorskip("jaxmarl" if task.startswith("smax") else "mujoco")
    policy, file = POLICIES / task / tier, tmp_path / "episodes.hdf5"
    collect(
        task,
        JointTeam(policy),
        file,
        transitions=120,
        seed=0,
        behavior="b",
        num_envs=4,
        workers=0,
        temperature=0.0,
    )
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({SIMULATORS!r}))\n"
        "from omcda_deploy import cli\nsys.argv = ['omcda-deploy', *sys.argv[1:]]\ncli.main()"
    )
    out = tmp_path / "replay.json"
    command = ["replay", str(file), "--bundle", str(policy), "--episodes", "2", "--json", str(out)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    agreement = json.loads(out.read_text())["agreement"]
    recorded_by_it = agreement["agents"].values()
    assert len(recorded_by_it) == len(read_bundle(policy).spec.agents)
    # Recorded by the joint graph, deterministically: the same choices, or actions equal up to rounding.
    assert all(value == 1.0 if task.startswith("smax") else value < 1e-5 for value in recorded_by_it)


def test_what_a_fallback_answered_is_compared_with_nothing() -> None:
    """``left`` is missed at every odd step, where its action is far from all that is compared."""

    class Missing(StubTeam):
        fallback = "hold"

        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            decisions = super().act(observations, **rest)
            if len(self.seen) % 2 == 0:
                return decisions
            rows = len(observations["left"])
            far = Decision(np.full((rows, 2), -1.0), np.full(rows, np.nan, np.float32), fallback=True)
            return decisions | {"left": far}

    dataset = recorded()
    result = replay(Missing(), dataset, episodes=4, local=StubTeam())
    calls = sum(LENGTHS)
    assert result.fallback_steps == {"left": calls // 2, "right": 0}
    assert result.agreement == {"left": pytest.approx(0.25), "right": pytest.approx(0.25)}
    assert result.parity is not None
    assert result.parity.exact
    assert result.divergence["right"].mean == pytest.approx(
        np.concatenate([np.arange(n) for n in LENGTHS]).mean()
    )
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["fallback"] == {"by": "hold", "steps": {"left": calls // 2, "right": 0}}


def test_a_replay_that_nobody_but_the_fallback_answered_shows_no_parity() -> None:
    class Gone(StubTeam):
        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            return {
                name: replace(decision, divergence=decision.divergence * np.nan, fallback=True)
                for name, decision in super().act(observations, **rest).items()
            }

    result = replay(Gone(), recorded(), episodes=1, local=StubTeam())
    assert result.parity is not None
    assert not result.parity.exact
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["parity"]["action"] is None
    assert data["agreement"]["agents"] == {"left": None, "right": None}
