"""Environments of the user's own, as tasks named ``module:callable`` (docs/extending.md#a-simulator).

The callable returns an environment: a PettingZoo ``ParallelEnv`` or anything of its shape, whose spec follows from
its spaces, or an environment with a ``spec`` of its own. The task's name becomes that of the spec, so that
datasets, runs and bundles say where their episodes are played.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omcda_deploy import registry
from omcda_deploy.envs.adapters.border import Reward, require_reward
from omcda_deploy.envs.adapters.parallel import OwnTeam, from_parallel
from omcda_deploy.errors import PluginError
from omcda_deploy.references import load_callable, require_arguments, user_code
from omcda_deploy.spec import TeamSpec

TASKS: tuple[str, ...] = ()  # none by name


def make(task: str, reward: Reward | None = None, **options: Any) -> OwnTeam:
    """Call the callable that ``task`` names, with the ``options`` that it declares, and check what it returns.

    ``reward`` joins the agents' rewards (:func:`from_parallel`); None keeps what the environment was adapted with.
    Raises :class:`PluginError` for a reference or an object that is no environment, :class:`ConfigError` for other
    options than the callable's.
    """
    if reward is not None:
        require_reward(reward)
    create = load_callable(task)
    if options:
        registry.require_options(task, create, options)
    require_arguments(task, create, **options)
    with user_code(f"{task}: calling it", PluginError):
        source = create(**options)
    if isinstance(source, OwnTeam):
        return source.relabeled(task, reward)
    spec = getattr(source, "spec", None)
    if not isinstance(spec, TeamSpec):
        return from_parallel(source, task=task, reward=reward or "shared")
    missing = [name for name in ("reset", "step") if not callable(getattr(source, name, None))]
    if not hasattr(source, "state") and spec.state_size != spec.observation_slices[-1].stop:
        missing.append("state")
    if missing:
        raise PluginError(
            f"{task}: returned {source!r:.60}, which has a spec but lacks {', '.join(missing)}: define it"
        )
    return OwnTeam(source, replace(spec, task=task), reward or "shared")
