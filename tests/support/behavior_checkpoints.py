"""Arrays of behaviour policies' checkpoints with random weights, and their policies in numpy, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def joint_arrays(raw: int, joints: int, hidden: int = 8) -> Arrays:
    """Return a MA-MuJoCo checkpoint's arrays for ``raw`` observation entries and ``joints`` joints."""
    generator = np.random.default_rng(3)

    def weight(*shape: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (generator.standard_normal(shape) / np.sqrt(shape[-1])).astype(
            np.float32
        )
        return values

    return {
        "w1": weight(hidden, raw),
        "b1": weight(hidden),
        "w2": weight(hidden, hidden),
        "b2": weight(hidden),
        "w_mean": weight(joints, hidden),
        "b_mean": weight(joints),
        # Wider than the range that the learners clamp to.
        "log_std": np.linspace(-6.0, 2.5, joints).astype(np.float32),
        "observation_mean": generator.standard_normal(raw),
        "observation_var": generator.uniform(0.1, 4.0, raw),
        "observation_clip": np.asarray(1.5),
    }


def joint_mean(arrays: Arrays, raw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map raw observations ``[..., R]`` to the Gaussian's mean ``[..., J]``; some entries must be clipped."""
    x = (raw - arrays["observation_mean"]) / np.sqrt(arrays["observation_var"])
    clip = float(arrays["observation_clip"])
    assert (np.abs(x) > clip).any()
    x = np.clip(x, -clip, clip)
    hidden = np.tanh(np.tanh(x @ arrays["w1"].T + arrays["b1"]) @ arrays["w2"].T + arrays["b2"])
    mean: NDArray[np.float64] = hidden @ arrays["w_mean"].T + arrays["b_mean"]
    return mean


def shared_arrays(width: int, actions: int, hidden: int = 8) -> Arrays:
    """Return a SMAX checkpoint's arrays for ``width`` inputs, one-hot id included."""
    generator = np.random.default_rng(3)
    sizes = (width, hidden, hidden, actions)
    arrays: Arrays = {}
    for layer in (1, 2, 3):
        shape = sizes[layer], sizes[layer - 1]
        arrays[f"w{layer}"] = (2 * generator.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        arrays[f"b{layer}"] = generator.standard_normal(shape[0]).astype(np.float32)
    return arrays


def shared_probabilities(
    arrays: Arrays, observations: NDArray[Any], masks: NDArray[Any]
) -> NDArray[np.float64]:
    """Map [B, N, O] and masks [B, N, A] to [B, N, A]: concatenate the id, then a softmax over available actions."""
    batch, agents = observations.shape[:2]
    identity = np.broadcast_to(np.eye(agents), (batch, agents, agents))
    x = np.concatenate([observations, identity], axis=-1).astype(np.float64)
    for layer in (1, 2):
        x = np.maximum(x @ arrays[f"w{layer}"].T + arrays[f"b{layer}"], 0.0)
    weights = np.exp(x @ arrays["w3"].T + arrays["b3"]) * masks
    probabilities: NDArray[np.float64] = weights / weights.sum(-1, keepdims=True)
    return probabilities
