"""Many environments of one task, stepped together."""

from omcda_deploy.envs.vector.environment import (
    BatchedEnvironment,
    VectorEnvironment,
    VectorStep,
    checked_actions,
    require_counts,
    require_indices,
    vectorize,
)

__all__ = [
    "BatchedEnvironment",
    "VectorEnvironment",
    "VectorStep",
    "checked_actions",
    "require_counts",
    "require_indices",
    "vectorize",
]
