"""SMAX takes JaxMARL's own steps, and an episode depends on its seed and its actions alone.

One map is compiled here (all batches share one program); the others are slow: each costs another compilation.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.bundle import read_bundle
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.envs import smax
from omcda_deploy.envs.programs.smax_battles import import_smax, muted
from omcda_deploy.envs.smax import SmaxVector
from omcda_deploy.envs.vector import VectorEnvironment, VectorStep, vectorize
from omcda_deploy.errors import ConfigError, ContractError, UnknownNameError
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.play.collect import collect
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.play.shipped import POLICIES
from omcda_deploy.policy import Decision, Float
from omcda_deploy.spec import TeamSpec
from tests.support.server_process import server_process

pytest.importorskip("jaxmarl")

TASK = "smax/5m_vs_6m"
ALLIES, ENEMIES, STOP, FIRST_ATTACK = 5, 6, 4, 5


@pytest.fixture
def battles() -> Iterator[SmaxVector]:
    with SmaxVector(TASK, 5) as vector:
        yield vector


def masks_of(step: VectorStep) -> NDArray[np.uint8]:
    assert step.action_masks is not None
    return np.stack(list(step.action_masks.values()), axis=1)


def observations_of(step: VectorStep) -> Float:
    return np.stack(list(step.observations.values()), axis=1)


def named(spec: TeamSpec, joint: NDArray[Any]) -> dict[str, NDArray[np.int64]]:
    return {name: joint[:, i] for i, name in enumerate(spec.names)}


def choose(masks: NDArray[np.uint8], t: int, seeds: list[int]) -> NDArray[np.int64]:
    """Available actions [E, N] that depend on time and seed alone; attacks are likely."""
    draws = np.stack([np.random.default_rng([t, seed]).gumbel(size=masks.shape[1:]) for seed in seeds])
    scores = np.where(masks, draws + 0.4 * np.arange(masks.shape[-1]), -np.inf)
    chosen: NDArray[np.int64] = scores.argmax(-1)
    return chosen


def episodes(task: str, seeds: list[int]) -> dict[int, list[list[Any]]]:
    """Play one episode per seed and record all arrays of each step until its end."""
    results: dict[int, list[list[Any]]] = {seed: [] for seed in seeds}
    with SmaxVector(task, len(seeds)) as battles:
        step = battles.reset(dict(enumerate(seeds)))
        active = np.ones(len(seeds), np.bool_)
        for t in range(smax.EPISODE_LIMIT):
            masks = masks_of(step)
            step = battles.step(named(battles.spec, choose(masks, t, seeds)), active)
            fields = (observations_of(step), step.state, masks, step.reward)
            flags = (step.terminated, step.truncated, step.info["won"])
            for row in np.flatnonzero(active):
                results[seeds[row]].append([values[row] for values in fields + flags])
            active &= ~(step.terminated | step.truncated)
            if not active.any():
                break
    return results


@pytest.mark.parametrize(
    ("task", "agents", "observation", "state", "actions"),
    [
        ("smax/5m_vs_6m", 5, 140, 132, 11),
        ("smax/6h_vs_8z", 6, 179, 168, 13),
        ("smax/corridor", 6, 387, 360, 29),
    ],
)
def test_specs_are_jaxmarls(task: str, agents: int, observation: int, state: int, actions: int) -> None:
    spec = registry.team_spec(task)
    assert [agent.observation_size for agent in spec.agents] == [observation] * agents
    assert [agent.action.size for agent in spec.agents] == [actions] * agents
    assert (spec.state_size, spec.action_kind) == (state, "discrete")
    SmaxVector(task, 1)  # registers corridor; compiles nothing
    _, jaxmarl = import_smax()
    battle = jaxmarl.HeuristicEnemySMAX(scenario=jaxmarl.map_name_to_scenario(task.removeprefix("smax/")))
    assert len(battle.agents) == agents
    assert battle.obs_size == observation
    assert battle.state_size == state
    assert battle.action_spaces["ally_0"].n == actions
    assert battle.max_steps == spec.episode_limit
    assert 1.0 / (battle.world_steps_per_env_step * battle.time_per_step) == spec.control_rate
    assert (battle.map_width, battle.map_height) == (smax.MAP_SIZE, smax.MAP_SIZE)


def test_specs_need_no_jax() -> None:
    """Listing tasks imports no jax either, and the error without it names the extra to install."""
    program = f"""
import sys
sys.modules["jax"] = sys.modules["jaxmarl"] = None  # an import of either fails
from omcda_deploy import registry
from omcda_deploy.errors import MissingExtraError
from omcda_deploy.envs.vector import vectorize
assert {TASK!r} in registry.tasks()
assert registry.team_spec({TASK!r}).state_size == 132
for make in (registry.make_environment, lambda task: vectorize(task, 2)):
    try:
        make({TASK!r})
    except MissingExtraError as error:
        print(error)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (
        process.stdout.splitlines() == ["jaxmarl is not installed: run  pip install 'omcda-deploy[smax]'"] * 2
    )


def test_steps_are_jaxmarls_own(battles: SmaxVector) -> None:
    """Compare each step with JaxMARL's unbatched environment, from the same state and with the seed's keys."""
    jax, jaxmarl = import_smax()
    battle = jaxmarl.HeuristicEnemySMAX(scenario=jaxmarl.map_name_to_scenario("5m_vs_6m"))
    seeds, row = [3, 4, 2**32 - 1, 5, 6], 2
    answer = battles.reset(dict(enumerate(seeds)))
    key, subkey = jax.random.split(jax.random.PRNGKey(np.uint32(seeds[row])))
    expected, state = battle.reset(subkey)
    over = 0
    for t in range(smax.EPISODE_LIMIT):
        for i, agent in enumerate(battle.agents):
            np.testing.assert_allclose(observations_of(answer)[row, i], expected[agent], atol=1e-5)
        np.testing.assert_allclose(answer.state[row], expected["world_state"], atol=1e-5)
        available = battle.get_avail_actions(state)
        masks = masks_of(answer)
        np.testing.assert_array_equal(masks[row], [available[agent] for agent in battle.agents])
        if over:
            break
        ours = jax.tree.map(lambda leaf: np.asarray(leaf)[row], battles._carries[0])
        np.testing.assert_array_equal(ours[0], key)
        joint = choose(masks, t, seeds)
        joint[answer.terminated] = STOP
        answer = battles.step(named(battles.spec, joint), ~battles._idle)
        key, subkey = jax.random.split(key)
        # Starts from our state, so that differences in rounding do not add up.
        actions = dict(zip(battle.agents, joint[row], strict=True))
        expected, state, rewards, dones, _ = battle.step_env(subkey, ours[1], actions)
        assert answer.reward[row] == pytest.approx(float(rewards["ally_0"]), abs=1e-6)
        assert (answer.terminated | answer.truncated)[row] == dones["__all__"]
        over = int(dones["__all__"])
    assert over


def test_an_episode_is_its_seed_and_its_actions() -> None:
    """Equal to the last bit for any number of environments, in any row, beside any others."""
    expected = episodes(TASK, [7])[7]
    assert 10 < len(expected) < smax.EPISODE_LIMIT
    assert expected[-1][4]
    for seeds in ([7, 8, 9], [*range(100, 140), 7], [7, *range(200, 231)]):
        for ours, theirs in zip(expected, episodes(TASK, seeds)[7], strict=True):
            for value, other in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(value, other)
    large = episodes(TASK, [7 + 2**32])[7 + 2**32]
    assert not np.array_equal(large[0][1], expected[0][1])


def place(battles: SmaxVector, row: int, health: Mapping[int, float], step: int = 0) -> None:
    """Leave alive only the units of ``health``, in each other's range, all ready to shoot."""
    jax, _ = import_smax()
    key, carried = jax.tree.map(np.array, battles._carries[0])
    units = carried.state
    units.unit_health[row] = 0.0
    for place, (unit, left) in enumerate(health.items()):
        units.unit_health[row, unit] = left
        units.unit_positions[row, unit] = 16.0 + 1.5 * place, 16.0
    units.unit_alive[row] = units.unit_health[row] > 0
    units.unit_weapon_cooldowns[row] = 0.0
    units.step[row] = step
    battles._carries[0] = key, carried


def test_ends_are_told_apart(battles: SmaxVector) -> None:
    battles.reset(dict.fromkeys(range(5), 0))
    last = smax.EPISODE_LIMIT - 1
    ally, enemy = 0, ALLIES
    place(battles, 0, {ally: 45.0, enemy: 3.0}, last)  # a win, in the very last step
    place(battles, 1, {ally: 3.0, enemy: 45.0})  # a defeat
    place(battles, 2, {ally: 45.0, enemy: 45.0}, last)  # a draw at the time limit
    place(battles, 3, {ally: 3.0, enemy: 3.0})  # mutual destruction, which JaxMARL does not count as a win
    place(battles, 4, {ally: 45.0, enemy: 45.0})
    battles._present.action_mask[:5, 0, FIRST_ATTACK] = 1  # a placed unit appears in masks after a step only
    joint = np.full((5, ALLIES), STOP)
    joint[:, 0] = FIRST_ATTACK
    answer = battles.step(named(battles.spec, joint))
    assert answer.terminated.tolist() == [True, True, False, True, False]
    assert answer.truncated.tolist() == [False, False, True, False, False]
    assert answer.info["won"].tolist() == [True, False, False, False, False]
    assert answer.info["won"].tolist() == (answer.reward >= 1.0).tolist()
    full = 45.0 * ENEMIES
    assert answer.reward[0] == pytest.approx(1.0 + 3.0 / full)
    assert answer.reward[3] == pytest.approx(3.0 / full)
    assert 9.0 / full <= answer.reward[4] + 1e-6
    masks = masks_of(answer)
    assert masks[1].tolist() == [[0] * STOP + [1] + [0] * ENEMIES] * ALLIES  # the dead can only stop

    with pytest.raises(ContractError, match="environment 0 is between episodes"):
        battles.step(named(battles.spec, joint))
    joint[4] = STOP
    later = battles.step(named(battles.spec, joint), np.arange(5) == 4)
    for row in range(4):
        np.testing.assert_array_equal(later.state[row], answer.state[row])
        np.testing.assert_array_equal(observations_of(later)[row], observations_of(answer)[row])
    assert later.reward[:4].tolist() == [0.0] * 4
    assert not (later.terminated | later.truncated | later.info["won"])[:4].any()
    assert not np.array_equal(later.state[4], answer.state[4])

    again = battles.reset({1: 9})
    np.testing.assert_array_equal(np.delete(again.state, 1, 0), np.delete(later.state, 1, 0))
    assert again.reward[1] == 0
    battles.step(named(battles.spec, np.full((5, ALLIES), STOP)), np.arange(5) == 1)


def test_what_the_mask_forbids_is_refused(battles: SmaxVector) -> None:
    answer = battles.reset(dict(enumerate(range(5))))
    good = np.full((5, ALLIES), STOP)
    for action, named_as in ((10, "10"), (11, "11"), (-1, "-1")):
        bad = good.copy()
        bad[3, 2] = action  # nobody is in range at the start
        with pytest.raises(
            ContractError,
            match=rf"action of agent_2 in environment 3: .*available \[0, 1, 2, 3, 4\], got {named_as}$",
        ):
            battles.step(named(battles.spec, bad))
    everyone_but_3 = battles.step(
        named(battles.spec, bad), np.arange(5) != 3
    )  # the action of row 3 is ignored
    np.testing.assert_array_equal(everyone_but_3.state[3], answer.state[3])
    with pytest.raises(ContractError, match="agent_0: expected integers, got float64"):
        battles.step(named(battles.spec, good.astype(float)))
    with pytest.raises(ContractError, match="no action for agent_4"):
        battles.step({name: good[:, 0] for name in battles.spec.names[:4]})
    with pytest.raises(ContractError, match="0 to 4, got 5"):
        battles.reset({5: 0})
    with pytest.raises(ContractError, match=r"2\*\*64 - 1, got -1"):
        battles.reset({0: -1})
    np.testing.assert_array_equal(
        battles.reset({}).state, everyone_but_3.state
    )  # a reset of no environment changes nothing


def test_misuse_is_named(battles: SmaxVector) -> None:
    with pytest.raises(ContractError, match="environment 0 is between episodes"):
        battles.step(named(battles.spec, np.full((5, ALLIES), STOP)))
    battles.close()
    with pytest.raises(ContractError, match="closed"):
        battles.reset({0: 0})
    with pytest.raises(UnknownNameError, match="did you mean 'smax/5m_vs_6m'"):
        vectorize("smax/5m_vs_5m", 2)
    with pytest.raises(ConfigError, match="num_envs: expected 1 to 100,000, got 0"):
        SmaxVector(TASK, 0)
    with pytest.raises(ConfigError, match="no option colour: expected render_mode"):
        vectorize(TASK, 2, colour="red")
    with pytest.raises(ConfigError, match="'rgb_array' or None, got 'human'"):
        SmaxVector(TASK, 2, render_mode="human")


def test_a_simulator_that_batches_by_itself_is_asked_to() -> None:
    with vectorize(TASK, 3, workers=2) as vector:
        assert isinstance(vector, SmaxVector)
        assert vector.num_envs == 3
    with vectorize("toy/chain", 3) as single:
        assert isinstance(single, VectorEnvironment)
    with pytest.raises(ConfigError, match="workers: expected 0 to 1,024, got -1"):
        vectorize(TASK, 3, workers=-1)


def test_a_frame_shows_who_is_where() -> None:
    with SmaxVector(TASK, 2, render_mode="rgb_array") as battles:
        state = battles.reset({0: 1, 1: 2}).state[1]
        frame = battles.render(1)
        assert frame.shape == (384, 384, 3)
        for unit in range(ALLIES + ENEMIES):
            x, y = state[10 * unit + 1 : 10 * unit + 3]
            red, _, blue = frame[int(384 - 12 * y), int(12 * x)].tolist()
            assert (blue > red) == (unit < ALLIES)
        assert not np.array_equal(frame, battles.render(0))
    with SmaxVector(TASK, 1) as battles, pytest.raises(ConfigError, match="render_mode='rgb_array'"):
        battles.render(0)


def test_importing_jaxmarl_leaves_the_streams_alone(capsys: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdout, sys.stderr, sys.__stdout__
    with muted():
        print("Submoduled environments not found.")
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # jaxmarl's import does the same
        print("Skipping import.")
    assert (sys.stdout, sys.stderr, sys.__stdout__) == streams
    assert capsys.readouterr().out == ""


class Random:
    """Team policy that draws among the available actions."""

    spec = smax.SPECS[TASK]

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def reset(self) -> None: ...

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        assert action_masks is not None
        return {
            name: Decision(
                np.where(mask, self._generator.random(mask.shape), -1.0).argmax(-1),
                np.zeros(len(mask), np.float32),
            )
            for name, mask in action_masks.items()
        }


def test_it_is_evaluated_and_recorded(tmp_path: Path) -> None:
    result = evaluate(Random(), TASK, episodes=3, num_envs=2)
    assert result.won is not None
    assert result.won.tolist() == [False] * 3
    assert (result.returns > 0).all()
    assert result.versions.keys() >= {"jax", "jaxmarl"}
    report = collect(
        TASK, Random(), tmp_path / "d.hdf5", transitions=60, seed=0, behavior="random", num_envs=3
    )
    dataset = registry.read_dataset(tmp_path / "d.hdf5")
    assert dataset.spec.contract_hash == Random.spec.contract_hash
    assert len(dataset.transitions) == report["transitions"] >= 60
    assert dataset.action_masks is not None
    chosen = np.take_along_axis(dataset.action_masks, dataset.actions[..., None], -1)[dataset.transitions]
    assert chosen.all()


def test_a_served_team_plays_as_the_local_one(tmp_path: Path) -> None:
    """Real policies behind real servers play the same battles to the last digit, with masks on the wire."""
    bundle = POLICIES / TASK / "medium"
    settings: dict[str, Any] = {"episodes": 9, "seed": 5, "num_envs": 6}
    with server_process(bundle, *read_bundle(bundle).spec.names) as server:
        for stream, temperature in ((False, 0.0), (True, 0.5)):
            local = evaluate(LocalTeam(bundle), TASK, temperature=temperature, **settings)
            with RemoteTeam([server.endpoint], stream=stream) as team:
                served = evaluate(team, TASK, temperature=temperature, **settings)
            np.testing.assert_array_equal(served.returns, local.returns)
            np.testing.assert_array_equal(served.lengths, local.lengths)
            assert served.won is not None
            assert local.won is not None
            np.testing.assert_array_equal(served.won, local.won)
            assert served.to_json()["divergence"] == local.to_json()["divergence"]


def test_a_hundred_battles_are_those_of_each_alone() -> None:
    team = JointTeam(POLICIES / TASK / "medium")
    together, apart = (evaluate(team, TASK, episodes=100, num_envs=count) for count in (100, 7))
    np.testing.assert_array_equal(together.returns, apart.returns)
    np.testing.assert_array_equal(together.lengths, apart.lengths)


@pytest.mark.slow  # compiles another map
@pytest.mark.parametrize("task", ["smax/6h_vs_8z", "smax/corridor"])
def test_other_maps(task: str) -> None:
    expected = episodes(task, [7])[7]
    for ours, theirs in zip(expected, episodes(task, [*range(100, 140), 7])[7], strict=True):
        for value, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(value, other)
    with vectorize(task, 2) as battles:
        answer = battles.reset({0: 0, 1: 1})
    units = answer.state[0, : battles.spec.state_size // 12 * 10].reshape(-1, 10)
    kinds = units[:, 4:].argmax(-1).tolist()
    zealot, zergling, hydralisk = 3, 4, 5
    assert kinds == ([hydralisk] * 6 + [zealot] * 8 if "6h" in task else [zealot] * 6 + [zergling] * 24)
