"""The README of a bundle, for whoever is handed the folder: what it holds, and how it is served and called.

It follows from the manifest and is not listed there, so it is no part of the bundle's digest.
"""

from __future__ import annotations

from collections.abc import Iterator

from omcda_deploy import registry
from omcda_deploy.bundle import MODEL_FILE, TEAM, Bundle, DivergenceKind
from omcda_deploy.formatting import count
from omcda_deploy.protos.tensors import Tensor, input_tensors, output_tensors
from omcda_deploy.spec import AgentSpec, TeamSpec

README = "README.md"

_DTYPES = {"FP32": "float32", "INT64": "int64", "UINT8": "uint8"}
_DIVERGENCES: dict[DivergenceKind, str] = {
    "kl": "KL(policy, behaviour policy) in nats",
    "neg_log_behavior": "-log of the behaviour policy's density at the action, in nats",
}
_MEANINGS = {
    "action_mask": "1 where a choice is available",
    "behavior_action": "the behaviour policy's action without noise",
    "mean": "of the policy's Gaussian, before the tanh",
    "log_std": "log of its standard deviation, before the tanh",
    "behavior_mean": "the same of the behaviour policy",
    "behavior_log_std": "the same of the behaviour policy",
    "logits": "log-probabilities of the choices",
    "behavior_logits": "the same of the behaviour policy",
}
_PROVENANCE = ("algorithm", "step", "seed", "dataset_digest", "tier", "checkpoint")


def readme(bundle: Bundle) -> str:
    """Return the text of a bundle's README, in Markdown."""
    return "\n".join(_lines(bundle)) + "\n"


def _lines(bundle: Bundle) -> Iterator[str]:
    spec, training = bundle.spec, bundle.manifest.get("training", {})
    yield f"# Policies for {spec.task}"
    yield ""
    yield (
        f"A team of {len(spec.agents)} agents at {spec.control_rate:.4g} Hz, as ONNX graphs: one per agent, "
        f"`AGENT/{MODEL_FILE}`, and `{TEAM}/{MODEL_FILE}` of all agents in one. `bundle.json` has the team, the "
        "provenance and the sha256 of every other file but this one. Written by `omcda-deploy export`."
    )
    yield ""
    for name in _PROVENANCE:
        if name in training:
            yield f"* {name.replace('_', ' ')}: {training[name]}"
    yield f"* contract: {spec.contract_hash}"
    yield ""
    yield "| agent | observes | does | divergence budget (nats) |"
    yield "|---|---|---|---|"
    for agent in spec.agents:
        budget = bundle.budgets[agent.name]
        told = "" if budget is None else f"{budget:.4g}"
        yield f"| `{agent.name}` | {count(agent.observation_size, 'number')} | {_action(agent)} | {told} |"
    yield ""
    if spec.task in registry.tasks():
        yield f"`omcda-deploy describe {spec.task}` says what each number is, in order and with its unit."
    else:
        yield "The numbers are those of the dataset that the policies were trained on, in its order and units."
    yield from _tensors(bundle)
    yield from _calls(spec)


def _tensors(bundle: Bundle) -> Iterator[str]:
    spec = bundle.spec
    agent = spec.names[0]
    yield ""
    yield f"## Inputs and outputs of `{agent}`"
    yield ""
    yield (
        f"B rows in a batch. In `{TEAM}` the agents' vectors are joined in the order above, and [B] is "
        f"[B, {len(spec.names)}]."
    )
    yield ""
    yield "| | tensor | type | shape | |"
    yield "|---|---|---|---|---|"
    for way, tensors in (("in", input_tensors(spec, agent)), ("out", output_tensors(spec, agent))):
        for tensor in tensors:
            shape = "[B]" if tensor.width is None else f"[B, {tensor.width}]"
            meaning = _meaning(tensor, bundle)
            yield f"| {way} | `{tensor.name}` | {_DTYPES[tensor.datatype]} | {shape} | {meaning} |"


def _meaning(tensor: Tensor, bundle: Bundle) -> str:
    spec = bundle.spec
    continuous, plain = spec.action_kind == "continuous", spec.normalizer.kind == "none"
    drawn = "standard normal" if continuous else "standard Gumbel"
    special = {
        "observation": "as it is" if plain else "raw or normalised: the graph normalises",
        "noise": f"zeros for the deterministic action; {drawn} numbers for a sample",
        "action": "for the simulator: within its bounds" if continuous else "for the simulator: the choice",
        "divergence": _DIVERGENCES[bundle.divergence_kind],
    }
    return special.get(tensor.name) or _MEANINGS[tensor.name]


def _action(agent: AgentSpec) -> str:
    action = agent.action
    if action.kind == "discrete":
        return str(action)
    return f"{count(action.size, 'number')} from {action.low:g} to {action.high:g}"


def _calls(spec: TeamSpec) -> Iterator[str]:
    agent = spec.agents[0]
    rows = {
        "observation": f"np.zeros((1, {agent.observation_size}), np.float32)",
        "noise": f"np.zeros((1, {agent.action.size}), np.float32)",
        "action_mask": f"np.ones((1, {agent.action.size}), np.uint8)",
    }
    inputs = [f'"{tensor.name}": {rows[tensor.name]}' for tensor in input_tensors(spec, agent.name)]
    yield from (
        "",
        "## Serve",
        "",
        "```sh",
        "pip install 'omcda-deploy[serve]'",
        "omcda-deploy serve . --base-port 8500   # one process per agent, on consecutive ports",
        "```",
        "",
        "Triton loads this folder as a model repository as it stands.",
        "",
        "## Call with onnxruntime alone",
        "",
        "```python",
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{agent.name}/{MODEL_FILE}")',
        f"inputs = {{{', '.join(inputs)}}}",
        'action, divergence = session.run(["action", "divergence"], inputs)',
        "```",
    )
