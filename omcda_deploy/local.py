"""Run bundles in this process, through onnxruntime. Servers and ``evaluate --bundle`` do."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM, Bundle, input_names, output_names, parameter_names, read_bundle
from omcda_deploy.errors import BundleError, ContractError, MissingExtraError
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

    :meth:`act` raises :class:`ContractError` for inputs of other shapes and observations that are not finite.
    """

    def __init__(self, bundle: Bundle, agent: str, *, temperature: float = 0.0, seed: int = 0) -> None:
        self._noise = NoiseSource(bundle.spec, seed, temperature)
        self.temperature = self._noise.temperature
        self.spec: AgentSpec = bundle.spec.agent(agent)
        self._model = _load(bundle, agent)
        self._parameters = parameter_names(bundle.spec)
        self._discrete = self.spec.action.kind == "discrete"

    def reset(self) -> None:
        pass

    def act(
        self,
        observation: Float,
        *,
        noise: Float | None = None,
        action_mask: NDArray[np.uint8] | None = None,
    ) -> Decision:
        rows = _finite(observation, self.spec)
        shape = (len(rows), self.spec.action.size)
        name = self.spec.name
        noises = self._noise.for_call(None if noise is None else {name: noise}, {name: observation})
        feeds: dict[str, NDArray[Any]] = {
            "observation": rows,
            "noise": _or_default(noises[name] if noises else None, shape, np.float32, 0),
        }
        if self._discrete:
            feeds["action_mask"] = _or_default(action_mask, shape, np.uint8, 1)
        decision = decision_of(self._model.run(feeds), self._parameters)
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
        self._policies = {name: LocalPolicy(bundle, name) for name in bundle.spec.names}

    def reset(self) -> None:
        for policy in self._policies.values():
            policy.reset()

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        noise = self._noise.for_call(noise, observations)
        return {
            name: policy.act(
                observation_of(observations, name),
                noise=noise[name] if noise else None,
                action_mask=action_masks[name] if action_masks else None,
            )
            for name, policy in self._policies.items()
        }


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
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        noise = self._noise.for_call(noise, observations)
        agents = self.spec.agents
        single = np.ndim(observation_of(observations, agents[0].name)) == 1
        rows = [_finite(observation_of(observations, a.name), a) for a in agents]
        batch = len(rows[0])
        feeds: dict[str, NDArray[Any]] = {
            "observation": np.concatenate(rows, axis=1),
            "noise": np.concatenate(
                [
                    _or_default(noise[a.name] if noise else None, (batch, a.action.size), np.float32, 0)
                    for a in agents
                ],
                axis=1,
            ),
        }
        if self.spec.action_kind == "discrete":
            feeds["action_mask"] = np.concatenate(
                [
                    _or_default(
                        action_masks[a.name] if action_masks else None, (batch, a.action.size), np.uint8, 1
                    )
                    for a in agents
                ],
                axis=1,
            )
        decisions = split_decisions(self.spec, self._model.run(feeds))
        return {name: first_row(d) for name, d in decisions.items()} if single else decisions


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


def first_row(decision: Decision) -> Decision:
    """Turn the answer to a batch of one row into the answer to a single vector."""
    return Decision(
        decision.action[0],
        decision.divergence[0],
        {name: values[0] for name, values in decision.parameters.items()},
        None if decision.policy_weight is None else decision.policy_weight[0],
    )


def observation_of(observations: Mapping[str, Float], name: str) -> Float:
    """Take one agent's observation. Raises :class:`ContractError` where it is missing."""
    try:
        return observations[name]
    except (KeyError, IndexError, TypeError):
        got = sorted(observations) if isinstance(observations, Mapping) else type(observations).__name__
        raise ContractError(f"no observation for {name}: expected one per agent, got {got}") from None


def batch_of(vectors: NDArray[Any], width: int, what: str) -> Float:
    """Return [B, width] or [width] as contiguous float32 [B, width]; raise :class:`ContractError` for other shapes.

    ``what`` names the vectors in the message.
    """
    try:
        if np.iscomplexobj(vectors):
            raise TypeError("complex numbers")  # numpy would drop their imaginary parts
        rows = np.ascontiguousarray(vectors, np.float32)
    except (TypeError, ValueError):
        raise ContractError(
            f"{what}: expected numbers of shape [B, {width}] or [{width}], got {type(vectors).__name__} "
            f"{reprlib.repr(vectors)}"
        ) from None
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ContractError(
            f"{what}: expected shape [B, {width}] or [{width}], got {list(np.shape(vectors))}"
        )
    return rows


def _finite(observation: NDArray[Any], agent: AgentSpec) -> Float:
    """Return the observation as :func:`batch_of` does; refuse infinite numbers and NaN, as a server does."""
    rows = batch_of(observation, agent.observation_size, f"observation of {agent.name}")
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0].tolist()
        raise ContractError(
            f"observation of {agent.name}: expected finite numbers, got {rows[row, column]} in row {row}, column "
            f"{column}: look at what the simulator shows"
        )
    return rows


def _or_default(
    values: NDArray[Any] | None, shape: tuple[int, int], dtype: Any, default: int
) -> NDArray[Any]:
    if values is None:
        return np.full(shape, default, dtype)
    rows = np.ascontiguousarray(values, dtype).reshape(-1, shape[1])
    if rows.shape != shape:
        raise ContractError(f"expected noise or mask of shape {list(shape)}, got {list(np.shape(values))}")
    return rows


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
