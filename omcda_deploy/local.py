"""Run bundles in this process, through onnxruntime. Servers and ``evaluate --bundle`` do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM, Bundle, input_names, output_names, parameter_names, read_bundle
from omcda_deploy.errors import BundleError, MissingExtraError
from omcda_deploy.inputs import Mask, agent_rows, joined_rows, team_rows, with_noise, with_zero_noise
from omcda_deploy.policy import Decision, Float, NoiseSource
from omcda_deploy.spec import AgentSpec, TeamSpec

_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}


class OnnxModel:
    """One graph on one thread.

    These graphs run for tens of microseconds: a second intra-op thread costs more than it saves and starves the
    control loop beside it. One thread also makes answers equal to the last digit wherever the model runs. Raises
    MissingExtraError without onnxruntime and :class:`BundleError` for a file that it cannot load.
    """

    def __init__(self, path: Path) -> None:
        # Turn off onnxruntime's telemetry. It reads the variable once, when it is first imported.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "serve") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self.row = BoundRow(onnxruntime.OrtValue, self._session)
        except Exception as error:  # onnxruntime raises its own unexported types
            raise BundleError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
        self._releasing = onnxruntime.RunOptions()
        self._releasing.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.inputs = tuple(entry.name for entry in self._session.get_inputs())
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())

    def run(self, feeds: Mapping[str, NDArray[Any]], *, release: bool = False) -> dict[str, NDArray[Any]]:
        """Compute all outputs. ``feeds`` holds all inputs, of the graph's types and widths and of one row count.

        ``release``: free the memory that larger batches needed before, which onnxruntime otherwise keeps for the
        next one.
        """
        if len(feeds[self.inputs[0]]) == 1:
            return self.row.answer(feeds)
        options = self._releasing if release else None
        return dict(zip(self.outputs, self._session.run(self.outputs, feeds, options), strict=True))


class BoundRow:
    """A graph bound once to arrays of one row, because a control step has one and binding anew costs more.

    ``inputs`` and ``outputs`` are these arrays [1, ...] by name; :meth:`run` reads and writes them. They serve one
    caller at a time: a caller that uses them directly, rather than :meth:`answer`, must hold ``lock``.
    """

    def __init__(self, value: Any, session: Any) -> None:
        """``value`` is onnxruntime's class ``OrtValue``, ``session`` an ``InferenceSession``."""
        self._session, self._binding = session, session.io_binding()
        self.inputs, self.outputs = (
            {entry.name: np.zeros((1, *entry.shape[1:]), _DTYPES[entry.type]) for entry in entries}
            for entries in (session.get_inputs(), session.get_outputs())
        )
        for name, array in self.inputs.items():
            self._binding.bind_ortvalue_input(
                name, value.ortvalue_from_numpy(array)
            )  # shares the array's memory
        for name, array in self.outputs.items():
            self._binding.bind_ortvalue_output(name, value.ortvalue_from_numpy(array))
        self.lock = Lock()

    def run(self) -> None:
        """Compute ``outputs`` from ``inputs``, in place."""
        self._session.run_with_iobinding(self._binding)

    def answer(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute copies of all outputs, as :meth:`OnnxModel.run` does for one row."""
        with self.lock:
            for name, array in self.inputs.items():
                array[...] = feeds[name]
            self.run()
            return {name: array.copy() for name, array in self.outputs.items()}


class LocalPolicy:
    """One agent of a bundle, in this process; ``temperature`` and ``seed`` are those of :class:`LocalTeam`.

    :meth:`act` raises :class:`ContractError` for inputs that a served policy refuses (:mod:`omcda_deploy.inputs`).
    """

    def __init__(self, bundle: Bundle, agent: str, *, temperature: float = 0.0, seed: int = 0) -> None:
        self._noise = NoiseSource(bundle.spec, seed, temperature)
        self.temperature = self._noise.temperature
        self.spec: AgentSpec = bundle.spec.agent(agent)
        self._model = _load(bundle, agent)
        self._parameters = parameter_names(bundle.spec)

    def reset(self) -> None:
        pass

    def act(
        self, observation: Float, *, noise: Float | None = None, action_mask: Mask | None = None
    ) -> Decision:
        name = self.spec.name
        rows = agent_rows(self.spec, observation, noise, action_mask)
        with_noise({name: rows}, self._noise, None if noise is None else {name: noise})
        decision = decision_of(self._model.run(with_zero_noise(self.spec, rows)), self._parameters)
        return decision if np.ndim(observation) == 2 else first_row(decision)


class LocalTeam:
    """All agents of a bundle in this process, one graph each, as per-agent servers run them.

    ``temperature``: T of calls without ``noise``, 0 for deterministic actions, 1 for samples; their noise is drawn
    from ``seed``. Noise that a call brings is used as it is. Raises :class:`ConfigError` for a temperature out of
    range.
    """

    def __init__(self, bundle: Bundle | str | Path, *, temperature: float = 0.0, seed: int = 0) -> None:
        if not isinstance(bundle, Bundle):
            bundle = read_bundle(bundle)
        self.bundle = bundle
        self.spec: TeamSpec = bundle.spec
        self.bundle_digest, self.divergence_kind = bundle.digest, bundle.divergence_kind
        self.budgets = bundle.budgets
        self._noise = NoiseSource(bundle.spec, seed, temperature)
        self.temperature = self._noise.temperature
        self._models = {name: _load(bundle, name) for name in bundle.spec.names}
        self._parameters = parameter_names(bundle.spec)

    def reset(self) -> None:
        pass

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, Mask] | None = None,
    ) -> dict[str, Decision]:
        rows = team_rows(self.spec, observations, noise, action_masks)
        with_noise(rows, self._noise, noise)
        decisions = {
            a.name: decision_of(self._models[a.name].run(with_zero_noise(a, rows[a.name])), self._parameters)
            for a in self.spec.agents
        }
        return in_kind(decisions, observations)


class JointTeam:
    """All agents of a bundle in this process through the team graph: one run per control step.

    ``temperature`` and ``seed`` are those of :class:`LocalTeam`.
    """

    def __init__(self, bundle: Bundle | str | Path, *, temperature: float = 0.0, seed: int = 0) -> None:
        if not isinstance(bundle, Bundle):
            bundle = read_bundle(bundle)
        self.bundle = bundle
        self.spec: TeamSpec = bundle.spec
        self.bundle_digest, self.divergence_kind = bundle.digest, bundle.divergence_kind
        self.budgets = bundle.budgets
        self._noise = NoiseSource(bundle.spec, seed, temperature)
        self.temperature = self._noise.temperature
        self._model = _load(bundle, TEAM)

    def reset(self) -> None:
        pass

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, Mask] | None = None,
    ) -> dict[str, Decision]:
        rows = team_rows(self.spec, observations, noise, action_masks)
        with_noise(rows, self._noise, noise)
        feeds = joined_rows(self.spec, {a.name: with_zero_noise(a, rows[a.name]) for a in self.spec.agents})
        return in_kind(split_decisions(self.spec, self._model.run(feeds)), observations)


def split_decisions(spec: TeamSpec, outputs: Mapping[str, NDArray[Any]]) -> dict[str, Decision]:
    """Split the team graph's joined outputs into one :class:`Decision` per agent."""
    decisions = {}
    for index, (agent, columns) in enumerate(zip(spec.agents, spec.action_slices, strict=True)):
        action_columns = columns if agent.action.kind == "continuous" else index
        decisions[agent.name] = Decision(
            outputs["action"][:, action_columns],
            outputs["divergence"][:, index],
            {
                "behavior_action": outputs["behavior_action"][:, action_columns],
                **{name: outputs[name][:, columns] for name in parameter_names(spec)},
            },
            outputs["policy_weight"][:, index] if "policy_weight" in outputs else None,
        )
    return decisions


def decision_of(outputs: Mapping[str, NDArray[Any]], parameters: tuple[str, ...]) -> Decision:
    """Wrap the outputs of one agent's graph."""
    return Decision(
        outputs["action"],
        outputs["divergence"],
        {name: outputs[name] for name in ("behavior_action", *parameters)},
        outputs.get("policy_weight"),
    )


def in_kind(decisions: Mapping[str, Decision], observations: Mapping[str, Float]) -> dict[str, Decision]:
    """Turn the answers to batches into the answers to ``observations``, of which some are single vectors."""
    return {
        name: decision if np.ndim(observations[name]) == 2 else first_row(decision)
        for name, decision in decisions.items()
    }


def first_row(decision: Decision) -> Decision:
    """Turn the answer to a batch of one row into the answer to a single vector."""
    return Decision(
        decision.action[0],
        decision.divergence[0],
        {name: values[0] for name, values in decision.parameters.items()},
        None if decision.policy_weight is None else decision.policy_weight[0],
    )


def _load(bundle: Bundle, model: str) -> OnnxModel:
    loaded = OnnxModel(bundle.model_path(model))
    if set(loaded.inputs) != set(input_names(bundle.spec)) or set(loaded.outputs) != set(
        output_names(bundle.spec)
    ):
        raise BundleError(
            f"{bundle.model_path(model)}: expected inputs {list(input_names(bundle.spec))} and outputs "
            f"{list(output_names(bundle.spec))}, found {list(loaded.inputs)} and {list(loaded.outputs)}"
        )
    return loaded
