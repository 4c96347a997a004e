"""Small teams, batches and datasets of random numbers, and learners with networks small enough for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from omcda_deploy import registry
from omcda_deploy.datasets import Episode
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from omcda_deploy.training.algorithm import Algorithm, create_algorithm
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import Categorical, TanhGaussian, policy_of
from omcda_deploy.training.losses import atanh_action
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.recipes import recipe

HIDDEN = 16
# OMCDA's settings as in its paper, for tests of what the paper defines.
PAPER = recipe("test/any", "omcda", "paper")


def continuous_spec() -> TeamSpec:
    """Three agents that see, drive and observe numbers of unequal lengths, so that swapped axes do not fit."""
    return TeamSpec(
        "test/continuous",
        tuple(AgentSpec(f"agent_{i}", 5, ActionSpec("continuous", 2)) for i in range(3)),
        state_size=7,
        control_rate=20.0,
    )


def unequal_spec() -> TeamSpec:
    """An arm of two joints and a base of one, which see unequally much; the shorter action comes first."""
    sizes = {"base": (3, 1), "arm": (4, 2)}
    return TeamSpec(
        "test/unequal",
        tuple(AgentSpec(name, o, ActionSpec("continuous", a)) for name, (o, a) in sizes.items()),
        state_size=6,
        control_rate=20.0,
    )


def discrete_spec() -> TeamSpec:
    """Two agents of unequal sizes; a choice that an agent does not have is never available to it."""
    return TeamSpec(
        "test/discrete",
        tuple(AgentSpec(f"agent_{i}", 4 + i, ActionSpec("discrete", 4 - i, 0.0, 1.0)) for i in range(2)),
        state_size=6,
        control_rate=8.0,
    )


TEAMS = {"continuous": continuous_spec, "unequal": unequal_spec, "discrete": discrete_spec}


def spec_of(team: str) -> TeamSpec:
    return TEAMS[team]()


def teams_of(algorithm: str) -> list[str]:
    """Return the teams whose kind of action an algorithm handles."""
    actions = registry.load_algorithm(algorithm).ACTIONS
    return [team for team in TEAMS if spec_of(team).action_kind in actions]


def random_batch(spec: TeamSpec, size: int = 32, seed: int = 0) -> Batch:
    """Standard normal numbers for one run; a fifth of the transitions are terminal, a tenth have no next action.

    Recorded choices are available ones, padding holds numbers like any; the behaviour policy is
    :func:`behavior_actor`.
    """
    generator = torch.Generator().manual_seed(seed)
    n, o, a = len(spec.agents), spec.observation_size, spec.action_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    masks: list[torch.Tensor | None] = [None, None]
    if spec.action_kind == "discrete":
        choices = torch.tensor([[k < agent.action.size for k in range(a)] for agent in spec.agents])
        random = [(normal(size, n, a) > -0.5) & choices for _ in range(2)]
        masks = [torch.cat([choices[:, :1] | m[..., :1], m[..., 1:]], -1).to(torch.uint8) for m in random]
    mask, next_mask = masks

    def actions(available: torch.Tensor | None) -> torch.Tensor:
        scores = normal(size, n, a)
        if available is None:
            return torch.tanh(scores)
        return scores.masked_fill(available == 0, -torch.inf).argmax(-1)

    action = actions(mask)
    return with_behavior(
        behavior_actor(spec),
        observation=normal(size, n, o),
        action=action,
        reward=normal(size),
        not_done=(torch.rand(size, generator=generator) > 0.2).float(),
        state=normal(size, spec.state_size),
        next_observation=normal(size, n, o),
        next_state=normal(size, spec.state_size),
        next_action=actions(next_mask),
        next_action_known=(torch.rand(size, generator=generator) > 0.1).float(),
        mask=mask,
        next_mask=next_mask,
        return_to_go=normal(size),
        return_range=torch.tensor([-50.0, 50.0]),  # as wide as to clip nothing
    )


def with_behavior(actor: nn.Module, **tensors: torch.Tensor | None) -> Batch:
    """A batch of one run from fields without the axis of runs, with the behaviour policy's distributions."""
    batch = Batch(**{k: None if values is None else values.unsqueeze(0) for k, values in tensors.items()})
    with torch.no_grad():
        batch.behavior = policy_of(actor, batch.observation, batch.mask)
        batch.next_behavior = policy_of(actor, batch.next_observation, batch.next_mask)
    if batch.mask is None:  # as a sampler's, from a table of the dataset
        batch.u, batch.log_jacobian = atanh_action(batch.action, getattr(actor, "padding", None))
    return batch


def stacked(*batches: Batch) -> Batch:
    """Batches of single runs as the batch of a fleet."""

    def join(name: str) -> Any:
        values = [getattr(batch, name) for batch in batches]
        if any(value is None for value in values):  # what a batch has not got, or not worked out yet
            return None
        if isinstance(values[0], (TanhGaussian, Categorical)):
            kind = type(values[0])
            parts = {f.name: [getattr(v, f.name) for v in values] for f in fields(kind)}
            padding = parts.pop("padding", [None])[0]  # of the team, not of a run
            joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
            distribution: Any = kind(**joined)
            return distribution if padding is None else replace(distribution, padding=padding)
        return torch.cat(values)

    return Batch(**{name: join(name) for name in Batch.__annotations__})


def behavior_actor(spec: TeamSpec, hidden: int = HIDDEN) -> nn.Module:
    """A cloned policy as training gets it: of one run, frozen, the same for equal arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        return NetworkFactory(spec, hidden).actor().requires_grad_(False)


def make_learner(
    name: str,
    spec: TeamSpec,
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    steps: int = 1000,
) -> Algorithm:
    """A learner of one run with small networks; equal arguments give equal learners."""
    return make_fleet(name, spec, [settings or {}], seeds=[seed], steps=steps)


def make_fleet(
    name: str,
    spec: TeamSpec,
    settings: Sequence[Mapping[str, Any]],
    *,
    seeds: Sequence[int],
    steps: int = 1000,
) -> Algorithm:
    """As :func:`make_learner`, of one run per seed."""
    torch.set_num_threads(1)
    every: list[Mapping[str, Any]] = [{"hidden": HIDDEN, **values} for values in settings]
    behavior = behavior_actor(spec, every[0]["hidden"])
    return create_algorithm(name, spec, [behavior] * len(every), settings=every, steps=steps, seeds=seeds)


def write_dataset(
    path: Path,
    spec: TeamSpec,
    lengths: Sequence[int],
    *,
    timeouts: Sequence[bool] | None = None,
    reward_scale: float = 1.0,
    seed: int = 0,
) -> Path:
    """Write random episodes of ``lengths`` transitions as HDF5. Every second one ends at the time limit."""
    generator = np.random.default_rng(seed)
    n = len(spec.agents)
    if timeouts is None:
        timeouts = [index % 2 == 1 for index in range(len(lengths))]
    with DatasetWriter(path, spec, {"behavior": "random", "seed": seed}) as writer:
        for length, timeout in zip(lengths, timeouts, strict=True):
            observations = generator.normal(size=(length + 1, n, spec.observation_size)).astype(np.float32)
            for index, agent in enumerate(spec.agents):
                observations[:, index, agent.observation_size :] = 0
            states = (
                observations.reshape(length + 1, -1)
                if spec.state_size == n * spec.observation_size
                else generator.normal(size=(length + 1, spec.state_size)).astype(np.float32)
            )
            rewards = (reward_scale * generator.normal(size=length)).astype(np.float32)
            actions = generator.uniform(-0.9, 0.9, (length, n, spec.action_size)).astype(np.float32)
            for index, agent in enumerate(spec.agents):
                actions[:, index, agent.action.size :] = 0
            writer.append(Episode(observations, states, actions, rewards, timeout=timeout))
    return path


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """A nested training state as one flat dictionary, for comparison."""
    if isinstance(state, Mapping):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{name}/{i}").items()}
    return {name: state}


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> set[str]:
    """Names under which two states or metrics are not equal to the last bit; on one side only counts too."""
    ours, theirs = flat(ours), flat(theirs)
    return {
        name.removeprefix("/")
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _equal(ours[name], theirs[name])
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return bool(a == b)
