"""Inputs of served models, made of a team's observations, noise and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.client.fallback import Mask
from omcda_deploy.errors import ContractError
from omcda_deploy.local import batch_of
from omcda_deploy.policy import Float
from omcda_deploy.spec import AgentSpec, TeamSpec

Rows: TypeAlias = dict[str, NDArray[Any]]  # a model's inputs by name, one row per sample


def agent_rows(agent: AgentSpec, observation: Float, noise: Float | None, action_mask: Mask | None) -> Rows:
    """Return an agent's inputs as [B, O] and [B, A]; absent noise is not sent."""
    rows: Rows = {
        "observation": batch_of(observation, agent.observation_size, f"observation of {agent.name}")
    }
    batch, actions = len(rows["observation"]), agent.action.size
    if noise is not None:
        rows["noise"] = batch_of(noise, actions, f"noise of {agent.name}")
    if agent.action.kind != "discrete" and action_mask is not None:
        raise ContractError(
            f"action_mask of {agent.name}: expected none for continuous actions: leave it out"
        )
    if agent.action.kind == "discrete":
        rows["action_mask"] = (
            np.ones((batch, actions), np.uint8)
            if action_mask is None
            else batch_of(action_mask, actions, f"action_mask of {agent.name}")
        )
    for name, values in rows.items():
        if len(values) != batch:
            raise ContractError(
                f"{name} of {agent.name}: expected {batch} rows as in the observation, got {len(values)}"
            )
    return rows


def require_agents(spec: TeamSpec, **inputs: Mapping[str, object] | None) -> None:
    """Raise :class:`ContractError` for vectors of agents that the team does not have."""
    for name, vectors in inputs.items():
        if isinstance(vectors, Mapping) and len(vectors) > len(spec.agents):
            others = ", ".join(sorted(set(vectors) - set(spec.names)))
            raise ContractError(
                f"{name}: expected those of {', '.join(spec.names)}, got {others} too: leave it out"
            )


def require_one_batch(rows: Mapping[str, Rows]) -> None:
    """Raise :class:`ContractError` unless all agents have equally many rows."""
    batches = {name: len(inputs["observation"]) for name, inputs in rows.items()}
    if len(set(batches.values())) > 1:
        raise ContractError(f"expected as many observations of every agent, got {batches}")


def joined_rows(spec: TeamSpec, rows: Mapping[str, Rows]) -> Rows:
    """Return the joint graph's inputs: the agents' side by side."""
    return {
        name: np.concatenate([rows[agent][name] for agent in spec.names], axis=1)
        for name in rows[spec.names[0]]
    }
