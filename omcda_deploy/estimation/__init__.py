"""Estimates of what a team would earn, from recorded episodes alone, with bounds: nobody plays.

Needs numpy and onnxruntime: an operator's machine has no torch. Source: docs/derivation.md#estimates-before-acting.
"""

from omcda_deploy.estimation.distributions import (
    Categorical,
    Gaussian,
    TeamDistributions,
    trained_share,
    training_of,
)
from omcda_deploy.estimation.returns import (
    LEAST_EFFECTIVE,
    LEAST_EPISODES,
    MOST_UNSUPPORTED,
    UNSUPPORTED_NATS,
    Bounds,
    Comparison,
    Estimator,
    effective_sample_size,
    require_confidence,
    require_estimable,
)

__all__ = [
    "LEAST_EFFECTIVE",
    "LEAST_EPISODES",
    "MOST_UNSUPPORTED",
    "UNSUPPORTED_NATS",
    "Bounds",
    "Categorical",
    "Comparison",
    "Estimator",
    "Gaussian",
    "TeamDistributions",
    "effective_sample_size",
    "require_confidence",
    "require_estimable",
    "trained_share",
    "training_of",
]
