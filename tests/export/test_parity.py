"""Parity check: graphs that do not reproduce the policy are not exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from omcda_deploy.bundle import TEAM
from omcda_deploy.errors import ExportError
from omcda_deploy.export import bundle as writer
from omcda_deploy.export.parity import TEAM_TOLERANCE, OutputComparison
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from tests.support.exported import (
    Exported,
    Gaussian,
    team_spec,
)


def damage(monkeypatch: pytest.MonkeyPatch, model: str, change: float) -> None:
    """Change the largest weight of one exported model, as a faulty exporter would."""
    trace = writer._trace

    def damaged(graph: Any, spec: TeamSpec, name: str, file: Path) -> onnx.ModelProto:
        proto = trace(graph, spec, name, file)
        if name == model:
            weight = max(proto.graph.initializer, key=lambda entry: math.prod(entry.dims))
            values = onnx.numpy_helper.to_array(weight).copy()
            values.flat[0] += change
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return proto

    monkeypatch.setattr(writer, "_trace", damaged)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("agent_1", 1e-3, r"of agent_1, observation \d+, .*onnxruntime gives \S+, torch \S+"),
        ("agent_1", math.nan, r"of agent_1, observation \d+"),
        (TEAM, 1e-3, r"of agent_0, observation \d+, .*the team's graph gives \S+, the agent's graph \S+"),
    ],
)
def test_a_wrong_graph_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, model: str, change: float, message: str
) -> None:
    damage(monkeypatch, model, change)
    with pytest.raises(ExportError, match=message):
        Exported(tmp_path / "b", team_spec(kind))
    assert not list(tmp_path.iterdir())


def test_a_baked_batch_size_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Gaussian.forward

    def baked(self: Gaussian, observation: Tensor, agent: int | None) -> tuple[Tensor, Tensor]:
        mean, log_std = forward(self, observation, agent)
        rows, *others = observation.detach().numpy().shape
        return mean + torch.zeros(rows, *(1 for _ in others)), log_std

    monkeypatch.setattr(Gaussian, "forward", baked)
    with (
        pytest.warns(Warning, match="NumPy array"),
        pytest.raises(ExportError, match="batches of 1 and of many"),
    ):
        Exported(tmp_path / "b", team_spec())
    assert not list(tmp_path.iterdir())


def test_a_mean_near_a_bound_is_held_to_its_actions_exactness() -> None:
    """BCQ's mean is the atanh of an action: at 2.7 an error of 2e-4 is one of 4e-6 in the action."""
    agent = AgentSpec("agent_0", 3, ActionSpec("continuous", 1))
    rows = {"mean": 2.7, "log_std": -20.0, "behavior_mean": 0.0, "behavior_log_std": 0.0, "divergence": 10.0}
    expected = {name: np.full((1, 1), value, np.float32) for name, value in rows.items()}
    expected |= {"action": np.tanh(expected["mean"]), "behavior_action": np.zeros((1, 1), np.float32)}
    expected["divergence"] = expected["divergence"][0]

    def compare(kind: Any, error: float) -> None:
        mean = expected["mean"] + np.float32(error)
        comparison = OutputComparison("a", "b", TEAM_TOLERANCE, TEAM_TOLERANCE, kind)
        actual = expected | {"mean": mean, "action": np.tanh(mean)}
        comparison.check(agent, "zero noise", np.zeros((1, 1), np.float32), actual, expected)

    compare("neg_log_behavior", 2e-4)
    action = np.tanh(2.7)
    limit = np.arctanh(action + TEAM_TOLERANCE.allowed(action)) - 2.7
    compare("neg_log_behavior", 0.995 * limit)  # whose action is within its tolerance
    with pytest.raises(ExportError, match="action of agent_0"):
        compare("neg_log_behavior", 2e-3)
    with pytest.raises(ExportError, match="mean of agent_0"):
        compare("kl", 2e-4)


def test_a_steep_density_is_held_to_its_actions_exactness() -> None:
    """-log N(u; 0, 0.01) at u = 0.05 has the slope 500: 1e-5 in the mean allows 5e-3 there, and no more."""
    agent = AgentSpec("agent_0", 3, ActionSpec("continuous", 1))
    rows = {"mean": 0.05, "log_std": -20.0, "behavior_mean": 0.0, "behavior_log_std": math.log(0.01)}
    expected = {name: np.full((1, 1), value, np.float32) for name, value in rows.items()}
    expected |= {"action": np.tanh(expected["mean"]), "behavior_action": np.zeros((1, 1), np.float32)}
    expected["divergence"] = np.array([10.0], np.float32)
    noise = np.zeros((1, 1), np.float32)

    def compare(kind: Any, error: float) -> None:
        comparison = OutputComparison("a", "b", TEAM_TOLERANCE, TEAM_TOLERANCE, kind)
        comparison.check(
            agent, "zero noise", noise, expected | {"divergence": expected["divergence"] + error}, expected
        )

    compare("neg_log_behavior", 4e-3)
    with pytest.raises(ExportError, match="divergence of agent_0"):
        compare("neg_log_behavior", 8e-3)
    with pytest.raises(ExportError, match="divergence of agent_0"):
        compare("kl", 1e-3)
