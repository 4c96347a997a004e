"""Entries of MuJoCo's vectors, read from the model: joints, bodies and actuators by name, with units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omcda_deploy.entries import Entry, axes
from omcda_deploy.envs.programs.mujoco_bodies import BodyRules

_FREE, _HINGE = 0, 3  # values of mjtJoint
_INERTIA = ("xx", "yy", "zz", "xy", "xz", "yz")


def vector_entries(model: Any, rules: BodyRules) -> list[Entry]:
    """List the entries of a body's raw observation, as :class:`BodyRules` composes it."""
    arrays = {"cinert": _inertia, "cvel": _velocity, "qfrc_actuator": _forces_of_joints}
    entries = _positions(model)[rules.hidden_positions :]
    entries += _velocities(model, rules.velocity_limit)
    for name, hidden in rules.more:
        entries += arrays[name](model, hidden)
    if rules.contact_forces:
        entries += _contact_forces(model)
    return entries


def action_entries(model: Any, actuators: Sequence[int]) -> tuple[Entry, ...]:
    """List the entries of an action that drives the joints of ``actuators``."""
    return tuple(
        Entry(
            str(model.joint(model.actuator_trnid[index, 0]).name),
            "torque",
            f"{model.actuator_gear[index, 0]:g} N m for 1",
        )
        for index in actuators
    )


def _positions(model: Any) -> list[Entry]:
    def of_joint(name: str, kind: int) -> list[Entry]:
        if kind == _FREE:
            return [*axes(name, "position", "m"), *axes(name, "orientation", "quaternion", "wxyz")]
        return [Entry(name, "angle", "rad") if kind == _HINGE else Entry(name, "position", "m")]

    return _of_joints(model, of_joint)


def _velocities(model: Any, limit: float | None) -> list[Entry]:
    clipped = "" if limit is None else f", clipped to ±{limit:g}"

    def of_joint(name: str, kind: int) -> list[Entry]:
        linear, angular = f"m/s{clipped}", f"rad/s{clipped}"
        if kind == _FREE:
            return [*axes(name, "velocity", linear), *axes(name, "angular velocity", angular)]
        return [
            Entry(name, "angular velocity", angular) if kind == _HINGE else Entry(name, "velocity", linear)
        ]

    return _of_joints(model, of_joint)


def _of_joints(model: Any, of_joint: Callable[[str, int], list[Entry]]) -> list[Entry]:
    """Join the entries of all joints; a free joint has the name of its body."""
    entries = []
    for index in range(model.njnt):
        kind, joint = int(model.jnt_type[index]), model.joint(index)
        name = model.body(model.jnt_bodyid[index]).name if kind == _FREE else joint.name
        entries += of_joint(str(name), kind)
    return entries


def _inertia(model: Any, hidden: int) -> list[Entry]:
    return [
        entry
        for name in _bodies(model)[hidden:]
        for entry in (
            *axes(name, "inertia", "kg m²", _INERTIA),
            *axes(name, "mass times offset", "kg m"),
            Entry(name, "mass", "kg"),
        )
    ]


def _velocity(model: Any, hidden: int) -> list[Entry]:
    return [
        entry
        for name in _bodies(model)[hidden:]
        for entry in (*axes(name, "angular velocity", "rad/s"), *axes(name, "velocity", "m/s"))
    ]


def _forces_of_joints(model: Any, hidden: int) -> list[Entry]:
    joints = [model.joint(index).name for index in model.dof_jntid[hidden:]]
    return [Entry(str(name), "actuator's torque", "N m") for name in joints]


def _contact_forces(model: Any) -> list[Entry]:
    clipped = "clipped to ±1"
    return [
        entry
        for name in _bodies(model)[1:]
        for entry in (
            *axes(name, "contact torque", f"N m, {clipped}"),
            *axes(name, "contact force", f"N, {clipped}"),
        )
    ]


def _bodies(model: Any) -> list[str]:
    """Names of all bodies, the world first; one without a name is told by the body that it hangs on."""
    return [
        str(model.body(i).name or f"body below {model.body(model.body_parentid[i]).name}")
        for i in range(model.nbody)
    ]
