"""The interface of algorithms, and how one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.fleet import Noise, stack
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.settings import build


class Algorithm(Protocol):
    """The class ``Algorithm`` of a file of ``training/algorithms``: R runs of it, side by side.

    The file also defines ``Config`` (a frozen dataclass with at least ``hidden`` and ``batch_size``), ``PAPER``,
    ``SUMMARY``, ``ACTIONS`` (the action kinds it handles), ``DIVERGENCE`` (per action kind, the exported
    ``divergence_kind``), ``PER_RUN`` (settings in which the runs of a fleet may differ),
    ``COLUMNS`` (the metrics that training shows), ``make_policy(config, networks)`` and, where a comparison shows
    more of it than returns, ``CURVES`` and ``SCAN`` (:mod:`omcda_deploy.plugins`).
    """

    step: int  # gradient steps taken
    policy: nn.Module  # evaluated and exported; its parameters are [R, ...]

    @property
    def budgets(self) -> Tensor | None:
        """Budgets d_i [R, N] in nats; None for algorithms without them."""
        ...

    @property
    def alpha(self) -> Tensor | None:
        """Prices alpha_i [R, N]; None for algorithms without them."""
        ...

    @property
    def noise(self) -> Noise | None:
        """The random numbers of :meth:`compute`; None where it needs none."""
        ...

    def update(self, batch: Batch, watched: bool = True) -> dict[str, Tensor]:
        """Take one gradient step, ``compute(batch, begin(watched))``."""
        ...

    def begin(self, watched: bool) -> Any:
        """Count the next step and seed its noise; return its plan.

        The plan, which must be hashable, is all that the operations of :meth:`compute` depend on beside tensors:
        steps of equal plans do the same. Metrics that cost much and that nothing depends on may be left out of
        steps that are not ``watched``.
        """
        ...

    def compute(self, batch: Batch, plan: Any) -> dict[str, Tensor]:
        """Do a step's tensor operations; return metrics, one number per run [R] or per run and agent [R, N].

        On a GPU they are recorded once per plan and repeated from the record
        (:mod:`omcda_deploy.training.cuda_graph`): they look at no tensor's value, and write states in place.
        """
        ...

    def state_dict(self, run: int) -> dict[str, Any]:
        """Return everything that a later step of one run depends on: tensors and plain values."""
        ...

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go back to the step at which ``states``, one per run, were taken."""
        ...


def create_algorithm(
    name: str,
    spec: TeamSpec,
    behaviors: Sequence[nn.Module],
    *,
    settings: Sequence[Mapping[str, Any]],
    steps: int,
    seeds: Sequence[int],
    device: str = "cpu",
) -> Algorithm:
    """Make an algorithm of R runs at step 0; a run's initial weights depend on its seed alone.

    ``behaviors`` are the runs' cloned pi_b. ``settings`` may differ in those that the module lists as ``PER_RUN``.
    """
    module = load_algorithm(name)
    configs = [build(module.Config, values) for values in settings]
    networks = NetworkFactory(spec, configs[0].hidden, seeds)
    algorithm: Algorithm = module.Algorithm(configs, networks, stack(behaviors), steps=steps, device=device)
    return algorithm
