"""Bundles: trained teams in the form in which they are deployed.

A bundle is a folder in Triton's model-repository layout plus a manifest::

    bundle.json                       team, agents' budgets and data, provenance, sha256 of every other file
    agent_0/config.pbtxt  agent_0/1/model.onnx        one graph per agent
    …
    team/config.pbtxt     team/1/model.onnx           all agents in one graph
    README.md                         the same for people; not listed in the manifest

Inputs of an agent's graph (B is dynamic):

| name          | type    | shape  | |
|---------------|---------|--------|-|
| `observation` | float32 | [B, O] | raw or normalised: normalisation is inside the graph and idempotent |
| `noise`       | float32 | [B, A] | zeros for the deterministic action (:class:`omcda_deploy.policy.NoiseSource`) |
| `action_mask` | uint8   | [B, A] | discrete only; 1 where the action is available |

Outputs:

| name              | type            | shape          | |
|-------------------|-----------------|----------------|-|
| `action`          | float32 / int64 | [B, A] / [B]   | ready for the simulator |
| `divergence`      | float32         | [B]            | nats; of the manifest's `divergence_kind` |
| `behavior_action` | as `action`     |                | the behaviour policy's deterministic action |
| `mean`, `log_std`, `behavior_mean`, `behavior_log_std` | float32 | [B, A] | continuous: Gaussians under the tanh |
| `logits`, `behavior_logits` | float32 | [B, A] | discrete: normalised log-probabilities, masked |

The team graph has the same names, with the agents' vectors joined along the last axis in team order
(`observation` [B, ΣO], `action` [B, ΣA] or [B, N], `divergence` [B, N]).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from omcda_deploy.errors import BundleError, ConfigError, OmcdaError
from omcda_deploy.files import sha256
from omcda_deploy.guard import DataReference
from omcda_deploy.spec import TeamSpec

DivergenceKind = Literal["kl", "neg_log_behavior"]

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
TEAM = "team"  # folder and model name of the team graph
MODEL_FILE = "1/model.onnx"
CONFIG_FILE = "config.pbtxt"
REASON_LIMIT = 200  # characters of a damaged manifest that a message repeats
KL_ROUNDING = 1e-4  # nats by which float32 may miss a KL of 0
DEMO_TEAM = Path(__file__).parent / "demo_team"  # a trained team that comes with the package

# What reading a manifest that somebody has changed can raise; RecursionError is a RuntimeError.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
    OmcdaError,
)

CONTINUOUS_PARAMETERS = ("mean", "log_std", "behavior_mean", "behavior_log_std")
DISCRETE_PARAMETERS = ("logits", "behavior_logits")


def parameter_names(spec: TeamSpec) -> tuple[str, ...]:
    """Names of the graph outputs that describe the policy's and the behaviour policy's distribution."""
    return CONTINUOUS_PARAMETERS if spec.action_kind == "continuous" else DISCRETE_PARAMETERS


def output_names(spec: TeamSpec) -> tuple[str, ...]:
    """Names of all graph outputs, in the order in which graphs are exported."""
    return ("action", "divergence", "behavior_action", *parameter_names(spec))


def input_names(spec: TeamSpec) -> tuple[str, ...]:
    """Names of all graph inputs, in the order in which graphs are exported."""
    return (
        ("observation", "noise")
        if spec.action_kind == "continuous"
        else ("observation", "noise", "action_mask")
    )


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk. ``manifest`` is ``bundle.json`` as parsed."""

    path: Path
    spec: TeamSpec
    manifest: Mapping[str, Any]

    @property
    def divergence_kind(self) -> DivergenceKind:
        """``kl`` for KL(pi_i || pi_b^i), ``neg_log_behavior`` for -log pi_b^i(a|o)."""
        kind: DivergenceKind = self.manifest["divergence_kind"]
        return kind

    @property
    def budgets(self) -> dict[str, float | None]:
        """Budget d_i of each agent in nats, None for algorithms without budgets."""
        return {name: entry["budget"] for name, entry in self.manifest["agents"].items()}

    @property
    def references(self) -> dict[str, DataReference]:
        """Statistics of each agent's training data; empty for a bundle that was made without data."""
        entries = {name: entry.get("reference") for name, entry in self.manifest["agents"].items()}
        return {name: DataReference(**entry) for name, entry in entries.items() if entry is not None}

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the SHA-256 of every other file."""
        return sha256(self.path / MANIFEST)

    def model_path(self, model: str) -> Path:
        """Path of the ONNX file of an agent, or of the team graph for ``"team"``.

        Raises :class:`ContractError` for an agent that the team does not have.
        """
        if model != TEAM:
            self.spec.agent(model)
        return self.path / model / MODEL_FILE


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle and verify its files. Raises :class:`BundleError` when one is missing, changed or damaged.

    What the manifest says is checked here, so that nothing which trusts it later fails: a server loads bundles
    while it answers by others.
    """
    if not isinstance(path, (str, Path)):
        raise BundleError(f"expected a bundle's folder, got {path!r}: make one with  omcda-deploy export")
    path = Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}. Make one with  omcda-deploy export")
    try:
        manifest = json.loads(manifest_path.read_text())
        json.dumps(manifest, ensure_ascii=False).encode()  # names that no message and no protocol could hold
        version = manifest["schema_version"]
        files = {name: str(digest) for name, digest in manifest["files"].items()}
        declared_hash = manifest["contract_hash"]
        spec = TeamSpec.from_json(manifest["team"])
        kind = manifest["divergence_kind"]
        agents = set(manifest["agents"])
        for name, entry in manifest["agents"].items():
            _require_agent(name, entry, kind)
        _require_origin(manifest)
    except _DAMAGE as error:
        # Some of these are about a name or a digit alone; none may bring a line of its own.
        reason = " ".join(f"{error}".split())[:REASON_LIMIT] or type(error).__name__
        raise BundleError(f"{manifest_path} is damaged ({reason}): export the run again") from error
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{manifest_path} has schema version {version!r:.20}, expected {SCHEMA_VERSION}: export again"
        )
    if kind not in get_args(DivergenceKind):
        raise BundleError(
            f"{manifest_path}: expected divergence_kind kl or neg_log_behavior, got {kind!r:.100}"
        )
    if declared_hash != spec.contract_hash or agents != set(spec.names):
        raise BundleError(f"{manifest_path} was changed: its contract hash does not match its team")
    bundle = Bundle(path, spec, manifest)
    for agent, reference in bundle.references.items():
        if (size := len(reference.observation_mean)) != (width := spec.agent(agent).observation_size):
            raise BundleError(
                f"{manifest_path}: reference of {agent}: expected means of {width} entries, got {size}: "
                "export again"
            )
    required = {f"{model}/{file}" for model in (*spec.names, TEAM) for file in (CONFIG_FILE, MODEL_FILE)}
    if missing := required - files.keys():
        raise BundleError(f"{manifest_path} does not list {sorted(missing)[0]}: export the run again")
    for name, digest in files.items():
        _require_file(path, name, digest)
    return bundle


def _require_agent(name: str, entry: Mapping[str, Any], kind: str) -> None:
    """Check an agent's numbers. Raises :class:`ConfigError`, and what reading other types raises."""
    for field in ("budget", "alpha"):
        value = entry["budget"] if field == "budget" else entry.get(field)
        if value is not None and not (_is_number(value) and value >= 0.0):
            raise ConfigError(f"{field} of {name}: expected a number from 0 on, or null, got {value!r}")
    if entry.get("reference") is not None:
        reference = DataReference(**entry["reference"])
        # -log pi_b of a density may well be below 0; a KL is so by rounding alone.
        if kind == "kl" and reference.divergence_p99 < -KL_ROUNDING:
            raise ConfigError(
                f"reference.divergence_p99 of {name}: expected a KL from 0 on, got {reference.divergence_p99}"
            )


def _require_origin(manifest: Mapping[str, Any]) -> None:
    """Check the parts that a bundle may lack: where it comes from, and how exact its graphs are."""
    if not isinstance(training := manifest.get("training", {}), dict):
        raise ConfigError(f"training: expected an object, got {training!r}")
    if (parity := manifest.get("parity")) is not None:
        errors = [error["max_abs"] for error in parity["against_torch"].values()]
        if not errors or not all(map(_is_number, (*errors, parity["rows"]))):
            raise ConfigError("parity: expected numbers of rows and of max_abs for every output")


def _require_file(folder: Path, name: str, digest: str) -> None:
    """Raise :class:`BundleError` unless a file of the manifest is there, unchanged."""
    file, shown = folder / name, f"{name:.{REASON_LIMIT}}"
    try:
        if folder.resolve() not in file.resolve().parents:
            raise BundleError(f"{folder / MANIFEST} lists {shown}, which is outside the bundle")
        if not file.is_file():
            raise BundleError(f"{folder / shown} is missing: the bundle is incomplete, export the run again")
        actual = sha256(file)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise BundleError(
            f"{folder / MANIFEST} lists {shown!r}, which cannot be read ({reason}): export the run again"
        ) from error
    if actual != digest:
        raise BundleError(
            f"{file} was changed after export: expected sha256 {digest[:12]}…, found {actual[:12]}…. "
            "Export the run again"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
