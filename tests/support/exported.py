"""Small actors with a numpy twin, and bundles exported from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omcda_deploy.bundle import Bundle, parameter_names
from omcda_deploy.export.bundle import export_bundle
from omcda_deploy.inputs import joined_rows, with_zero_noise
from omcda_deploy.local import JointTeam, LocalTeam, decision_of, split_decisions
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.spec import ActionSpec, AgentSpec, Normalizer, TeamSpec

M = 1000  # rows of the parity check
Array = NDArray[Any]


class Gaussian(nn.Module):
    """A linear ContinuousActor; its numpy twin is :func:`gaussian`."""

    def __init__(self, spec: TeamSpec, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        n, w, a = len(spec.agents), spec.observation_size, spec.action_size
        self.actions = a
        self.weight = nn.Parameter(torch.randn(n, w, 2 * a, generator=generator) / w)
        self.bias = nn.Parameter(torch.randn(n, 1, 2 * a, generator=generator) / 3)

    def forward(self, observation: Tensor, agent: int | None) -> tuple[Tensor, Tensor]:
        if agent is None:
            out = (observation.unsqueeze(-2) @ self.weight + self.bias).squeeze(-2)
        else:
            out = observation @ self.weight[agent] + self.bias[agent]
        return out[..., : self.actions], out[..., self.actions :]


class Categorical(Gaussian):
    """A linear DiscreteActor on the same weights, with logits of a larger scale."""

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None) -> Tensor:  # type: ignore[override]
        available = mask.bool()
        none = ~available.any(-1, keepdim=True)
        available = torch.cat([available[..., :1] | none, available[..., 1:]], -1)
        logits = super().forward(observation, agent)[0] * 5
        return logits.masked_fill(~available, torch.finfo(torch.float32).min).log_softmax(-1)


def gaussian(actor: Gaussian, observation: Array, agent: int, actions: int) -> tuple[Array, Array]:
    """Compute mean and log_std [B, A] of ``agent`` in float64 from its observations [B, O]."""
    weight, bias = actor.weight.detach().double().numpy(), actor.bias.detach().double().numpy()
    padded = np.zeros((len(observation), weight.shape[1]))
    padded[:, : observation.shape[1]] = observation
    out = padded @ weight[agent] + bias[agent]
    half = weight.shape[2] // 2
    return out[:, :actions], out[:, half : half + actions]


def standardized(x: Array) -> Array:
    """Standardise each vector over its own entries."""
    x = x.astype(np.float64)
    result: Array = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return result


def team_spec(
    kind: Any = "continuous",
    observations: tuple[int, ...] = (5, 5),
    actions: tuple[int, ...] = (2, 2),
    normalizer: Any = "per-vector-standardize",
    low: float = -1.0,
    high: float = 1.0,
) -> TeamSpec:
    return TeamSpec(
        "test/team",
        tuple(
            AgentSpec(f"agent_{i}", o, ActionSpec(kind, a, low, high))
            for i, (o, a) in enumerate(zip(observations, actions, strict=True))
        ),
        state_size=3,
        control_rate=20.0,
        normalizer=Normalizer(normalizer),
    )


RAGGED: dict[str, Any] = {"observations": (4, 6, 3), "actions": (1, 3, 2)}


class Exported:
    """A bundle, its actors, the observations and masks of its parity check, and noise to act with."""

    def __init__(self, out: Path, spec: TeamSpec, kind: Any = "kl", **changes: Any) -> None:
        self.spec = spec
        actor = Gaussian if spec.action_kind == "continuous" else Categorical
        self.policy, self.behavior = actor(spec, 1), actor(spec, 2)
        generator = np.random.default_rng(0)
        shape = (M, len(spec.agents), spec.observation_size)
        self.observations = (3 * generator.standard_normal(shape) + 1).astype(np.float32)
        arguments: dict[str, Any] = {
            "observations": self.observations,
            "divergence_kind": kind,
            "budgets": {name: 0.25 for name in spec.names},
            "alphas": {name: 1.5 for name in spec.names},
            "provenance": {"algorithm": "test", "step": 7},
        }
        if spec.action_kind == "discrete":
            self.masks = generator.integers(0, 2, (M, len(spec.agents), spec.action_size), np.uint8)
            self.masks[:20] = 0
            arguments["action_masks"] = self.masks
        self.bundle: Bundle = export_bundle(out, spec, self.policy, self.behavior, **{**arguments, **changes})
        self.noise = NoiseSource(spec, 5).draw(M)
        self.rows = {a.name: self.observations[:, i, : a.observation_size] for i, a in enumerate(spec.agents)}

    def act(self, team: Callable[[Bundle], LocalTeam | JointTeam], noise: bool = True) -> dict[str, Decision]:
        """Ask the graphs as an engine does, which refuses no mask."""
        rows: dict[str, dict[str, Any]] = {}
        for i, agent in enumerate(self.spec.agents):
            feeds = {"observation": self.rows[agent.name]}
            if noise:
                feeds["noise"] = self.noise[agent.name]
            if self.spec.action_kind == "discrete":
                feeds["action_mask"] = self.masks[:, i, : agent.action.size]
            rows[agent.name] = with_zero_noise(agent, feeds)
        asked = team(self.bundle)
        if isinstance(asked, JointTeam):
            return split_decisions(self.spec, asked._model.run(joined_rows(self.spec, rows)))
        parameters = parameter_names(self.spec)
        return {name: decision_of(asked._models[name].run(rows[name]), parameters) for name in rows}


Export = Callable[..., Exported]
