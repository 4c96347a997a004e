"""Battles of :mod:`omcda_deploy.envs.smax` as compiled JaxMARL functions of many rows at once."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from omcda_deploy.errors import MissingExtraError
from omcda_deploy.files import cache_folder

_ZEALOT, _ZERGLING = 3, 4  # JaxMARL's numbers of unit types


@dataclass(frozen=True)
class Programs:
    """Functions of one map and a fixed number of rows R, each compiled at its first call.

    A row's carry is its random key and JaxMARL's state; only ``observe`` looks into it.
    """

    reset: Callable[..., Any]  # keys [R, 2] -> carry
    keep: Callable[..., Any]  # chosen [R], carry of the chosen, carry of the others -> carry
    # carry, actions [R, N], active [R] -> carry, (reward, terminated, truncated, won)
    step: Callable[..., Any]
    observe: Callable[..., Any]  # carry -> observations [R, N, O], state [R, S], masks [R, N, A]


@contextmanager
def muted() -> Iterator[None]:
    """Discard output inside the block and restore the streams after it.

    While jaxmarl is imported it prints, and it replaces both streams by those that Python started with.
    """
    streams = sys.stdout, sys.stderr, sys.__stdout__
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.BytesIO())  # type: ignore[misc]
    try:
        yield
    finally:
        sys.stdout, sys.stderr, sys.__stdout__ = streams  # type: ignore[misc]


def import_smax() -> tuple[Any, Any]:
    """Import jax and jaxmarl's smax without output, on the CPU and with a compilation cache.

    Settings that the user made take precedence. Raises :class:`MissingExtraError` without jaxmarl.
    """
    # jax reads these when it starts: no search for accelerators, and on a chosen one no memory taken in advance.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        with muted():
            import jax
            from jaxmarl.environments import smax
    except ImportError as error:
        raise MissingExtraError("jaxmarl", "smax") from error
    # jax warns of forks that go on computing; our child processes (ffmpeg, say) start another program at once.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return jax, smax


@cache
def programs(name: str, allies: int, enemies: int, episode_limit: int) -> Programs:
    """Make the functions of a map, after registering ``corridor``, which JaxMARL does not have."""
    jax, smax = import_smax()
    jnp = jax.numpy
    if name == "corridor":
        types = jnp.array(
            [_ZEALOT] * allies + [_ZERGLING] * enemies, jnp.uint8
        )  # JaxMARL accepts no other type
        smax.register_scenario(name, smax.Scenario(types, allies, enemies, False, False))
    battle = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(name))

    def keep(chosen: Any, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda fresh, previous: jnp.where(chosen, fresh, previous), new, old)

    def reset(key: Any) -> Any:
        key, reset_key = jax.random.split(key)
        carry = key, battle.reset(reset_key)[1]
        # Cast to the types that `step` returns: jax gives Python numbers a weaker type, and would compile it twice.
        return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), carry)

    def step(carry: Any, actions: Any, active: Any) -> Any:
        key, state = carry
        key, step_key = jax.random.split(key)
        named = dict(zip(battle.agents, actions, strict=True))
        _, state, rewards, _, _ = battle.step_env(step_key, state, named)
        alive = state.state.unit_alive
        survivors, beaten = alive[:allies].any(), ~alive[allies:].any()
        over = beaten | ~survivors
        # JaxMARL's own limit ends an episode one step late, because it looks at the count before the step.
        late = state.state.step >= episode_limit
        outcome = (
            jnp.where(active, rewards[battle.agents[0]], 0.0),
            active & over,
            active & late & ~over,
            active & beaten & survivors,
        )
        return keep(active, (key, state), carry), outcome

    def observe(carry: Any) -> Any:
        _, state = carry
        observations, masks = battle.get_obs(state), battle.get_avail_actions(state)
        return (
            jnp.stack([observations[agent] for agent in battle.agents]),
            battle.get_world_state(state),
            jnp.stack([masks[agent] for agent in battle.agents]),
        )

    return Programs(*(jax.jit(jax.vmap(function)) for function in (reset, keep, step, observe)))
