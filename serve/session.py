"""The models of one version of a bundle, loaded and ready to answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.errors import UnknownNameError
from omcda_deploy.guard import Guard, GuardSetting
from omcda_deploy.inputs import all_finite
from omcda_deploy.local import OnnxModel
from omcda_deploy.protos.tensors import DTYPES, answer_tensors, input_tensors
from omcda_deploy.serve.batches import LARGE_BYTES
from omcda_deploy.serve.meter import ModelMeter, Sample
from omcda_deploy.serve.status import RangeError, RequestError
from omcda_deploy.serve.step import OrdinaryStep
from omcda_deploy.serve.wire import WireTensors, decode

NAME_LIMIT = 100  # characters of a caller's name that are compared and repeated


class Session:
    """One model, an agent or ``team``: checked inputs in, guarded outputs out.

    :meth:`answer` alone decides which requests take the fast path. Models run in the event loop's thread: a run
    takes tens of microseconds, less than handing it to another thread would. Shapes: B rows, k agents of the model.
    """

    def __init__(
        self, bundle: Bundle, name: str, guards: Mapping[str, GuardSetting], version: str = "1"
    ) -> None:
        self.name = name
        self.version = version
        self.bundle = bundle
        self.inputs = {tensor.name: tensor for tensor in input_tensors(bundle.spec, name)}
        self.outputs = {tensor.name: tensor for tensor in answer_tensors(bundle.spec, name)}
        self.all_outputs = tuple(self.outputs.values())
        self._model = OnnxModel(bundle.model_path(name))
        self._agents = bundle.spec.agents if name == TEAM else (bundle.spec.agent(name),)
        self._grown = False  # the model keeps the memory of a large batch
        self._set_guards(guards)
        self._warm_up()

    def with_guards(self, guards: Mapping[str, GuardSetting]) -> Session:
        """Return a session of the same graph with other guards, which counts anew; itself if they are the same.

        Raises :class:`ConfigError` for guards that the bundle cannot have.
        """
        if self.guard.settings == tuple(guards.get(agent.name, GuardSetting()) for agent in self._agents):
            return self
        other = copy(self)
        other._set_guards(guards)
        return other

    def _set_guards(self, guards: Mapping[str, GuardSetting]) -> None:
        bundle = self.bundle
        self.steps: Any = None  # of recordings, which name the guards; made when the first one is recorded
        self.guard = Guard(bundle.spec, self._agents, bundle.divergence_kind, guards, bundle.references)
        self._first_actions = np.array([columns.start for columns in self.guard.action_slices])
        self._distance_limits = self.guard.distance_limits
        self._limited = bool(np.isfinite(self._distance_limits).any())
        self.meter = ModelMeter(self.guard)
        # The fast path copies bytes, which are little-endian on the wire, and measures no distance.
        fast = sys.byteorder == "little" and not self._limited
        self._step = OrdinaryStep(self._model.row, self.guard, self.meter) if fast else None

    def answer(self, tensors: WireTensors) -> dict[str, bytes]:
        """Answer one request: all outputs by name, as bytes.

        Raises :class:`RequestError` for tensors that do not fit the model, and what :meth:`run` raises.
        """
        if self._step is not None and (answer := self._step(tensors)) is not None:
            return answer
        outputs = self.run(self.decode(tensors))
        return {name: tensor.encode(outputs[name]) for name, tensor in self.outputs.items()}

    def decode(self, tensors: WireTensors) -> dict[str, NDArray[Any]]:
        """Return a request's tensors as arrays. Raises :class:`RequestError` if they do not fit the model."""
        return decode(tensors, self.inputs, self.name)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Check ``inputs``, run the model, guard its action and count the answer.

        ``inputs``: arrays ``[B, width]`` as :meth:`decode` returns them. Returns all outputs by name.

        Raises :class:`RequestError` for values that no policy can act on, and :class:`RangeError` if the action is
        not finite, or an observation is further from the training data than the guard allows.
        """
        began = time.perf_counter()
        feeds = self._feeds(inputs)
        outputs = self._run_model(feeds)
        guarded = self.guard(feeds["noise"], outputs)
        if "action_mask" in feeds:
            self._require_available(guarded.action, feeds["action_mask"])
        if self._limited:
            self._require_near(feeds["observation"])
        observation, weight = feeds["observation"], guarded.policy_weight
        seconds = time.perf_counter() - began
        self.meter.add(Sample(len(observation), observation, outputs["divergence"], weight, began, seconds))
        return outputs | {
            "action": guarded.action,
            "policy_weight": weight if self.name == TEAM else weight.reshape(-1),
        }

    def action(self, tensors: WireTensors) -> NDArray[Any]:
        """Return the action that :meth:`answer` would give for a request that was answered; counts nothing.

        For a shadow. Raises :class:`RangeError` if the action is not finite.
        """
        feeds = self._feeds(self.decode(tensors))
        outputs = self._run_model(feeds)
        return self.guard(feeds["noise"], outputs).action

    def _run_model(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._grown |= feeds["observation"].nbytes > LARGE_BYTES
        with np.errstate(all="ignore"):
            outputs = self._model.run(feeds)
        # A tanh hides an overflow, an argmax turns it into an arbitrary action, and no guard can compare NaN.
        if not (all_finite(outputs["action"]) and all_finite(outputs["divergence"])):
            raise RangeError(
                f"{self.name}: the action for this observation or its divergence is not finite; the largest entry "
                f"is {np.abs(feeds['observation']).max():.3g}: send observations of the range seen in training"
            )
        return outputs

    def _feeds(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Check the values of ``inputs`` and fill in zero noise."""
        rows = len(inputs["observation"])
        feeds: dict[str, NDArray[Any]] = {}
        for name, tensor in self.inputs.items():
            if name == "noise" and name not in inputs:
                feeds[name] = np.zeros(tensor.shape(rows), DTYPES[tensor.datatype])
                continue
            values = inputs[name]
            if tensor.datatype == "UINT8":
                self._require_choice(values)
            elif not all_finite(values):
                row, column = np.argwhere(~np.isfinite(values))[0]
                raise RequestError(
                    f"{name} of {self.name}: expected finite numbers, got {values[row, column]} "
                    f"in row {row}, column {column}"
                )
            feeds[name] = values
        return feeds

    def _require_available(self, action: NDArray[np.int64], mask: NDArray[np.uint8]) -> None:
        """Refuse an action that its mask forbids.

        Graphs mask with large finite numbers, which scores or noise of 1e38 outweigh.
        """
        rows = len(mask)
        available = mask[np.arange(rows)[:, None], self._first_actions + action.reshape(rows, -1)]  # [B, k]
        if not available.all():
            row, agent = np.argwhere(available == 0)[0].tolist()
            raise RangeError(
                f"{self._agents[agent].name}: these numbers outweigh the mask in row {row}, so that an unavailable "
                "action was chosen: send observations and noise of the range seen in training"
            )

    def _require_near(self, observation: NDArray[np.float32]) -> None:
        distance = self.guard.distance(observation)
        assert distance is not None  # a guard with limits knows it
        if not (far := distance > self._distance_limits).any():
            return
        row, agent = np.argwhere(far)[0].tolist()
        raise RangeError(
            f"{self._agents[agent].name}: expected observations within {self._distance_limits[agent]:g} of the "
            f"training data, got one at {distance[row, agent]:.3g} in row {row}: act by other means, or raise "
            "distance_limit"
        )

    def _require_choice(self, mask: NDArray[Any]) -> None:
        if mask.max() > 1:
            raise RequestError(f"action_mask of {self.name}: expected 0 or 1, got {mask.max()}")
        start = 0
        for agent in self._agents:
            available = mask[:, start : start + agent.action.size].any(axis=1)
            start += agent.action.size
            if not available.all():
                raise RequestError(
                    f"action_mask of {agent.name}: expected at least one available action, got none "
                    f"in row {int(available.argmin())}"
                )

    def release_memory(self) -> None:
        """Free the memory that large batches needed."""
        if self._grown:
            self._grown = False
            self._model.run(self._example(2), release=True)

    def _warm_up(self) -> None:
        """Run the model once, so that the first request does not wait for its allocations."""
        self._model.run(self._example(1))

    def _example(self, rows: int) -> dict[str, NDArray[Any]]:
        return {
            name: np.full(tensor.shape(rows), tensor.datatype == "UINT8", DTYPES[tensor.datatype])
            for name, tensor in self.inputs.items()
        }


class Models:
    """The models that one server answers for, all of one version of a team's bundle.

    Raises :class:`UnknownNameError` for a name that is neither an agent nor ``team``.
    """

    def __init__(
        self,
        bundle: Bundle,
        names: Iterable[str],
        guards: Mapping[str, GuardSetting] | None = None,
        version: str = "1",
        pause_s: float = 0.0,
    ) -> None:
        """Load ``names``, all models if empty.

        ``pause_s``: seconds to wait after each model, so that requests to other versions get the processor.
        """
        choices = (*bundle.spec.names, TEAM)
        names = tuple(dict.fromkeys(names)) or choices
        for name in names:
            if name not in choices:
                raise UnknownNameError("agent", name, choices)
        self.bundle = bundle
        self.version = version
        self.digest = bundle.digest  # read now, as the files on disk may change later
        self.folder_digest = self.digest  # of the bundle under this version's name, when somebody looked last
        self.contract_hash = bundle.spec.contract_hash
        self.sessions = {}
        for name in names:
            self.sessions[name] = Session(bundle, name, guards or {}, version)
            time.sleep(pause_s)

    def close(self, pause_s: float = 0.0) -> None:
        """Free the models one by one; ``pause_s``: seconds to wait after each."""
        while self.sessions:
            self.sessions.popitem()
            time.sleep(pause_s)

    def find(self, name: str) -> Session:
        """Return the session of a model. Raises :class:`UnknownNameError`."""
        session = self.sessions.get(name)
        if session is None:
            raise UnknownNameError("model", name[:NAME_LIMIT], self.sessions)
        return session
