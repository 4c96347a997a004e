"""The fast path for one ordinary control step, from bytes to bytes.

A step is ordinary if it needs no error message: one row of finite numbers, and an available action.
:class:`omcda_deploy.serve.session.Session` handles all other requests. On an ordinary step both paths answer byte
for byte the same.

In a server, whose CPU caches are used by gRPC too, each numpy call costs more than a microsecond. Hence this path
uses buffers that are bound once, and plain Python numbers.
"""

from __future__ import annotations

import math
import time
from struct import Struct

import numpy as np

from omcda_deploy.guard import Guard
from omcda_deploy.inputs import all_finite
from omcda_deploy.local import BoundRow
from omcda_deploy.serve.guarded_row import GuardedRow
from omcda_deploy.serve.meter import ModelMeter, Sample
from omcda_deploy.serve.wire import WireTensors

_MASK_VALUES = b"\0\1"
_PLAIN_SUM_LIMIT = 256  # numbers; a plain sum of more costs more than one numpy call


class OrdinaryStep:
    """Answers ordinary steps of one model. For the event loop's thread only."""

    def __init__(self, row: BoundRow, guard: Guard, meter: ModelMeter) -> None:
        self._row, self._meter = row, meter
        self._observation, self._noise = row.inputs["observation"][0], row.inputs["noise"][0]
        self._inputs = {name: array.data.cast("B") for name, array in row.inputs.items()}
        self._names = (*row.outputs, "policy_weight")
        weight = np.ones(len(guard.agents), np.float32)
        self._outputs = [array.data.cast("B") for array in (*row.outputs.values(), weight)]
        self._guarded = GuardedRow(guard, row)
        action = row.outputs["action"]
        self._pack_action = Struct(f"<{action.size}{'q' if action.dtype.kind == 'i' else 'f'}").pack
        self._pack_weight = Struct(f"<{len(guard.agents)}f").pack
        self._zero_noise = bytes(self._noise.nbytes)
        self._limits = guard.limits
        self._divergence = row.outputs["divergence"].reshape(-1).data
        self._action = row.outputs["action"].reshape(-1).data
        self._choices = list(guard.action_slices) if "action_mask" in row.inputs else []

    def __call__(self, tensors: WireTensors) -> dict[str, bytes] | None:
        """Return the response's tensors by name, or None for a request that is no ordinary step."""
        began = time.perf_counter()
        batch, observation, noise, mask = tensors
        if batch != 1:
            return None
        row = self._row
        with row.lock:
            try:
                self._inputs["observation"][:] = observation
                self._inputs["noise"][:] = noise or self._zero_noise
                if self._choices:
                    self._inputs["action_mask"][:] = mask
                elif mask:
                    return None
            except ValueError:  # another number of bytes
                return None
            if not all_finite(self._observation, _PLAIN_SUM_LIMIT) or (
                noise and not all_finite(self._noise, _PLAIN_SUM_LIMIT)
            ):
                return None
            if mask and (
                mask.translate(None, _MASK_VALUES) or any(1 not in mask[agent] for agent in self._choices)
            ):
                return None
            row.run()
            divergence = self._divergence.tolist()
            if not math.isfinite(sum(divergence)):
                return None
            action = self._action.tolist()
            if not mask and not math.isfinite(sum(action)):
                return None
            outputs = dict(zip(self._names, map(memoryview.tobytes, self._outputs), strict=True))
            for index, limit in self._limits:
                if divergence[index] > limit:
                    try:
                        action, weight = self._guarded(divergence)
                    except ArithmeticError:
                        return None
                    outputs["action"] = self._pack_action(*action)
                    outputs["policy_weight"] = self._pack_weight(*weight)
                    break
            if mask and not all(
                mask[agent][choice] for agent, choice in zip(self._choices, action, strict=True)
            ):
                return None
        divergences, weights = outputs["divergence"], outputs["policy_weight"]
        seconds = time.perf_counter() - began
        self._meter.add(Sample(1, observation, divergences, weights, began, seconds))
        return outputs
