"""Names of the numbers in observations and actions, against what the simulators themselves give by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.cli import app
from omcda_deploy.entries import AgentEntries, Entry, entry_rows
from omcda_deploy.envs import mamujoco, mamujoco_khop, smax, toy
from omcda_deploy.errors import PluginError

AXES = "xyz"
QUATERNION = "wxyz"
INERTIA = ("xx", "yy", "zz", "xy", "xz", "yz")


def number_of(data: Any, entry: Entry, limit: float) -> float:
    """The number that an entry names, looked up in MuJoCo's data by the names of joint and body."""
    quantity, _, axis = entry.quantity.rpartition(" ")
    model = data.model
    joints = {model.joint(i).name: i for i in range(model.njnt)}
    place = AXES.find(axis) if quantity else -1
    if entry.of in joints:
        joint = data.joint(entry.of)
        if entry.quantity in ("angle", "position"):
            return float(joint.qpos[0])
        if entry.quantity in ("angular velocity", "velocity"):
            return float(np.clip(joint.qvel[0], -limit, limit))
        assert entry.quantity == "actuator's torque"
        return float(data.qfrc_actuator[model.jnt_dofadr[joints[entry.of]]])
    body = _body(model, entry.of)
    free = entry.of == "torso" and int(model.jnt_type[0]) == 0
    if quantity == "position" and free:
        return float(data.qpos[place])
    if quantity == "orientation" and free:
        return float(data.qpos[3 + QUATERNION.index(axis)])
    if quantity == "inertia":
        return float(data.cinert[body, INERTIA.index(axis)])
    if quantity == "mass times offset":
        return float(data.cinert[body, 6 + place])
    if entry.quantity == "mass":
        return float(model.body_mass[body])
    if quantity in ("contact torque", "contact force"):
        return float(np.clip(data.cfrc_ext[body, place + 3 * (quantity == "contact force")], -1, 1))
    raise AssertionError(entry)


def _body(model: Any, name: str) -> int:
    if name.startswith("body below "):
        (child,) = np.flatnonzero(model.body_parentid == _body(model, name.removeprefix("body below ")))
        return int(child)
    return int(model.body(name).id)


def velocity_of(data: Any, entry: Entry, free: bool) -> float:
    """A component of a body's velocity: of the free joint, or as MuJoCo's ``cvel`` has it, rotation first."""
    quantity, _, axis = entry.quantity.rpartition(" ")
    angular = quantity == "angular velocity"
    place = AXES.index(axis)
    if free:
        return float(data.qvel[place + 3 * angular])
    return float(data.cvel[_body(data.model, entry.of), place + 3 * (not angular)])


def check(data: Any, entries: tuple[Entry, ...], raw: Any, limit: float = np.inf) -> None:
    """Compare every entry of a raw observation with what MuJoCo's data hold under its name."""
    model = data.model
    joints = {model.joint(i).name for i in range(model.njnt)}
    told: set[tuple[str, str]] = set()
    for entry, value in zip(entries, raw, strict=True):
        if entry.of not in joints and "velocity" in entry.quantity:
            # Humanoid's torso has both: the free joint's come first.
            first = (entry.of, entry.quantity) not in told and entry.of == "torso"
            expected = velocity_of(data, entry, free=first)
        else:
            expected = number_of(data, entry, limit)
        told.add((entry.of, entry.quantity))
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-6), entry


@pytest.mark.parametrize("task", mamujoco.TASKS)
def test_mujoco_observations_and_actions(task: str) -> None:
    pytest.importorskip("gymnasium")
    name = task.split("/")[1]
    entries = registry.entries(task)
    body = mamujoco.JointBody(name)
    body.reset(3)
    generator = np.random.default_rng(0)
    for _ in range(3):
        raw, _, _ = body.step(generator.uniform(-0.4, 0.4, body.action_size))
    spec = mamujoco.team_spec(task)
    model = body.data.model
    for index, agent in enumerate(spec.names):
        observation = entries[agent].observation
        named = observation[: len(raw)]
        check(body.data, named, raw, limit=10.0 if name == "hopper-3x1" else np.inf)
        # What follows are zeros and the one-hot identity, as the team observes them.
        rest = [0.0 if not entry.of else float(entry.of == agent) for entry in observation[len(raw) :]]
        vector = mamujoco.standardize(np.concatenate([raw, rest]))
        assert np.array_equal(mamujoco.team_vectors(spec, raw[None])[0, index], vector)
        for entry, actuator in zip(
            entries[agent].action, mamujoco._BODIES[name].actuators[index], strict=True
        ):
            assert model.joint(entry.of).id == model.actuator_trnid[actuator, 0]
            assert entry.unit == f"{model.actuator_gear[actuator, 0]:g} N m for 1"
    body.close()


@pytest.mark.parametrize("task", mamujoco_khop.TASKS)
def test_decentralised_observations_and_actions(task: str) -> None:
    pytest.importorskip("gymnasium_robotics")
    entries = registry.entries(task)
    environment = mamujoco_khop.DecentralizedMujoco(task)
    environment.reset(3)
    generator = np.random.default_rng(0)
    data = environment._parallel.single_agent_env.unwrapped.data
    for step in range(200):
        actions = {a.name: generator.uniform(-1, 1, a.action.size) for a in environment.spec.agents}
        observations = environment.step(actions)[0]
        if step > 3 and ("ant" not in task or np.abs(data.cfrc_ext[2:]).max() > 0):  # a leg is touched
            break
    _, actuators = environment.factorization()
    for agent, driven in zip(environment.spec.names, environment.spec.action_slices, strict=True):
        limit = 10.0 if "hopper" in task else np.inf
        check(data, entries[agent].observation, observations[agent], limit)
        joints = [environment.model.joint(entry.of).id for entry in entries[agent].action]
        assert joints == [environment.model.actuator_trnid[i, 0] for i in actuators[driven]]
    assert ("ant" in task) == bool(np.abs(data.cfrc_ext[2:]).max() > 0)
    environment.close()


def test_smax_has_jaxmarls_features() -> None:
    pytest.importorskip("jaxmarl")
    from omcda_deploy.envs.programs.smax_battles import import_smax

    _, package = import_smax()
    battle = package.HeuristicEnemySMAX(scenario=package.map_name_to_scenario("5m_vs_6m"))
    ours = {
        "health": "health",
        "position_x": "relative x",
        "position_y": "relative y",
        "last_movement_x": "last move x",
        "last_movement_y": "last move y",
        "last_targeted": "last attack",
        "weapon_cooldown": "weapon's cooldown",
    }
    types = [f"is a {name}" for name in battle.unit_type_names]
    agent = registry.entries("smax/5m_vs_6m")["agent_1"]
    units = ["agent_0", "agent_2", "agent_3", "agent_4", *(f"enemy {k}" for k in range(6))]
    other = [ours[name] for name in battle.unit_features if "bit" not in name] + types
    own = [ours[name].removeprefix("relative ") for name in battle.own_features if "bit" not in name] + types
    expected = [(unit, name) for unit in units for name in other] + [("agent_1", name) for name in own]
    assert [(entry.of, entry.quantity) for entry in agent.observation] == expected
    moves = ["move north", "move east", "move south", "move west", "stop"]
    assert [entry.quantity for entry in agent.action] == [*moves, *["attack"] * 6]
    vectors, _ = battle._decode_discrete_actions(package.smax_env.jnp.arange(5))
    directions = [(0, 1), (1, 0), (0, -1), (-1, 0), (0, 0)]
    assert np.asarray(vectors) == pytest.approx(np.array(directions), abs=1e-6)
    assert smax.MAP_SIZE == battle.map_width == battle.map_height


def test_smac_names_as_many_numbers_as_its_formula_has() -> None:
    for task in registry.tasks():
        if task.startswith("smac/"):
            registry.entries(task)  # compares the numbers of names with the spec's
    agent = registry.entries("smac/2s3z")["agent_1"]
    rows = [(row.index, row.owners) for row in entry_rows(agent.observation)]
    assert rows == [
        ("0 to 3", ""),
        ("4 to 43", "enemy 0 to 4"),  # 4 + health, shield and two types
        ("44 to 75", "agent_0, agent_2 to 4"),
        ("76 to 79", "agent_1"),
    ]
    names = [entry.quantity for entry in agent.observation]
    condition = ["health", "shield", "is of type 0", "is of type 1"]
    assert names[4:12] == ["can be attacked", "distance", "relative x", "relative y", *condition]
    assert names[44:52] == ["is seen", "distance", "relative x", "relative y", *condition]
    assert names[76:] == condition


def test_every_task_names_its_numbers() -> None:
    for task in registry.tasks():
        described = registry.entries(task)
        assert tuple(described) == registry.team_spec(task).names
        for agent in described.values():
            rows = entry_rows(agent.observation)
            assert [row.first for row in rows[1:]] == [row.last + 1 for row in rows[:-1]]
            assert rows[-1].last == len(agent.observation) - 1
            assert all(row.description for row in rows)


def test_wrong_numbers_of_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = toy.entries("toy/chain")
    wrong = {**right, "agent_1": AgentEntries(right["agent_1"].observation[1:], right["agent_1"].action)}
    monkeypatch.setattr(toy, "entries", lambda task: wrong)
    with pytest.raises(PluginError, match="entries of toy/chain: expected names for"):
        registry.entries("toy/chain")


def test_rows_tell_what_repeats_once() -> None:
    entries = [
        Entry("hip", "angle", "rad"),
        Entry("knee", "angle", "rad"),
        *(Entry("torso", f"velocity {axis}", "m/s") for axis in AXES),
        Entry("torso", "mass", "kg"),
        *(Entry("", "zero") for _ in range(4)),
        *(Entry(f"enemy {k}", "health") for k in (0, 1, 2, 4, 9)),
    ]
    assert [(row.index, row.owners, row.description) for row in entry_rows(entries)] == [
        ("0 to 1", "hip, knee", "angle (rad)"),
        ("2 to 5", "torso", "velocity x, y, z (m/s), mass (kg)"),
        ("6 to 9", "", "zero"),
        ("10 to 14", "enemy 0 to 2, enemy 4, enemy 9", "health"),
    ]


def test_describe_prints_lines_and_json() -> None:
    printed = CliRunner().invoke(app, ["describe", "toy/chain-mixed"]).output
    assert printed.startswith("toy/chain-mixed: 3 agents, 10 Hz, at most 25 steps, state of 9\n")
    assert "agent_1 observes 4 numbers\n  0 to 3      local state is 0, 1, 2, 3 (0 or 1)\n" in printed
    assert "agent_2 chooses one of 4\n" in printed
    told = json.loads(CliRunner().invoke(app, ["describe", "toy/chain-mixed", "--json"]).output)
    assert told["team"]["task"] == "toy/chain-mixed"
    assert told["entries"]["agent_0"]["action"][2] == {"of": "", "quantity": "choice 2", "unit": ""}
    own = "tests.support.own_simulators:ParallelReach"
    assert "does not say" in CliRunner().invoke(app, ["describe", own]).output
