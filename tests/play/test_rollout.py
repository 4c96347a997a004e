"""Rounds of episodes against environments whose every number follows from the seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.datasets import Episode
from omcda_deploy.envs import toy
from omcda_deploy.envs.vector import BatchedEnvironment, VectorStep, vectorize
from omcda_deploy.errors import ContractError, SimulatorError
from omcda_deploy.local import JointTeam
from omcda_deploy.play import rollout as module
from omcda_deploy.play.episodes import PlayedEpisode, PlayedStep
from omcda_deploy.play.recording import EpisodeRecorder
from omcda_deploy.play.rollout import EpisodeBatch, Plan, episode_seed, rollout, rollouts
from omcda_deploy.play.scripted import RandomTeam
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.registry import team_spec
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from tests.support.bundles import write_test_bundle

SPEC = TeamSpec(
    task="stub/lossy",
    agents=(
        AgentSpec("left", 2, ActionSpec("continuous", 1)),
        AgentSpec("right", 1, ActionSpec("continuous", 2)),
    ),
    state_size=3,
    control_rate=20.0,
    episode_limit=9,
)


def length_of(seed: int) -> int:
    return seed % 6 + 2


def lost(seed: int) -> bool:
    return seed % 5 == 0


class LossyEnvironment:
    """Loses the episodes of every fifth seed. Shows (seed, step, environment), and pays 0.1 times the step."""

    def __init__(self, num_envs: int) -> None:
        self.spec, self.num_envs = SPEC, num_envs
        self.stepped: list[tuple[NDArray[np.bool_], dict[str, NDArray[Any]]]] = []
        self._seeds = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        for index, seed in seeds.items():
            self._seeds[index], self._steps[index] = seed, 0
        return self._answer(np.zeros(self.num_envs, np.bool_))

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        assert active is not None
        self.stepped.append((active.copy(), dict(actions)))
        self._steps[active] += 1
        return self._answer(active)

    def _answer(self, active: NDArray[np.bool_]) -> VectorStep:
        ended = active & (self._steps == [length_of(int(seed)) for seed in self._seeds])
        rows = np.stack([self._seeds % 1000, self._steps, np.arange(self.num_envs)], axis=1).astype(
            np.float32
        )
        discarded = ended & np.array([lost(int(seed)) for seed in self._seeds])
        terminated = ended & ~discarded & (self._seeds % 2 == 0)
        return VectorStep(
            observations={"left": rows[:, :2], "right": rows[:, 1:2]},
            state=rows,
            action_masks=None,
            reward=np.where(discarded, 0.0, 0.1 * self._steps),
            terminated=terminated,
            truncated=ended & ~terminated,
            info={"discarded": discarded},
        )

    def render(self, index: int) -> NDArray[np.uint8]:
        return np.zeros((1, 1, 3), np.uint8)

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class StubTeam:
    """``left`` repeats its noise and diverges by the step; ``right`` has one of two entries at the bound."""

    spec = SPEC

    def __init__(self) -> None:
        self.resets = 0
        self.batches: list[int] = []

    def reset(self) -> None:
        self.resets += 1

    def act(
        self, observations: Mapping[str, Any], *, noise: Any = None, action_masks: Any = None
    ) -> dict[str, Decision]:
        count = len(observations["left"])
        self.batches.append(count)
        action = np.zeros((count, 1), np.float32) if noise is None else np.tanh(noise["left"])
        bound = np.tile(np.array([1.0, 0.5], np.float32), (count, 1))
        return {
            "left": Decision(action, observations["left"][:, 1]),
            "right": Decision(bound, np.full(count, 0.5, np.float32)),
        }


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_rounds_are_played_until_enough_episodes_count(num_envs: int) -> None:
    team, environment = StubTeam(), LossyEnvironment(num_envs)
    steps: list[PlayedStep] = []
    episodes = list(rollout(team, environment, episodes=7, seed=4, on_step=steps.append))
    assert [episode.seed for episode in episodes] == [episode_seed(4, k) for k in range(len(episodes))]
    assert [episode.discarded for episode in episodes] == [lost(episode.seed) for episode in episodes]
    assert sum(not episode.discarded for episode in episodes) == 7
    assert any(episode.discarded for episode in episodes)
    assert team.resets == episodes[-1].round + 1
    assert set(team.batches) == {num_envs}
    assert sum(int(step.active.sum()) for step in steps) == sum(len(episode) for episode in episodes)
    for episode in episodes:
        length = length_of(episode.seed)
        paid = 0.1 * np.arange(1, length + 1)
        paid[-1] *= not episode.discarded
        np.testing.assert_array_equal(episode.rewards, paid)
        np.testing.assert_array_equal(episode.divergence[:, 0], np.arange(length))
        np.testing.assert_array_equal(episode.divergence[:, 1], np.full(length, 0.5))
        assert episode.saturated.tolist() == [0, length]
        assert episode.terminated == (episode.seed % 2 == 0 and not episode.discarded)
        assert episode.outcomes == {}


def test_a_return_is_summed_step_by_step() -> None:
    rewards = np.random.default_rng(0).normal(size=1000)
    total = 0.0
    for reward in rewards:
        total += reward
    episode = PlayedEpisode(0, 0, rewards, np.zeros((1000, 1)), np.zeros(1, np.int64), True, {}, False)
    assert episode.episode_return == total != float(rewards.sum())


def test_noise_is_drawn_for_the_whole_batch() -> None:
    environment = LossyEnvironment(3)
    list(rollout(StubTeam(), environment, episodes=5, seed=2, temperature=1.0))
    source = NoiseSource(SPEC, 2)
    for _, actions in environment.stepped:
        np.testing.assert_array_equal(actions["left"], np.tanh(source.draw(3)["left"]))


def test_progress_counts_episodes_and_ends_at_its_total() -> None:
    """An episode under way counts as the share of the limit that it has lasted, a lost one as one more to play."""
    calls: list[tuple[float, float]] = []
    episodes = list(
        rollout(
            StubTeam(), LossyEnvironment(3), episodes=5, seed=4, progress=lambda *call: calls.append(call)
        )
    )
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    np.testing.assert_allclose(calls[0], (3 / SPEC.episode_limit, 5))
    assert sum(episode.discarded for episode in episodes) > 0
    assert calls[-1] == (len(episodes), len(episodes))
    first = [episode for episode in episodes if episode.round == 0]
    middle = max(len(episode) for episode in first)  # steps of the round
    assert calls[middle - 1] == (len(first), 5)


def test_a_simulator_that_loses_everything_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.play.test_rollout.lost", lambda seed: True)
    monkeypatch.setattr(module, "DISCARDED_IN_A_ROW", 4)
    with pytest.raises(SimulatorError, match="lost 4 episodes in a row"):
        list(rollout(StubTeam(), LossyEnvironment(3), episodes=5))


def test_an_episode_beyond_its_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.play.test_rollout.length_of", lambda seed: 10)
    with pytest.raises(ContractError, match="environment 0 did not end within 9 steps"):
        list(rollout(StubTeam(), LossyEnvironment(3), episodes=3))


def test_a_batch_steps_only_what_was_started_and_not_stopped() -> None:
    environment = LossyEnvironment(4)
    batch = EpisodeBatch(environment)
    with pytest.raises(ContractError, match="start some first"):
        batch.step(StubTeam())
    batch.start({0: 11, 2: 13, 3: 17})
    batch.step(StubTeam())
    batch.stop([2])
    step = batch.step(StubTeam())
    assert step.active.tolist() == [True, False, False, True]
    assert step.age[[0, 3]].tolist() == [2, 2]
    batch.start({2: 21})
    step = batch.step(StubTeam())
    assert step.age[[0, 2, 3]].tolist() == [3, 1, 3]
    assert dict(step.seeds) == {0: 11, 2: 21, 3: 17}


def record(environment: BatchedEnvironment, team: Any, count: int) -> list[tuple[PlayedEpisode, Episode]]:
    """Episodes that count, as a rollout yields them and as the recorder keeps them."""
    recorder = EpisodeRecorder(environment.spec, environment.num_envs)
    by_seed: dict[int, Episode] = {}

    def keep(step: PlayedStep) -> None:
        by_seed.update({step.seeds[index]: episode for index, episode in recorder.add(step).items()})

    played = rollout(team, environment, episodes=count, seed=1, temperature=1.0, on_step=keep)
    counted = [episode for episode in played if not episode.discarded]
    assert by_seed.keys() == {episode.seed for episode in counted}
    return [(episode, by_seed[episode.seed]) for episode in counted]


def test_the_recorder_keeps_every_row_of_the_episodes_that_count() -> None:
    episodes = record(LossyEnvironment(3), StubTeam(), 6)
    assert len(episodes) == 6
    for played, episode in episodes:
        steps = np.arange(len(played) + 1)
        np.testing.assert_array_equal(episode.observations[:, 0, 0], np.full(len(steps), played.seed % 1000))
        np.testing.assert_array_equal(episode.observations[:, 0, 1], steps)
        np.testing.assert_array_equal(episode.observations[:, 1, 0], steps)
        np.testing.assert_array_equal(
            episode.observations[:, 1, 1], 0 * steps
        )  # padding of the shorter vector
        np.testing.assert_array_equal(episode.states[:, 1], steps)
        np.testing.assert_array_equal(episode.rewards, played.rewards)
        np.testing.assert_array_equal(episode.actions[:, 1], np.tile([1.0, 0.5], (len(played), 1)))
        assert (episode.timeout, episode.seed) == (not played.terminated, played.seed)
        assert episode.action_masks is None


def test_the_recorder_keeps_masks_and_choices_of_a_game() -> None:
    task = "toy/masked"
    with vectorize(task, 3) as environment:
        episodes = record(environment, toy.behavior_team(task), 5)
        spec = environment.spec
    for played, episode in episodes:
        masks = episode.action_masks
        assert masks is not None
        assert masks.shape == (len(played) + 1, len(spec.agents), spec.action_size)
        assert np.take_along_axis(masks[:-1], episode.actions[..., None], axis=-1).all()
        assert episode.undiscounted_return == pytest.approx(played.episode_return, abs=1e-12)
    assert len({tuple(episode.actions[:, 0].tolist()) for _, episode in episodes}) > 1


@pytest.mark.parametrize("game", [False, True])
def test_a_team_cannot_change_what_is_recorded(game: bool) -> None:
    """All that it sees refuses to be written to, in one batch or as the rows of a plan."""
    seen: list[NDArray[Any]] = []

    class Writing(StubTeam):
        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            masks = rest["action_masks"] or {}
            seen.extend([*observations.values(), *masks.values()])
            for values in (*observations.values(), *masks.values()):
                with pytest.raises(ValueError, match="read-only"):
                    values[:] = 1
            return act(observations, **rest)

    with vectorize("toy/masked", 2) if game else LossyEnvironment(2) as environment:
        team = Writing()
        team.spec = environment.spec
        act: Callable[..., dict[str, Decision]] = (
            RandomTeam(environment.spec).act if game else super(Writing, team).act
        )
        noise = NoiseSource(environment.spec, 0)
        batch = EpisodeBatch(environment)
        batch.start({0: 1, 1: 2})
        step = batch.step(team, noise.draw(2))
        assert all(values.flags.writeable for values in step.previous.observations.values())
        for _ in rollouts(team, environment, [Plan(1, 1, 0, 1.0), Plan(1, 1, 1, 1.0)]):
            break
    assert {len(values) for values in seen} == {1, 2}


def test_an_unplayable_answer_is_refused_before_the_environment_is_stepped() -> None:
    class Broken(StubTeam):
        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            decisions = super().act(observations, **rest)
            return {**decisions, "right": replace(decisions["right"], action=np.zeros((1, 2), np.float32))}

    environment = LossyEnvironment(2)
    with pytest.raises(ContractError, match=r"right answered with an action of shape \[1, 2\]"):
        list(rollout(Broken(), environment, episodes=2))
    assert not environment.stepped


# -- several plans at once --------------------------------------------------------------------------------------

PLANS = (Plan(7, 3, 4, 0.0), Plan(7, 3, 4, 0.5), Plan(4, 4, 9, 1.0), Plan(1, 1, 2, 0.25), Plan(7, 2, 4, 1.0))


def alike(one: PlayedEpisode, other: PlayedEpisode) -> bool:
    """Equal to the last bit."""
    arrays = ("rewards", "divergence", "saturated")
    values = ("seed", "round", "terminated", "outcomes", "discarded")
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in arrays) and all(
        getattr(one, name) == getattr(other, name) for name in values
    )


def test_plans_at_once_are_the_plans_alone() -> None:
    """Episodes of unequal length, some of them lost, so that rounds of the plans begin at different steps."""

    class Noisy(StubTeam):
        """Its divergence shows the noise; its answers are asked for with one batch size per plan."""

        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            decisions = super().act(observations, **rest)
            noise = rest["noise"]
            shown = np.zeros(len(observations["left"]), np.float32) if noise is None else noise["left"][:, 0]
            return {**decisions, "left": replace(decisions["left"], divergence=shown)}

    team = Noisy()
    environment = LossyEnvironment(sum(plan.num_envs for plan in PLANS))
    together = list(rollouts(team, environment, PLANS))
    assert set(team.batches) == {plan.num_envs for plan in PLANS}
    for index, plan in enumerate(PLANS):
        alone = list(
            rollout(
                Noisy(),
                LossyEnvironment(plan.num_envs),
                episodes=plan.episodes,
                seed=plan.seed,
                temperature=plan.temperature,
            )
        )
        ours = [episode for k, episode in together if k == index]
        assert len(ours) == len(alone)
        assert all(alike(one, other) for one, other in zip(ours, alone, strict=True))
        assert sum(not episode.discarded for episode in ours) == plan.episodes
    shown = [bool(episode.divergence[:, 0].any()) for k, episode in together if k < 2]
    assert shown == [k == 1 for k, _ in together if k < 2]  # T 0 has no noise
    stepped = np.sum([active for active, _ in environment.stepped], axis=0)
    assert stepped.sum() == sum(len(episode) for _, episode in together)


@pytest.mark.parametrize("task", ["toy/chain-mixed", "mamujoco/hopper-3x1"])
def test_temperatures_at_once_are_the_temperatures_alone_on_a_simulator(tmp_path: Path, task: str) -> None:
    """With real graphs, in batches whose matrix products would be summed in another order if they were joined."""
    team = JointTeam(write_test_bundle(tmp_path / "bundle", team_spec(task)))
    plans = [Plan(3, 3, 5, temperature) for temperature in (0.0, 0.5, 1.0)] + [Plan(2, 1, 8, 0.5)]
    with vectorize(task, sum(plan.num_envs for plan in plans)) as environment:
        together = list(rollouts(team, environment, plans))
    returns = set()
    for index, plan in enumerate(plans):
        with vectorize(task, plan.num_envs) as environment:
            alone = rollouts(team, environment, [plan])
            ours = [episode for k, episode in together if k == index]
            assert all(alike(one, other) for one, (_, other) in zip(ours, alone, strict=True))
        returns.add(tuple(episode.episode_return for episode in ours))
    assert len(returns) == len(plans)


def test_progress_of_several_plans_counts_all_their_episodes() -> None:
    calls: list[tuple[float, float]] = []
    environment = LossyEnvironment(sum(plan.num_envs for plan in PLANS))
    episodes = list(rollouts(StubTeam(), environment, PLANS, progress=lambda *call: calls.append(call)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[0][1] == sum(plan.episodes for plan in PLANS)
    assert calls[-1] == (len(episodes), len(episodes))
    assert all(done <= total for done, total in calls)


def test_plans_that_do_not_fill_the_environments_are_refused() -> None:
    with pytest.raises(ContractError, match="expected 3 environments for 1 plans, got 4"):
        list(rollouts(StubTeam(), LossyEnvironment(4), [Plan(3, 3)]))
