"""One ordinary control step, from bytes to bytes: the path of a control loop.

A step is ordinary where nothing has to be said about it: one row of finite numbers, an action that is available,
no guard that steps in. :class:`omcda_deploy.serve.session.Session` knows all other cases and their messages: this
path leaves them to it, and answers what it would answer, byte for byte.

In a server, whose caches belong to gRPC, each call of numpy costs more than a microsecond. Hence buffers that are
bound once, and plain numbers.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.guard import Guard
from omcda_deploy.local import BoundRow
from omcda_deploy.serve.meter import ModelMeter

_ALLOWED = b"\0\1"  # in a mask
_FEW = 256  # numbers, up to which a plain sum of them is cheaper than a call of numpy


class Step:
    """The steps of one model, in the event loop's thread."""

    def __init__(self, row: BoundRow, guard: Guard, meter: ModelMeter) -> None:
        self._row, self._meter = row, meter
        self._observed, self._disturbed = row.inputs["observation"][0], row.inputs["noise"][0]
        self._inputs = {name: array.data.cast("B") for name, array in row.inputs.items()}
        self._names = (*row.outputs, "policy_weight")
        weight = np.ones(len(guard.agents), np.float32)
        self._outputs = [array.data.cast("B") for array in (*row.outputs.values(), weight)]
        self._silence = bytes(self._disturbed.nbytes)
        self._limits = guard.limits
        self._divergence = row.outputs["divergence"].reshape(-1).data
        self._action = row.outputs["action"].reshape(-1).data
        self._choices = list(guard.action_slices) if "action_mask" in row.inputs else []

    def __call__(self, observation: bytes, noise: bytes, mask: bytes) -> dict[str, bytes] | None:
        """The answer's tensors by name, or None for a step that is not ordinary.

        The tensors of the request are little-endian float32 and uint8; empty means absent.
        """
        began = time.perf_counter()
        row = self._row
        with row.lock:
            try:
                self._inputs["observation"][:] = observation
                self._inputs["noise"][:] = noise or self._silence
                if self._choices:
                    self._inputs["action_mask"][:] = mask
                elif mask:
                    return None
            except ValueError:  # another size
                return None
            if not all_finite(self._observed) or (noise and not all_finite(self._disturbed)):
                return None
            if mask and (mask.translate(None, _ALLOWED) or any(1 not in mask[own] for own in self._choices)):
                return None
            row.run()
            divergence = self._divergence.tolist()
            if not math.isfinite(sum(divergence)):
                return None
            action = self._action.tolist()
            if mask:
                if not all(mask[own][chosen] for own, chosen in zip(self._choices, action, strict=True)):
                    return None
            elif not math.isfinite(sum(action)):
                return None
            for index, limit in self._limits:
                if divergence[index] > limit:
                    return None
            outputs = dict(zip(self._names, map(memoryview.tobytes, self._outputs), strict=True))
        weight = outputs["policy_weight"]
        self._meter.add(1, observation, outputs["divergence"], weight, began, time.perf_counter() - began)
        return outputs


def all_finite(values: NDArray[Any]) -> bool:
    """Whether all are finite; of many, a sum of squares says so at half the price of a look at each, if it is."""
    if values.size <= _FEW:
        return math.isfinite(sum(values.ravel().tolist()))
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())
