"""Record what bundles answer, so that two versions of this package can be compared bit by bit.

Run at the older version, then at the newer one::

    PYTHONPATH=OLDER python tests/support/record_answers.py --out answers.json
    PYTHONPATH=NEWER python tests/support/record_answers.py --compare answers.json

Every bundle below a folder is asked in process (all agents alone, and the joint graph) and through both services of
a server, from the bytes of a request to the bytes of its response: batches of 1, 3 and 64 rows, with and without
noise, under every guard that the bundle can have. Thresholds are the median divergence of the asked rows, so that
guards act on half of them. The record holds one SHA-256 per case, in two groups: ``fallback``, where an action may
come from the behaviour policy, and ``answers``, all others.

This file imports nothing from tests, and only names that both versions have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import omcda_deploy
from omcda_deploy.bundle import MANIFEST, TEAM, Bundle, read_bundle
from omcda_deploy.guard import GuardSetting, Mode
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.protos.tensors import input_tensors
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.oip import InferenceService
from omcda_deploy.serve.policy_service import PolicyService
from omcda_deploy.serve.releases import Releases

BATCHES = {1: 8, 3: 2, 64: 1}  # rows of a request -> requests of that size
Vectors = dict[str, NDArray[Any]]  # by agent: [B, O] or [B, A]
Record = dict[str, dict[str, str]]  # group -> case -> SHA-256


class Requests:
    """Fixed random requests for one bundle."""

    def __init__(self, bundle: Bundle, seed: int) -> None:
        self._spec = bundle.spec
        self._generator = np.random.default_rng(seed)
        self._noise = NoiseSource(bundle.spec, seed)

    def draw(self, rows: int) -> tuple[Vectors, Vectors, Vectors | None]:
        """Observations, noise, and for discrete actions masks of which at least one action is available."""
        agents = self._spec.agents
        observations: Vectors = {
            agent.name: self._generator.normal(size=(rows, agent.observation_size)).astype(np.float32)
            for agent in agents
        }
        noise: Vectors = {name: np.asarray(values) for name, values in self._noise.draw(rows).items()}
        if self._spec.action_kind == "continuous":
            return observations, noise, None
        masks: Vectors = {}
        for agent in agents:
            mask = self._generator.integers(0, 2, (rows, agent.action.size), np.uint8)
            mask[np.arange(rows), self._generator.integers(agent.action.size, size=rows)] = 1
            masks[agent.name] = mask
        return observations, noise, masks


def record(bundle: Bundle, name: str, seed: int) -> Record:
    """Answers of one bundle; ``name`` begins every case."""
    requests = Requests(bundle, seed)
    cases = [
        (
            f"{rows} rows, {'noise' if noisy else 'no noise'}",
            [requests.draw(rows) for _ in range(count)],
            noisy,
        )
        for rows, count in BATCHES.items()
        for noisy in (False, True)
    ]
    answers: Record = {"answers": {}, "fallback": {}}
    local = LocalTeam(bundle)
    for kind, team in (("local", local), ("joint", JointTeam(bundle))):
        for case, inputs, noisy in cases:
            hasher = hashlib.sha256()
            for observations, noise, masks in inputs:
                decisions = team.act(observations, noise=noise if noisy else None, action_masks=masks)
                for decision in decisions.values():
                    hasher.update(_decision_bytes(decision))
            answers["answers"][f"{name}: {kind}, {case}"] = hasher.hexdigest()
    observations, _, masks = cases[-1][1][0]
    divergences = local.act(observations, action_masks=masks)
    thresholds = {agent: float(np.median(decision.divergence)) for agent, decision in divergences.items()}
    modes: tuple[Mode, ...] = ("observe", "fallback", "blend")
    for mode in modes[: 3 if bundle.divergence_kind == "kl" else 2]:
        guards = {agent: GuardSetting(mode, threshold) for agent, threshold in thresholds.items()}
        releases = Releases(bundle.path, (), ServerConfig(guards=guards))
        group = answers["fallback" if mode == "fallback" else "answers"]
        for case, inputs, noisy in cases:
            for model in (*bundle.spec.names, TEAM):
                for protocol, digest in _served(bundle, releases, model, inputs, noisy=noisy):
                    group[f"{name}: {protocol} {model}, {mode}, {case}"] = digest
    return answers


def _served(
    bundle: Bundle,
    releases: Releases,
    model: str,
    inputs: list[tuple[Vectors, Vectors, Vectors | None]],
    *,
    noisy: bool,
) -> Iterator[tuple[str, str]]:
    """Digests of the responses of both services."""
    policy, inference = PolicyService(releases), InferenceService(releases)
    acts, infers = hashlib.sha256(), hashlib.sha256()
    for observations, noise, masks in inputs:
        parts: Mapping[str, Vectors | None] = {
            "observation": observations,
            "noise": noise if noisy else None,
            "action_mask": masks,
        }
        act = policy_pb2.ActRequest(
            model=model,
            contract_hash=bundle.spec.contract_hash,
            step_id=7,
            batch=len(observations[bundle.spec.names[0]]),
        )
        infer = oip.ModelInferRequest(model_name=model, id="7")
        for tensor in input_tensors(bundle.spec, model):
            vectors = parts[tensor.name]
            if vectors is None:
                continue
            names = bundle.spec.names if model == TEAM else (model,)
            values = np.concatenate([vectors[agent] for agent in names], axis=1)
            setattr(act, tensor.name, tensor.encode(values))
            infer.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=values.shape)
            infer.raw_input_contents.append(tensor.encode(values))
        acts.update(policy.act(policy_pb2.ActRequest.FromString(act.SerializeToString())))
        infers.update(inference.model_infer(oip.ModelInferRequest.FromString(infer.SerializeToString())))
    yield "Act", acts.hexdigest()
    yield "ModelInfer", infers.hexdigest()


def _decision_bytes(decision: Decision) -> bytes:
    arrays = {"action": decision.action, "divergence": decision.divergence, **decision.parameters}
    return b"".join(
        f"{name} {values.dtype} {values.shape} ".encode() + np.ascontiguousarray(values).tobytes()
        for name, values in arrays.items()
    )


def differences(old: Record, new: Record) -> list[str]:
    """Cases that are answered differently, or in one of the two records only."""
    lines = []
    for group in ("answers", "fallback"):
        for case in sorted(old[group].keys() | new[group].keys()):
            if old[group].get(case) != new[group].get(case):
                kind = "changed" if case in old[group] and case in new[group] else "in one record only"
                lines.append(f"{group}: {case}: {kind}")
    return lines


def main() -> int:
    shipped = Path(omcda_deploy.__file__).parent / "policies"
    parser = argparse.ArgumentParser(description="Record the answers of bundles as digests.")
    parser.add_argument("--bundles", type=Path, default=shipped, help="folder that is searched for bundles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the record to this file")
    parser.add_argument("--compare", type=Path, help="compare with this record; exit with 1 if they differ")
    options = parser.parse_args()
    total: Record = {"answers": {}, "fallback": {}}
    for manifest in sorted(options.bundles.rglob(MANIFEST)):
        path = manifest.parent
        name = str(path.relative_to(options.bundles))
        for group, cases in record(read_bundle(path), name, options.seed).items():
            total[group] |= cases
    if options.out is not None:
        options.out.write_text(json.dumps(total, indent=1))
    counts = ", ".join(f"{len(cases)} {group}" for group, cases in total.items())
    print(f"{counts} of bundles below {options.bundles}, omcda_deploy from {omcda_deploy.__file__}")
    if options.compare is None:
        return 0
    lines = differences(json.loads(options.compare.read_text()), total)
    print("\n".join([*lines, f"{len(lines)} cases differ"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
