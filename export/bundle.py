"""Write a bundle (:mod:`omcda_deploy.bundle`) from torch actors, or fail and leave nothing behind.

The graphs are traced by torch's TorchScript exporter: it needs no package beyond onnx, and writes the same bytes
each time. What is served is compared with torch on real observations before the bundle gets its name.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from omcda_deploy.bundle import (
    CONFIG_FILE,
    CONTINUOUS_PARAMETERS,
    DISCRETE_PARAMETERS,
    MANIFEST,
    MODEL_FILE,
    SCHEMA_VERSION,
    TEAM,
    Bundle,
    DivergenceKind,
    input_names,
    output_names,
    read_bundle,
    sha256,
)
from omcda_deploy.errors import BundleError, ConfigError, ExportError
from omcda_deploy.export.graph import PolicyGraph
from omcda_deploy.guard import DataReference
from omcda_deploy.local import OnnxModel, split_decisions
from omcda_deploy.policy import Float, NoiseSource
from omcda_deploy.spec import AgentSpec, TeamSpec

OPSET = (
    17  # the newest that TorchScript's exporter knows in every torch we support, and any onnxruntime reads
)
PARITY_ROWS = 1000
_PARITY_BLOCK = 111  # rows
_NEAR_TIE = 1e-4  # a discrete choice may differ where the runner-up is nearer than this

Arrays = Mapping[str, NDArray[Any]]


class _Tolerance(NamedTuple):
    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.absolute:g} + {self.relative:g} of the value"


_ACTION = _Tolerance(1e-5, 0.0)  # also of probabilities
_PARAMETER = _Tolerance(1e-5, 1e-4)
_TEAM = _Tolerance(1e-5, 1e-5)  # of the team graph against the agents' graphs: another order of the same sums


def export_bundle(
    out: Path,
    spec: TeamSpec,
    policy: nn.Module,
    behavior: nn.Module,
    *,
    observations: NDArray[Any],
    divergence_kind: DivergenceKind,
    budgets: Mapping[str, float | None],
    alphas: Mapping[str, float | None],
    provenance: Mapping[str, Any],
    action_masks: NDArray[Any] | None = None,
) -> Bundle:
    """Export a team to the new folder ``out``, verified, and return it as read back.

    ``policy`` and ``behavior``: modules that fit ``export.graph.ContinuousActor`` or ``DiscreteActor``, on any
    device, left as they are; give the same module twice for a behaviour policy itself. ``observations``
    [M >= 1000, N, O] are real ones for the parity check, raw or normalised, each agent's own entries first;
    ``action_masks`` [M, N, A] go with them where actions are discrete. ``budgets`` and ``alphas`` hold d_i (nats)
    and alpha_i per agent, or None. ``provenance`` is JSON and passed through.

    Raises :class:`BundleError` when ``out`` exists, :class:`ConfigError` for arguments that do not fit the spec,
    :class:`ExportError` when the exported graphs do not reproduce the actors.
    """
    if os.path.lexists(out):
        raise BundleError(f"{out} exists already: choose another --out, or remove it first")
    if divergence_kind not in get_args(DivergenceKind):
        raise ConfigError(
            f"divergence_kind: expected one of {', '.join(get_args(DivergenceKind))}, got {divergence_kind!r}"
        )
    for what, values in (("budgets", budgets), ("alphas", alphas)):
        if set(values) != set(spec.names):
            raise ConfigError(
                f"{what}: expected one for each of {', '.join(spec.names)}, got {sorted(values)}"
            )
    feeds = _parity_feeds(spec, observations, action_masks)

    # Copied as a pair: a behaviour policy that is the policy stays one module and is computed once.
    policy, behavior = copy.deepcopy((policy, behavior))
    graphs = {
        name: PolicyGraph(spec, policy, behavior, divergence_kind, index).cpu().eval()
        for index, name in enumerate(spec.names)
    }
    graphs[TEAM] = PolicyGraph(spec, policy, behavior, divergence_kind).cpu().eval()

    out = Path(out).absolute()
    anchor = next(parent for parent in out.parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=anchor) as scratch:
        folder = Path(scratch) / out.name  # the scratch folder itself is private to this user
        for name, graph in graphs.items():
            file = folder / name / MODEL_FILE
            file.parent.mkdir(parents=True)
            model = _trace(graph, spec, name, file)
            file.write_bytes(model.SerializeToString(deterministic=True))
            onnx.checker.check_model(str(file), full_check=True)
            (folder / name / CONFIG_FILE).write_text(triton_config(model, name))
        parity, divergence = _check_parity(spec, graphs, folder, feeds)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "contract_hash": spec.contract_hash,
            "team": spec.to_json(),
            "divergence_kind": divergence_kind,
            "agents": {
                agent.name: {
                    "budget": budgets[agent.name],
                    "alpha": alphas[agent.name],
                    "reference": dataclasses.asdict(
                        DataReference.of(spec, agent, feeds[agent.name][0], divergence[agent.name])
                    ),
                }
                for agent in spec.agents
            },
            "training": dict(provenance),
            "parity": parity,
            "exporter": {
                "omcda-deploy": importlib.metadata.version("omcda-deploy"),
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "opset": OPSET,
            },
            "files": {
                str(file.relative_to(folder)): sha256(file)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            },
        }
        try:
            text = json.dumps(manifest, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"provenance, budgets and alphas must be finite JSON values: {error}"
            ) from error
        (folder / MANIFEST).write_text(text + "\n")
        read_bundle(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(out)
    return read_bundle(out)


def triton_config(model: onnx.ModelProto, name: str) -> str:
    """The model's ``config.pbtxt``.

    ``max_batch_size: 0`` with the batch as an ordinary dynamic dimension: Triton's batched form has no ``[B]``
    output, it would answer ``[B, 1]`` where our own server answers ``[B]``.
    """
    triton_type: dict[int, str] = {
        onnx.TensorProto.FLOAT: "TYPE_FP32",
        onnx.TensorProto.INT64: "TYPE_INT64",
        onnx.TensorProto.UINT8: "TYPE_UINT8",
    }

    def tensor(value: onnx.ValueInfoProto) -> str:
        kind = value.type.tensor_type
        dims = ", ".join(str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in kind.shape.dim)
        return f'  {{ name: "{value.name}" data_type: {triton_type[kind.elem_type]} dims: [ {dims} ] }}'

    inputs, outputs = (",\n".join(map(tensor, values)) for values in (model.graph.input, model.graph.output))
    return (
        f'name: "{name}"\nplatform: "onnxruntime_onnx"\nbackend: "onnxruntime"\nmax_batch_size: 0\n'
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"
    )


def _trace(graph: PolicyGraph, spec: TeamSpec, name: str, file: Path) -> onnx.ModelProto:
    """The graph as an ONNX model called ``name``; ``file`` is where torch may write on the way."""
    agents = spec.agents if graph.agent is None else (spec.agents[graph.agent],)
    actions = sum(agent.action.size for agent in agents)
    example = [torch.zeros(2, sum(agent.observation_size for agent in agents)), torch.zeros(2, actions)]
    if spec.action_kind == "discrete":
        example.append(torch.ones(2, actions, dtype=torch.uint8))
    names = (*input_names(spec), *output_names(spec))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the TorchScript exporter, chosen knowingly
        torch.onnx.export(
            graph,
            tuple(example),
            file,
            input_names=list(input_names(spec)),
            output_names=list(output_names(spec)),
            dynamic_axes={tensor: {0: "batch"} for tensor in names},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(file)
    model.graph.name = name
    for value in model.graph.output:
        # The tracer loses static widths behind a reshape; servers and Triton are told them all the same.
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 2:
            dims[1].dim_value = len(agents) if value.name in _per_agent_outputs(spec) else actions
    for node in model.graph.node:
        node.doc_string = ""  # some torch releases put the exporting machine's paths here
    return model


def _per_agent_outputs(spec: TeamSpec) -> set[str]:
    """Outputs that are one number per agent, ``[B]`` or ``[B, N]``."""
    discrete = {"action", "behavior_action"} if spec.action_kind == "discrete" else set()
    return {"divergence"} | discrete


def _parity_feeds(
    spec: TeamSpec, observations: NDArray[Any], action_masks: NDArray[Any] | None
) -> dict[str, tuple[NDArray[Any], ...]]:
    """Per agent: its own entries of the observations and, for discrete actions, of the masks."""
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
    own = {a.name: observations[:, i, : a.observation_size].astype(np.float32) for i, a in enumerate(agents)}
    if not all(np.isfinite(rows).all() for rows in own.values()):
        raise ConfigError("observations for the parity check: expected finite numbers, got NaN or infinity")
    if spec.action_kind == "continuous":
        return {name: (rows,) for name, rows in own.items()}
    masks_shape = (len(observations), len(agents), spec.action_size)
    if action_masks is None or np.shape(action_masks) != masks_shape:
        raise ConfigError(
            f"action_masks: {spec.task} has discrete actions, expected shape {list(masks_shape)}, "
            f"got {None if action_masks is None else list(np.shape(action_masks))}"
        )
    return {
        a.name: (own[a.name], action_masks[:, i, : a.action.size].astype(np.uint8))
        for i, a in enumerate(agents)
    }


def _check_parity(
    spec: TeamSpec,
    graphs: Mapping[str, PolicyGraph],
    folder: Path,
    feeds: Mapping[str, tuple[NDArray[Any], ...]],
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Compare every agent's model with torch and the team's with the agents'.

    Returns the largest errors, and each agent's divergence [M] under its deterministic action.
    """
    rows = len(feeds[spec.names[0]][0])
    models = {name: OnnxModel(folder / name / MODEL_FILE) for name in graphs}
    kind: DivergenceKind = "kl" if graphs[TEAM].kl else "neg_log_behavior"
    against_torch = _Comparison("onnxruntime", "torch", _ACTION, _PARAMETER, kind)
    team_against_agents = _Comparison("the team's graph", "the agent's graph", _TEAM, _TEAM, kind)
    divergence: dict[str, NDArray[Any]] = {}
    still = {agent.name: np.zeros((rows, agent.action.size), np.float32) for agent in spec.agents}
    for case, noise in (("zero noise", still), ("random noise", NoiseSource(spec, seed=0).draw(rows))):
        inputs = {
            name: dict(zip(input_names(spec), (feeds[name][0], noise[name], *feeds[name][1:]), strict=True))
            for name in spec.names
        }
        joined = {
            key: np.concatenate([inputs[name][key] for name in spec.names], axis=1)
            for key in input_names(spec)
        }
        team = split_decisions(spec, _serve(models[TEAM], joined))
        for agent in spec.agents:
            served = _serve(models[agent.name], inputs[agent.name])
            divergence.setdefault(agent.name, served["divergence"])
            wanted = _run(graphs[agent.name], spec, inputs[agent.name])
            part = team[agent.name]
            of_team = {"action": part.action, "divergence": part.divergence, **part.parameters}
            graph, feed = graphs[agent.name], inputs[agent.name]
            of_torch = _settle_ties(graph, feed, served, wanted)
            against_torch.check(agent, case, noise[agent.name], served, of_torch)
            of_agent = _settle_ties(graph, feed, of_team, served)
            team_against_agents.check(agent, case, noise[agent.name], of_team, of_agent)
    return {
        "rows": rows,
        "against_torch": against_torch.largest,
        "team_against_agents": team_against_agents.largest,
    }, divergence


def _serve(model: OnnxModel, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """The model's outputs on all rows."""
    try:
        answers = [model.run(block) for block in _blocks(feeds)]
    except Exception as error:  # onnxruntime raises its own unexported types
        raise ExportError(
            f"onnxruntime cannot run the exported graph on batches of 1 and of many: {str(error).splitlines()[0]}. "
            "Keep batch sizes out of the actors' arithmetic"
        ) from error
    return {key: np.concatenate([answer[key] for answer in answers]) for key in answers[0]}


def _run(graph: PolicyGraph, spec: TeamSpec, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """The same of the torch module."""
    with torch.no_grad():
        answers = [graph(*map(torch.from_numpy, block.values())) for block in _blocks(feeds)]
    columns = zip(*answers, strict=True)
    return {key: torch.cat(column).numpy() for key, column in zip(output_names(spec), columns, strict=True)}


def _blocks(feeds: Arrays) -> Iterator[dict[str, NDArray[Any]]]:
    """The first row alone and then the rest in blocks.

    A batch size baked into the graph shows in one of them, and a policy that weighs a hundred actions per row fits
    into memory.
    """
    rows = len(next(iter(feeds.values())))
    for start, end in itertools.pairwise((0, *range(1, rows, _PARITY_BLOCK), rows)):
        yield {key: values[start:end] for key, values in feeds.items()}


def _settle_ties(graph: PolicyGraph, feed: Arrays, got: Arrays, want: Arrays) -> Arrays:
    """``want``, but with the other side's choice where the policy values both the same up to rounding.

    Only policies that take the best of several actions have such ties. The behaviour's outputs stay.
    """
    differ = np.abs(got["action"].astype(np.float64) - want["action"]) > _ACTION.absolute
    rows = np.flatnonzero(differ.reshape(len(differ), -1).any(-1))
    if not len(rows):
        return want
    taken = got["action"] if graph.discrete else np.tanh(got["mean"])
    observation, _, *mask = (torch.from_numpy(values[rows]) for values in feed.values())
    with torch.no_grad():
        tied = graph.as_good(observation, torch.from_numpy(taken[rows]), mask[0] if mask else None)
    settled = {key: values.copy() for key, values in want.items()}
    for key in ("action", "divergence", "logits") if graph.discrete else ("action", "divergence", "mean"):
        settled[key][rows[tied.numpy()]] = got[key][rows[tied.numpy()]]
    return settled


class _Comparison:
    """Two sides that must give equal outputs, and by how much they differed at most."""

    def __init__(
        self, got_is: str, want_is: str, action: _Tolerance, parameter: _Tolerance, kind: DivergenceKind
    ) -> None:
        self._kind = kind
        self._got_is, self._want_is = got_is, want_is
        self._action, self._parameter = action, parameter
        self.largest: dict[
            str, dict[str, float]
        ] = {}  # per output: max_abs, and max_rel where |value| > 1e-3

    def check(self, agent: AgentSpec, case: str, noise: Float, got: Arrays, want: Arrays) -> None:
        """Raise :class:`ExportError` at the first output that differs by more than its tolerance."""
        if agent.action.kind == "discrete":
            self._check_discrete(agent, case, noise, got, want)
            return
        for name in ("action", "behavior_action"):
            self._close(agent, case, name, got[name], want[name], self._action)
        for name in CONTINUOUS_PARAMETERS:
            self._close(agent, case, name, got[name], want[name], self._parameter)
        slack = self._slack(noise, want) if self._kind == "neg_log_behavior" else 0.0
        self._close(agent, case, "divergence", got["divergence"], want["divergence"], self._parameter, slack)

    def _slack(self, noise: Float, want: Arrays) -> NDArray[Any]:
        """[B] what the difference that is allowed in the mean makes of -log pi_b(a|o), to first order.

        The density of a narrow behaviour policy is steep: it is no more exact than the action times its slope.
        """
        mean, mean_b = want["mean"].astype(np.float64), want["behavior_mean"]
        u = mean + np.exp(want["log_std"]) * noise
        slope = np.abs(u - mean_b) * np.exp(-2.0 * want["behavior_log_std"]) + 2.0
        allowed = self._parameter.absolute + self._parameter.relative * np.abs(mean)
        slack: NDArray[Any] = (slope * allowed).sum(axis=-1)
        return slack

    def _check_discrete(self, agent: AgentSpec, case: str, noise: Float, got: Arrays, want: Arrays) -> None:
        same = self._same_choice(agent, case, "action", got, want, want["logits"] + noise)
        self._same_choice(agent, case, "behavior_action", got, want, want["behavior_logits"])
        for name in DISCRETE_PARAMETERS:
            self._close(agent, case, name, got[name], want[name], self._parameter)
            self._close(agent, case, f"exp({name})", np.exp(got[name]), np.exp(want[name]), self._action)
        # Where the two sides took different sides of a tie, -log pi_b(a|o) is of different actions.
        divergence = np.where(same, got["divergence"], want["divergence"])
        self._close(agent, case, "divergence", divergence, want["divergence"], self._parameter)

    def _close(
        self,
        agent: AgentSpec,
        case: str,
        name: str,
        got: NDArray[Any],
        want: NDArray[Any],
        tolerance: _Tolerance,
        slack: NDArray[Any] | float = 0.0,
    ) -> None:
        error = np.abs(got.astype(np.float64) - want)
        allowed = tolerance.absolute + tolerance.relative * np.abs(want) + slack
        if len(bad := np.argwhere(~(error <= allowed))):
            at = tuple(bad[0])
            self._fail(agent, case, name, int(at[0]), got[at], want[at], f"allowed: {tolerance}")
        self._record(name, got, want)

    def _record(self, name: str, got: NDArray[Any], want: NDArray[Any]) -> None:
        error, magnitude = np.abs(got.astype(np.float64) - want), np.abs(want)
        large = magnitude > 1e-3
        seen = self.largest.setdefault(name, {"max_abs": 0.0, "max_rel": 0.0})
        seen["max_abs"] = max(seen["max_abs"], float(error.max()))
        seen["max_rel"] = max(seen["max_rel"], float((error[large] / magnitude[large]).max(initial=0.0)))

    def _same_choice(
        self, agent: AgentSpec, case: str, name: str, got: Arrays, want: Arrays, scores: NDArray[Any]
    ) -> NDArray[np.bool_]:
        rows = np.arange(len(scores))
        behind = scores[rows, want[name]] - scores[rows, got[name]]
        if len(bad := np.flatnonzero(~(behind <= _NEAR_TIE))):
            row = int(bad[0])
            reason = f"its score is {behind[row]:.3g} lower"
            self._fail(agent, case, name, row, got[name][row], want[name][row], reason)
        return np.asarray(got[name] == want[name])

    def _fail(
        self, agent: AgentSpec, case: str, name: str, row: int, got: Any, want: Any, reason: str
    ) -> NoReturn:
        raise ExportError(
            f"{name} of {agent.name}, observation {row}, {case}: {self._got_is} gives {got}, {self._want_is} "
            f"{want} ({reason}). The exported graph does not reproduce the policy, so nothing was written; "
            "export again with another torch or onnxruntime release, and report the two values"
        )
