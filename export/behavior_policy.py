"""Joint behaviour policies (:mod:`omcda_deploy.training.behavior.mujoco`) as bundles of per-agent policies.

A checkpoint is one tanh MLP on the raw observation of the whole body; a bundle's agents see OMIGA's standardised
vectors. Those end in a one-hot id whose 1 and 0 became ``z1 = (1 - mean) / std`` and ``z0 = -mean / std``, so the
raw vector is ``(z - z0) / (z1 - z0)``, exactly, and every agent can evaluate the joint policy and keep its share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.bundle import Bundle, sha256
from omcda_deploy.envs.mamujoco import MultiAgentMujoco
from omcda_deploy.errors import ConfigError
from omcda_deploy.export.bundle import export_bundle
from omcda_deploy.export.parity import PARITY_ROWS
from omcda_deploy.policy import Float, NoiseSource
from omcda_deploy.spec import TeamSpec

_ARRAYS = (
    "w1",  # [H, R] on the normalised raw observation
    "b1",
    "w2",  # [H, H]
    "b2",
    "w_mean",  # [joints, H]
    "b_mean",
    "log_std",  # [joints]
    "observation_mean",  # [R]
    "observation_var",  # [R], epsilon included
    "observation_clip",  # of the normalised observation
)


def read_checkpoint(path: Path, arrays: Sequence[str] = _ARRAYS) -> dict[str, NDArray[Any]]:
    """The named ``arrays`` of a ``checkpoint-*.npz``. Raises :class:`ConfigError` when it is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in arrays}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: expected a checkpoint-<steps>.npz") from None
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        raise ConfigError(
            f"{path} is not a behaviour policy's checkpoint ({error}): expected a .npz with {', '.join(arrays)}"
        ) from error


class JointBehaviorActor(nn.Module):
    """Each agent's share of a joint Gaussian policy, on the team's observations; a ``ContinuousActor``.

    Agent k of a ``mamujoco/*`` team owns the k-th of N equal runs of joints. Shapes: B batch, N agents, W the
    team's observation size, R the raw observation's, H hidden, A joints per agent.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w_mean: Tensor  # [N, A, H]
    b_mean: Tensor  # [N, A]
    log_std: Tensor  # [N, A]
    observation_mean: Tensor
    inverse_std: Tensor

    def __init__(self, arrays: Mapping[str, NDArray[Any]], spec: TeamSpec) -> None:
        super().__init__()
        self.agents = len(spec.agents)
        self.joints = spec.action_size
        self.raw_size = arrays["w1"].shape[1]
        total = self.agents * self.joints
        if len(arrays["w_mean"]) != total or self.raw_size + self.agents > spec.observation_size:
            raise ConfigError(
                f"the checkpoint maps {self.raw_size} observations to {len(arrays['w_mean'])} joints: it does not "
                f"fit {spec.task}, which has {total} joints and observations of {spec.observation_size} with the id"
            )

        def tensor(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.asarray(values, np.float32))

        self.register_buffer("w1", tensor(arrays["w1"]))
        self.register_buffer("b1", tensor(arrays["b1"]))
        self.register_buffer("w2", tensor(arrays["w2"]))
        self.register_buffer("b2", tensor(arrays["b2"]))
        self.register_buffer("w_mean", tensor(arrays["w_mean"]).reshape(self.agents, self.joints, -1))
        self.register_buffer("b_mean", tensor(arrays["b_mean"]).reshape(self.agents, self.joints))
        self.register_buffer("log_std", tensor(arrays["log_std"]).reshape(self.agents, self.joints))
        self.register_buffer("observation_mean", tensor(arrays["observation_mean"]))
        self.register_buffer("inverse_std", tensor(1.0 / np.sqrt(arrays["observation_var"])))
        self.clip = float(arrays["observation_clip"])

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """``[B, N, W]``, or ``[B, W]`` of ``agent`` -> (mean, log_std), each ``[B, (N,) A]``.

        Raw and standardised observations give the same answer.
        """
        raw = self.raw(observation)
        x = ((raw - self.observation_mean) * self.inverse_std).clamp(-self.clip, self.clip)
        hidden = torch.tanh(
            F.linear(torch.tanh(F.linear(x, self.w1, self.b1)), self.w2, self.b2)
        )  # [B, (N,) H]
        if agent is not None:
            mean = F.linear(hidden, self.w_mean[agent], self.b_mean[agent])
            return mean, self.log_std[agent].expand_as(mean)
        weights = self.w_mean.transpose(-1, -2)  # [N, H, A]
        mean = (hidden.unsqueeze(-2) @ weights).squeeze(-2) + self.b_mean
        return mean, self.log_std.expand_as(mean)

    def raw(self, observation: Tensor) -> Tensor:
        """The raw observation [B, (N,) R] inside a raw or standardised vector."""
        identity = observation[..., -self.agents :]
        zero, one = identity.amin(-1, keepdim=True), identity.amax(-1, keepdim=True)
        return (observation[..., : self.raw_size] - zero) / (one - zero)


def export_behavior_policy(
    checkpoint: Path,
    task: str,
    out: Path,
    *,
    tier: str,
    provenance: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Bundle:
    """Export ``checkpoint`` as a bundle for ``task`` (``mamujoco/<body>``) at the new folder ``out``.

    Policy and behaviour policy are the same, so the divergence is zero. ``tier`` is recorded beside the
    checkpoint's name and sha256 and ``provenance``; ``seed`` starts the episodes of the parity check, which the
    policy itself plays. Raises :class:`ConfigError` for a checkpoint that is none or does not fit the task, and
    what :func:`omcda_deploy.export.bundle.export_bundle` raises.
    """
    env = MultiAgentMujoco(task)
    try:
        spec = env.spec
        actor = JointBehaviorActor(read_checkpoint(checkpoint), spec)
        observations = _play(actor, env, PARITY_ROWS, seed)
    finally:
        env.close()
    return write_behavior_bundle(
        out, spec, actor, checkpoint, tier, provenance or {}, observations=observations
    )


def write_behavior_bundle(
    out: Path,
    spec: TeamSpec,
    actor: nn.Module,
    checkpoint: Path,
    tier: str,
    provenance: Mapping[str, Any],
    *,
    observations: Float,
    action_masks: NDArray[np.uint8] | None = None,
) -> Bundle:
    """Write ``actor``, read from ``checkpoint``, as a team that is its own behaviour policy.

    ``observations`` [M, N, O] and ``action_masks`` [M, N, A] are for the parity check. Raises what
    :func:`omcda_deploy.export.bundle.export_bundle` raises.
    """
    nothing: dict[str, float | None] = dict.fromkeys(spec.names)
    return export_bundle(
        out,
        spec,
        actor,
        actor,
        observations=observations,
        divergence_kind="kl",
        budgets=nothing,
        alphas=nothing,
        provenance={
            "tier": tier,
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": sha256(checkpoint),
            **provenance,
        },
        action_masks=action_masks,
    )


def _play(actor: JointBehaviorActor, env: MultiAgentMujoco, steps: int, seed: int) -> Float:
    """Observations [steps, N, O] that the policy meets, acting stochastically."""
    names = env.spec.names
    noise = NoiseSource(env.spec, seed)
    observations, _ = env.reset(seed=seed)
    seen = np.empty((steps, len(names), env.spec.observation_size), np.float32)
    for row in seen:
        row[:] = [observations[name] for name in names]
        with torch.no_grad():
            mean, log_std = actor(torch.from_numpy(row).unsqueeze(0))
        drawn = torch.from_numpy(np.concatenate(list(noise.draw(1).values()))).unsqueeze(0)
        actions = torch.tanh(mean + log_std.exp() * drawn)[0].numpy()
        observations, _, terminated, truncated, _ = env.step(dict(zip(names, actions, strict=True)))
        if any(terminated.values()) or any(truncated.values()):
            observations, _ = env.reset()
    return seen
