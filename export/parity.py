"""Parity check of an export: the graphs must reproduce the torch actors on real observations.

onnxruntime runs every agent's graph, which is compared with its torch module, and the team's graph, which is
compared with the agents' graphs; each on the same observations, once with zero noise and once with random noise.

Shapes: M rows of the check, N agents, O observation, A actions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from omcda_deploy.bundle import (
    CONTINUOUS_PARAMETERS,
    DISCRETE_PARAMETERS,
    MODEL_FILE,
    TEAM,
    DivergenceKind,
    input_names,
    output_names,
)
from omcda_deploy.errors import ConfigError, ExportError
from omcda_deploy.export.graph import PolicyGraph
from omcda_deploy.local import OnnxModel, split_decisions
from omcda_deploy.policy import Float, NoiseSource
from omcda_deploy.spec import AgentSpec, TeamSpec

PARITY_ROWS = 1000  # the fewest rows that an export is checked on
_BLOCK_ROWS = 111
_NEAR_TIE = 1e-4  # a discrete choice may differ where the runner-up's score is at most this much lower

Arrays: TypeAlias = Mapping[str, NDArray[Any]]  # a graph's inputs or outputs by name


class Tolerance(NamedTuple):
    """Allowed difference: ``absolute + relative * |value|``."""

    absolute: float
    relative: float

    def allowed(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the allowed difference from each of ``values``."""
        differences: NDArray[Any] = self.absolute + self.relative * np.abs(values)
        return differences

    def __str__(self) -> str:
        return f"{self.absolute:g} + {self.relative:g} of the value"


ACTION_TOLERANCE = Tolerance(1e-5, 0.0)  # also for probabilities
PARAMETER_TOLERANCE = Tolerance(1e-5, 1e-4)
TEAM_TOLERANCE = Tolerance(1e-5, 1e-5)  # the team's graph sums in another order than the agents' graphs


class Parity(NamedTuple):
    """Result of the check: the largest differences, and each agent's divergence under zero noise."""

    report: dict[str, Any]
    divergence: dict[str, NDArray[Any]]  # [M] of each agent


def parity_samples(
    spec: TeamSpec, observations: NDArray[Any], action_masks: NDArray[Any] | None
) -> dict[str, Arrays]:
    """Split ``observations`` [M, N, O] and ``action_masks`` [M, N, A] into each agent's unpadded graph inputs.

    Raises :class:`ConfigError` for shapes that do not fit the spec, fewer than :data:`PARITY_ROWS` rows,
    observations that are not finite, and discrete actions without masks.
    """
    agents = spec.agents
    expected = (len(agents), spec.observation_size)
    if np.ndim(observations) != 3 or np.shape(observations)[1:] != expected:
        raise ConfigError(
            f"observations for the parity check: expected shape [M, {expected[0]}, {expected[1]}], "
            f"got {list(np.shape(observations))}"
        )
    if len(observations) < PARITY_ROWS:
        raise ConfigError(
            f"observations for the parity check: expected at least {PARITY_ROWS} rows, got {len(observations)}"
        )
    samples = {
        agent.name: {"observation": observations[:, i, : agent.observation_size].astype(np.float32)}
        for i, agent in enumerate(agents)
    }
    if not all(np.isfinite(inputs["observation"]).all() for inputs in samples.values()):
        raise ConfigError("observations for the parity check: expected finite numbers, got NaN or infinity")
    if spec.action_kind == "discrete":
        masks_shape = (len(observations), len(agents), spec.action_size)
        if action_masks is None or np.shape(action_masks) != masks_shape:
            raise ConfigError(
                f"action_masks: {spec.task} has discrete actions, expected shape {list(masks_shape)}, "
                f"got {None if action_masks is None else list(np.shape(action_masks))}"
            )
        for i, agent in enumerate(agents):
            samples[agent.name]["action_mask"] = action_masks[:, i, : agent.action.size].astype(np.uint8)
    return dict(samples)


def check_parity(
    spec: TeamSpec, graphs: Mapping[str, PolicyGraph], folder: Path, samples: Mapping[str, Arrays]
) -> Parity:
    """Compare every agent's model with torch, and the team's model with the agents' models.

    ``graphs``: torch modules by model name, whose exported models lie in ``folder``. ``samples``: result of
    :func:`parity_samples`. Raises :class:`ExportError` at the first output that differs by more than its tolerance.
    """
    rows = len(samples[spec.names[0]]["observation"])
    models = {name: OnnxModel(folder / name / MODEL_FILE) for name in graphs}
    kind: DivergenceKind = "kl" if graphs[TEAM].kl else "neg_log_behavior"
    against_torch = OutputComparison("onnxruntime", "torch", ACTION_TOLERANCE, PARAMETER_TOLERANCE, kind)
    team_against_agents = OutputComparison(
        "the team's graph", "the agent's graph", TEAM_TOLERANCE, TEAM_TOLERANCE, kind
    )
    divergence: dict[str, NDArray[Any]] = {}
    zeros = {agent.name: np.zeros((rows, agent.action.size), np.float32) for agent in spec.agents}
    for case, noise in (("zero noise", zeros), ("random noise", NoiseSource(spec, seed=0).draw(rows))):
        inputs = {name: _graph_inputs(spec, samples[name], noise[name]) for name in spec.names}
        joined = {
            key: np.concatenate([inputs[name][key] for name in spec.names], axis=1)
            for key in input_names(spec)
        }
        decisions = split_decisions(spec, _run_onnx(models[TEAM], joined))
        for agent in spec.agents:
            graph, feeds, decision = graphs[agent.name], inputs[agent.name], decisions[agent.name]
            served = _run_onnx(models[agent.name], feeds)
            divergence.setdefault(agent.name, served["divergence"])
            of_torch = settle_ties(graph, feeds, served, _run_torch(graph, spec, feeds))
            against_torch.check(agent, case, noise[agent.name], served, of_torch)
            of_team = {
                "action": decision.action,
                "divergence": decision.divergence,
                **decision.parameters,
            }
            of_agent = settle_ties(graph, feeds, of_team, served)
            team_against_agents.check(agent, case, noise[agent.name], of_team, of_agent)
    report = {
        "rows": rows,
        "against_torch": against_torch.largest,
        "team_against_agents": team_against_agents.largest,
    }
    return Parity(report, divergence)


def _graph_inputs(spec: TeamSpec, sample: Arrays, noise: Float) -> Arrays:
    """Return an agent's inputs in the order in which its graph takes them."""
    inputs = {**sample, "noise": noise}
    return {key: inputs[key] for key in input_names(spec)}


def _run_onnx(model: OnnxModel, feeds: Arrays) -> Arrays:
    """Return the model's outputs on all rows."""
    try:
        answers = [model.run(block) for block in _blocks(feeds)]
    except Exception as error:  # onnxruntime raises its own unexported types
        raise ExportError(
            f"onnxruntime cannot run the exported graph on batches of 1 and of many: {str(error).splitlines()[0]}. "
            "Keep batch sizes out of the actors' arithmetic"
        ) from error
    return {key: np.concatenate([answer[key] for answer in answers]) for key in answers[0]}


def _run_torch(graph: PolicyGraph, spec: TeamSpec, feeds: Arrays) -> Arrays:
    """Return the torch module's outputs on all rows."""
    with torch.no_grad():
        answers = [graph(*map(torch.from_numpy, block.values())) for block in _blocks(feeds)]
    columns = zip(*answers, strict=True)
    return {key: torch.cat(column).numpy() for key, column in zip(output_names(spec), columns, strict=True)}


def _blocks(feeds: Arrays) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the first row alone and then the rest in blocks.

    A batch size that the tracer wrote into the graph fails on one of them, and a policy that evaluates a hundred
    actions per row fits into memory.
    """
    rows = len(next(iter(feeds.values())))
    for start, end in itertools.pairwise((0, *range(1, rows, _BLOCK_ROWS), rows)):
        yield {key: values[start:end] for key, values in feeds.items()}


def settle_ties(graph: PolicyGraph, feeds: Arrays, actual: Arrays, expected: Arrays) -> Arrays:
    """Return ``expected`` with the actual choice wherever the policy values both choices alike, up to rounding.

    Only policies that take the best of several actions have such ties. Outputs of the behaviour policy stay.
    """
    differ = np.abs(actual["action"].astype(np.float64) - expected["action"]) > ACTION_TOLERANCE.absolute
    rows = np.flatnonzero(differ.reshape(len(differ), -1).any(-1))
    if not len(rows):
        return expected
    chosen = actual["action"] if graph.discrete else np.tanh(actual["mean"])
    mask = torch.from_numpy(feeds["action_mask"][rows]) if graph.discrete else None
    with torch.no_grad():
        tied = graph.as_good(
            torch.from_numpy(feeds["observation"][rows]), torch.from_numpy(chosen[rows]), mask
        )
    settled = {key: values.copy() for key, values in expected.items()}
    tied_rows = rows[tied.numpy()]
    for key in ("action", "divergence", "logits" if graph.discrete else "mean"):
        settled[key][tied_rows] = actual[key][tied_rows]
    return settled


class OutputComparison:
    """Comparison of two sides' outputs that records the largest difference of each output.

    ``actual_side`` and ``expected_side`` name the sides in error messages. ``largest`` holds, per output,
    ``max_abs`` and, over values above 1e-3, ``max_rel``.
    """

    def __init__(
        self,
        actual_side: str,
        expected_side: str,
        action: Tolerance,
        parameter: Tolerance,
        kind: DivergenceKind,
    ) -> None:
        self._actual_side, self._expected_side = actual_side, expected_side
        self._action, self._parameter = action, parameter
        self._kind = kind
        self.largest: dict[str, dict[str, float]] = {}

    def check(self, agent: AgentSpec, case: str, noise: Float, actual: Arrays, expected: Arrays) -> None:
        """Raise :class:`ExportError` at the first output that differs by more than its tolerance.

        ``case`` names the kind of ``noise`` [M, A] in the message.
        """
        if agent.action.kind == "discrete":
            self._check_discrete(agent, case, noise, actual, expected)
            return
        for name in ("action", "behavior_action"):
            self._check_close(agent, case, name, actual[name], expected[name], self._action)
        without_density = self._kind == "neg_log_behavior"
        for name in CONTINUOUS_PARAMETERS:
            mean_slack = self._mean_slack(expected) if name == "mean" and without_density else 0.0
            self._check_close(agent, case, name, actual[name], expected[name], self._parameter, mean_slack)
        slack = self._density_slack(noise, expected) if without_density else 0.0
        self._check_close(
            agent, case, "divergence", actual["divergence"], expected["divergence"], self._parameter, slack
        )

    def _mean_slack(self, expected: Arrays) -> NDArray[Any]:
        """Return by how much the action's tolerance exceeds the mean's own [M, A], in units of the mean.

        A policy without a density acts by the mean alone, which may be the atanh of an action that it chose: near a
        bound that is steep, and says nothing more than the action does. The action itself is held to its tolerance;
        the mean gets a twentieth more, as at the limit rounding decides.
        """
        mean = expected["mean"].astype(np.float64)
        slack: NDArray[Any] = np.maximum(
            1.05 * self._action.allowed(np.tanh(mean)) * np.cosh(mean) ** 2 - self._parameter.allowed(mean),
            0.0,
        )
        return slack

    def _density_slack(self, noise: Float, expected: Arrays) -> NDArray[Any]:
        """Return the error of -log pi_b(a|o) [M] that the mean's tolerance allows, to first order.

        The density of a narrow behaviour policy is steep: its error is the action's error times the slope.
        """
        mean, mean_b = expected["mean"].astype(np.float64), expected["behavior_mean"]
        u = mean + np.exp(expected["log_std"]) * noise
        slope = np.abs(u - mean_b) * np.exp(-2.0 * expected["behavior_log_std"]) + 2.0
        allowed = self._parameter.allowed(mean) + self._mean_slack(expected)
        slack: NDArray[Any] = (slope * allowed).sum(axis=-1)
        return slack

    def _check_discrete(
        self, agent: AgentSpec, case: str, noise: Float, actual: Arrays, expected: Arrays
    ) -> None:
        same = self._check_choice(agent, case, "action", actual, expected, expected["logits"] + noise)
        self._check_choice(agent, case, "behavior_action", actual, expected, expected["behavior_logits"])
        for name in DISCRETE_PARAMETERS:
            self._check_close(agent, case, name, actual[name], expected[name], self._parameter)
            probabilities = np.exp(actual[name]), np.exp(expected[name])
            self._check_close(agent, case, f"exp({name})", *probabilities, self._action)
        # Where a near tie was broken differently, -log pi_b(a|o) belongs to two different actions.
        divergence = np.where(same, actual["divergence"], expected["divergence"])
        self._check_close(agent, case, "divergence", divergence, expected["divergence"], self._parameter)

    def _check_close(
        self,
        agent: AgentSpec,
        case: str,
        name: str,
        actual: NDArray[Any],
        expected: NDArray[Any],
        tolerance: Tolerance,
        slack: NDArray[Any] | float = 0.0,
    ) -> None:
        error, magnitude = np.abs(actual.astype(np.float64) - expected), np.abs(expected)
        allowed = tolerance.allowed(expected) + slack
        if len(outside := np.argwhere(~(error <= allowed))):  # a NaN is outside, too
            at = tuple(outside[0])
            limit = f"{allowed[at]:.3g}" if np.any(slack) else str(tolerance)
            self._fail(agent, case, name, int(at[0]), actual[at], expected[at], f"allowed: {limit}")
        large = magnitude > 1e-3
        largest = self.largest.setdefault(name, {"max_abs": 0.0, "max_rel": 0.0})
        largest["max_abs"] = max(largest["max_abs"], float(error.max()))
        largest["max_rel"] = max(
            largest["max_rel"], float((error[large] / magnitude[large]).max(initial=0.0))
        )

    def _check_choice(
        self,
        agent: AgentSpec,
        case: str,
        name: str,
        actual: Arrays,
        expected: Arrays,
        scores: NDArray[Any],
    ) -> NDArray[np.bool_]:
        """Return bool [M], True where both sides chose the same action; other choices must be near ties."""
        rows = np.arange(len(scores))
        deficit = scores[rows, expected[name]] - scores[rows, actual[name]]
        if len(outside := np.flatnonzero(~(deficit <= _NEAR_TIE))):
            row = int(outside[0])
            reason = f"its score is {deficit[row]:.3g} lower"
            self._fail(agent, case, name, row, actual[name][row], expected[name][row], reason)
        return np.asarray(actual[name] == expected[name])

    def _fail(
        self, agent: AgentSpec, case: str, name: str, row: int, actual: Any, expected: Any, reason: str
    ) -> NoReturn:
        raise ExportError(
            f"{name} of {agent.name}, observation {row}, {case}: {self._actual_side} gives {actual}, "
            f"{self._expected_side} {expected} ({reason}). The exported graph does not reproduce the policy, so "
            "nothing was written; export again with another torch or onnxruntime release, and report the two values"
        )
