"""Observations and actuators of each agent of the k-hop tasks, against indices worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from omcda_deploy.envs import mamujoco, mamujoco_khop, toy

pytest.importorskip("gymnasium_robotics")


def _forces(*bodies: int) -> list[int]:
    """Indices of the contact forces of MuJoCo's bodies in Ant's state: 27 numbers, then 6 per body from body 1."""
    return [27 + 6 * (body - 1) + i for body in bodies for i in range(6)]


_HOPPER_TORSO = [0, 1, 5, 6, 7]  # z, pitch; the velocities of x, z, pitch
_CHEETAH_TORSO = [0, 1, 8, 9, 10]
_ANT_TORSO = [*range(5), *range(13, 19)]
# For each agent, the entries of the centralised state that make up its observation: position and velocity of its
# own joints (by name, with Ant's contact forces), positions one hop away (by name), the torso.
SEEN = {
    "hopper-3x1": [
        [2, 8, 3, *_HOPPER_TORSO],  # thigh; leg
        [3, 9, 4, 2, *_HOPPER_TORSO],  # leg; foot, thigh
        [4, 10, 3, *_HOPPER_TORSO],  # foot; leg
    ],
    "halfcheetah-6x1": [
        [2, 11, 3, 5, *_CHEETAH_TORSO],  # bthigh; bshin, fthigh
        [3, 12, 4, 2, *_CHEETAH_TORSO],  # bshin; bfoot, bthigh
        [4, 13, 3, *_CHEETAH_TORSO],  # bfoot; bshin
        [5, 14, 2, 6, *_CHEETAH_TORSO],  # fthigh; bthigh, fshin
        [6, 15, 7, 5, *_CHEETAH_TORSO],  # fshin; ffoot, fthigh
        [7, 16, 6, *_CHEETAH_TORSO],  # ffoot; fshin
    ],
    "ant-2x4": [
        # ankle_1, ankle_2, hip_1 (with the torso's forces), hip_2; hip_3, hip_4
        [6, 20, *_forces(2, 3, 4), 8, 22, *_forces(5, 6, 7), 5, 19, *_forces(1), 7, 21, 9, 11, *_ANT_TORSO],
        # ankle_3, ankle_4, hip_3, hip_4; hip_1, hip_2
        [
            10,
            24,
            *_forces(8, 9, 10),
            12,
            26,
            *_forces(11, 12, 13),
            9,
            23,
            *_forces(1),
            11,
            25,
            5,
            7,
            *_ANT_TORSO,
        ],
    ],
}
# Joints that the agents drive, in the order of their actions.
DRIVEN = {
    "hopper-3x1": [["thigh_joint"], ["leg_joint"], ["foot_joint"]],
    "halfcheetah-6x1": [["bthigh"], ["bshin"], ["bfoot"], ["fthigh"], ["fshin"], ["ffoot"]],
    "ant-2x4": [["hip_1", "ankle_1", "hip_2", "ankle_2"], ["hip_3", "ankle_3", "hip_4", "ankle_4"]],
}


@pytest.mark.parametrize(
    ("body", "sizes", "state"),
    [
        ("hopper-3x1", (8, 9, 8), 11),
        ("ant-2x4", (63, 63), 105),
        ("halfcheetah-6x1", (9, 9, 8, 9, 9, 8), 17),
    ],
)
def test_sizes_are_the_true_ones(body: str, sizes: tuple[int, ...], state: int) -> None:
    environment = mamujoco_khop.make(f"mamujoco-khop1/{body}")
    assert tuple(agent.observation_size for agent in environment.spec.agents) == sizes
    assert environment.spec.state_size == state
    assert environment.spec.normalizer.kind == "none"
    observations, _ = environment.reset(seed=0)
    assert tuple(values.shape for values in observations.values()) == tuple((size,) for size in sizes)


@pytest.mark.parametrize("body", list(SEEN))
def test_agents_see_their_own_neighbourhood(body: str) -> None:
    environment = mamujoco_khop.make(f"mamujoco-khop1/{body}")
    observations, _ = environment.reset(seed=5)
    rng = np.random.default_rng(0)
    touched = False
    for _ in range(40):
        state = environment.state()
        for entries, indices in zip(observations.values(), SEEN[body], strict=True):
            np.testing.assert_array_equal(entries, state[indices])
        touched = touched or bool(np.any(state[27:]))
        observations, *_ = environment.step(
            {a.name: rng.uniform(-1, 1, a.action.size).astype(np.float32) for a in environment.spec.agents}
        )
    assert touched == (body == "ant-2x4")  # real contact forces, unlike in mamujoco/ant-2x4


@pytest.mark.parametrize("body", list(DRIVEN))
def test_agents_drive_their_own_joints(body: str) -> None:
    environment = mamujoco_khop.make(f"mamujoco-khop1/{body}")
    simulation = environment._parallel.single_agent_env.unwrapped
    model, data = simulation.model, simulation.data
    for agent, joints in zip(environment.spec.agents, DRIVEN[body], strict=True):
        for k, joint in enumerate(joints):
            environment.reset(seed=0)
            actions = {a.name: np.zeros(a.action.size, np.float32) for a in environment.spec.agents}
            actions[agent.name][k] = 0.5
            environment.step(actions)
            (moved,) = np.flatnonzero(data.ctrl)
            assert data.ctrl[moved] == 0.5
            assert model.joint(model.actuator(moved).trnid[0]).name == joint


def test_contracts_tell_all_tasks_apart() -> None:
    specs = [mamujoco.make(task).spec for task in mamujoco.TASKS]
    specs += [mamujoco_khop.make(task).spec for task in mamujoco_khop.TASKS]
    specs += [
        toy.make(task).spec for task in ("toy/one-step", "toy/chain", "toy/chain-single", "toy/chain-mixed")
    ]
    assert len({spec.contract_hash for spec in specs}) == len(specs)
