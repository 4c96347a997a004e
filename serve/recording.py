"""The flight recorder: every step that a server answers, in files (docs/recording.md).

A step's path only hands one object to a queue. A thread makes columns of many and writes them
(:mod:`omcda_deploy.recordings.recorder`).
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM
from omcda_deploy.errors import ConfigError
from omcda_deploy.policy import MAX_TEMPERATURE
from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.protos.tensors import DTYPES, answer_tensors, input_tensors
from omcda_deploy.recordings import FORMAT
from omcda_deploy.recordings.columns import Values, step_columns
from omcda_deploy.recordings.densities import Densities
from omcda_deploy.recordings.recorder import Recorder, Tally
from omcda_deploy.recordings.segments import RecordingLimits
from omcda_deploy.serve.session import NAME_LIMIT, Session
from omcda_deploy.serve.status import RequestError
from omcda_deploy.serve.wire import WireTensors

Request: TypeAlias = "policy_pb2.ActRequest | oip.ModelInferRequest"
PARAMETERS: Mapping[str, tuple[str, ...]] = {  # of an OIP request, and the types that they may have
    "bundle_digest": ("string_param",),
    "episode_id": ("string_param",),
    "episode_step": ("int64_param", "uint64_param"),
    "temperature": ("double_param",),
}


class Origin(NamedTuple):
    """Statements of a request on its episode. ``temperature``: NaN where it does not say."""

    episode_id: str = ""
    episode_step: int = 0
    temperature: float = math.nan


def origin_of(request: Request) -> Origin:
    """Return the origin that a request of either protocol states.

    Raises :class:`RequestError` for an OIP parameter of another type or a number out of range, and for a long name.
    That of an ``ActRequest`` has been checked by :func:`require_origin`.
    """
    if isinstance(request, policy_pb2.ActRequest):
        temperature = request.temperature if request.HasField("temperature") else math.nan
        return Origin(request.episode_id, request.episode_step, temperature)
    values = {name: parameter_of(request, name) for name in Origin._fields if name in request.parameters}
    origin = Origin(**values)
    require_origin(origin.episode_id, origin.temperature)
    return origin


def parameter_of(request: oip.ModelInferRequest, name: str) -> Any:
    """Return an OIP request's parameter. Raises :class:`RequestError` for another type or a number out of range."""
    parameter, kinds = request.parameters[name], PARAMETERS[name]
    kind = parameter.WhichOneof("parameter_choice")
    value: Any = None if kind is None else getattr(parameter, kind)
    if kind not in kinds or (name == "episode_step" and value < 0):
        raise RequestError(f"parameter {name}: expected {' or '.join(kinds)}, got {kind or 'none'} {value}")
    return value


def require_origin(episode_id: str, temperature: float) -> None:
    """Raise :class:`RequestError` for a name that would make files large, and for no temperature of play.

    NaN says that the temperature is not known, as its absence does.
    """
    if not (0.0 <= temperature <= MAX_TEMPERATURE or math.isnan(temperature)):
        raise RequestError(
            f"temperature: expected a number from 0 to {MAX_TEMPERATURE:g}, or none, got {temperature:g}"
        )
    if len(episode_id) > NAME_LIMIT:
        raise RequestError(f"episode_id: expected at most {NAME_LIMIT} characters, got {len(episode_id)}")


Sample: TypeAlias = tuple[int, int, Origin, bytes]  # time in ns, rows, and what Steps.packed returns


class Steps:
    """The steps of one model of one version, as a source of a recorder."""

    def __init__(self, session: Session) -> None:
        bundle, spec = session.bundle, session.bundle.spec
        agents = spec.agents if session.name == TEAM else (spec.agent(session.name),)
        self.folder = session.name
        self.columns = step_columns(spec, session.name)
        self.metadata = {
            "format": FORMAT,
            "kind": "steps",
            "model": session.name,
            "version": session.version,
            "bundle_digest": bundle.digest,
            "divergence_kind": bundle.divergence_kind,
            "contract_hash": spec.contract_hash,
            "team": json.dumps(spec.to_json()),
            "guards": json.dumps(
                {
                    agent.name: {"mode": setting.mode, "threshold": float(threshold)}
                    for agent, setting, threshold in zip(
                        agents, session.guard.settings, session.guard.thresholds, strict=True
                    )
                }
            ),
        }
        inputs = input_tensors(spec, session.name)  # in the order of WireTensors
        self._tensors = (*inputs, *answer_tensors(spec, session.name))
        self._noise_size = inputs[1].size(1)
        self._row = np.dtype(
            [(t.name, DTYPES[t.datatype], () if t.width is None else t.width) for t in self._tensors]
        )
        self._densities = Densities(agents)

    def packed(self, tensors: WireTensors, answer: Mapping[str, bytes]) -> bytes:
        """Return the inputs and outputs of an answered request, one after another; of absent noise, zeros.

        One object is kept for them until they are written, rather than a dozen: memory that is soon used again is
        still in the processor's caches.
        """
        rows, observation, noise, mask = tensors
        return b"".join((observation, noise or bytes(rows * self._noise_size), mask, *answer.values()))

    def values(self, samples: Sequence[Sample]) -> Mapping[str, Values]:
        times, rows, origins, packed = zip(*samples, strict=True)
        names, steps, factors = zip(*origins, strict=True)
        columns = self._unpacked(rows, packed)
        noisy = columns["noise"].any(axis=1)
        return {
            "time": np.repeat(times, rows),
            "episode_id": [name for name, count in zip(names, rows, strict=True) for _ in range(count)],
            "episode_step": np.repeat(np.array(steps, np.uint64), rows),
            "row": np.arange(sum(rows)) - np.repeat(np.cumsum((0, *rows[:-1])), rows),
            "temperature": np.where(noisy, np.repeat(factors, rows), 0.0),
            **columns,
        }

    def _unpacked(self, rows: Sequence[int], packed: Sequence[bytes]) -> dict[str, NDArray[Any]]:
        """Return the columns of packed requests of ``rows`` rows."""
        if max(rows) == 1:
            table = np.frombuffer(b"".join(packed), self._row)
            return {tensor.name: table[tensor.name] for tensor in self._tensors}
        parts: dict[str, list[NDArray[Any]]] = {tensor.name: [] for tensor in self._tensors}
        for count, data in zip(rows, packed, strict=True):
            start = 0
            for tensor in self._tensors:
                end = start + tensor.size(count)
                parts[tensor.name].append(tensor.decode(data[start:end], count))
                start = end
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def derived(self, values: Mapping[str, Values]) -> Mapping[str, Values]:
        step = {name: column for name, column in values.items() if isinstance(column, np.ndarray)}
        log_probs = {}
        for name, prefix in (("log_prob", ""), ("behavior_log_prob", "behavior_")):
            parameters = {
                key: step[prefix + key] for key in ("mean", "log_std", "logits") if prefix + key in step
            }
            log_prob = self._densities.log_prob(step, parameters)
            log_probs[name] = log_prob if self.folder == TEAM else log_prob[:, 0]
        return log_probs


class FlightRecorder:
    """Records the steps of a server while it has a folder to do so. ``tally``: of all folders so far."""

    def __init__(self, limits: RecordingLimits) -> None:
        self.tally = Tally()
        self._limits = limits
        self._recorder: Recorder | None = None
        self._switching = asyncio.Lock()

    @property
    def folder(self) -> str:
        """The folder into which it records; empty if none."""
        return "" if self._recorder is None else str(self._recorder.folder)

    def start(self, folder: Path) -> None:
        """Record from now on. Raises as :class:`Recorder`."""
        self._recorder = Recorder(folder, self._limits, self.tally)

    def stop(self) -> None:
        """End recording, and write what is waiting."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.close()

    async def switch(self, folder: str) -> None:
        """Record into ``folder`` from the next step on; an empty one ends recording.

        What takes time is done beside the event loop. Raises :class:`ConfigError` for a folder that is not
        absolute, and as :class:`Recorder`; what was recorded into before goes on then.
        """
        if folder and not Path(folder).is_absolute():
            raise ConfigError(f"expected an absolute folder of the server's machine, got {folder[:100]!r}")
        async with self._switching:
            if folder == self.folder:
                return
            before = self._recorder
            self._recorder = (
                await asyncio.to_thread(Recorder, Path(folder), self._limits, self.tally) if folder else None
            )
            if before is not None:
                await asyncio.to_thread(before.close)

    def record(
        self,
        session: Session,
        tensors: WireTensors,
        request: Request,
        answer: Mapping[str, bytes],
    ) -> None:
        """Record an answered request, if there is a folder to record into; never waits."""
        recorder = self._recorder
        if recorder is None:
            return
        steps = session.steps
        if steps is None:
            steps = session.steps = Steps(session)
        origin, packed = origin_of(request), steps.packed(tensors, answer)
        recorder.put(steps, (time.time_ns(), tensors.batch, origin, packed), tensors.batch, len(packed))
