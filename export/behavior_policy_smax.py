"""SMAX's behaviour policies (:mod:`omcda_deploy.training.behavior.smax`) as bundles.

A checkpoint is one ReLU MLP for all agents, from an observation and a one-hot id to the logits of all actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.bundle import Bundle
from omcda_deploy.envs.smax import SmaxVector
from omcda_deploy.errors import ConfigError
from omcda_deploy.export.behavior_policy import read_checkpoint, write_behavior_bundle
from omcda_deploy.export.parity import PARITY_ROWS
from omcda_deploy.policy import Float, NoiseSource
from omcda_deploy.spec import TeamSpec

_ARRAYS = (
    "w1",  # [H, O + N]
    "b1",
    "w2",  # [H, H]
    "b2",
    "w3",  # [A, H]
    "b3",
)
_BATTLES = 16  # that the parity check's observations come from


class SharedBehaviorActor(nn.Module):
    """The agents' common policy; a ``DiscreteActor``. Shapes: B batch, N agents, H hidden."""

    identity: Tensor  # [N, H], the id's part of the first layer
    w1: Tensor  # [H, O]
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor

    def __init__(self, arrays: Mapping[str, NDArray[Any]], spec: TeamSpec) -> None:
        super().__init__()
        width, actions = arrays["w1"].shape[1], len(arrays["w3"])
        expected = spec.observation_size + len(spec.agents), spec.action_size
        if (width, actions) != expected:
            raise ConfigError(
                f"the checkpoint maps {width} inputs to {actions} actions: it does not fit {spec.task}, which has "
                f"{expected[0]} with the id, and {expected[1]} actions"
            )
        tensors = {name: torch.from_numpy(np.asarray(values, np.float32)) for name, values in arrays.items()}
        self.register_buffer("identity", tensors["w1"][:, spec.observation_size :].T.contiguous())
        tensors["w1"] = tensors["w1"][:, : spec.observation_size].contiguous()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """``[B, N, O]``, or ``[B, O]`` of ``agent``, and masks [B, (N,) A] -> log-probabilities ``[B, (N,) A]``."""
        if agent is None:
            hidden = F.relu(F.linear(observation, self.w1, self.b1) + self.identity)
        else:
            hidden = F.relu(F.linear(observation, self.w1, self.b1 + self.identity[agent]))
        hidden = F.relu(F.linear(hidden, self.w2, self.b2))
        logits = F.linear(hidden, self.w3, self.b3)
        available = mask.bool()
        none = ~available.any(dim=-1, keepdim=True)
        available = torch.cat([available[..., :1] | none, available[..., 1:]], dim=-1)
        return F.log_softmax(logits.masked_fill(~available, torch.finfo(logits.dtype).min), dim=-1)


def export_behavior_policy(
    checkpoint: Path,
    task: str,
    out: Path,
    *,
    tier: str,
    provenance: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Bundle:
    """As :func:`omcda_deploy.export.behavior_policy.export_behavior_policy`, for ``smax/<map>``."""
    with SmaxVector(task, _BATTLES) as battles:
        actor = SharedBehaviorActor(read_checkpoint(checkpoint, _ARRAYS), battles.spec)
        observations, masks = _play(actor, battles, PARITY_ROWS, seed)
        spec = battles.spec
    return write_behavior_bundle(
        out, spec, actor, checkpoint, tier, provenance or {}, observations=observations, action_masks=masks
    )


def _play(
    actor: SharedBehaviorActor, battles: SmaxVector, rows: int, seed: int
) -> tuple[Float, NDArray[np.uint8]]:
    """Observations [rows, N, O] and masks [rows, N, A] that the policy meets, acting stochastically."""
    spec = battles.spec
    noise = NoiseSource(spec, seed)
    seeds = iter(range(seed * rows, (seed + 1) * rows))  # more than the battles that can end in so many steps
    shown = battles.reset({battle: next(seeds) for battle in range(battles.num_envs)})
    observations: list[Float] = []
    masks: list[NDArray[np.uint8]] = []
    while len(observations) * battles.num_envs < rows:
        observations.append(np.stack(list(shown.observations.values()), axis=1))
        masks.append(np.stack(list((shown.action_masks or {}).values()), axis=1))
        with torch.no_grad():
            logits = actor(torch.from_numpy(observations[-1]), torch.from_numpy(masks[-1])).numpy()
        scores = logits + np.stack(list(noise.draw(battles.num_envs).values()), axis=1)
        shown = battles.step({name: scores[:, i].argmax(-1) for i, name in enumerate(spec.names)})
        ended = np.flatnonzero(shown.terminated | shown.truncated).tolist()
        if ended:
            shown = battles.reset({battle: next(seeds) for battle in ended})
    return np.concatenate(observations), np.concatenate(masks)
