"""JaxMARL's side of :mod:`omcda_deploy.envs.smax`: its battles as compiled functions of many rows at once."""

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

_ZEALOT, _ZERGLING = 3, 4  # as unit types


@dataclass(frozen=True)
class Programs:
    """One map's functions of a fixed number of rows R, each compiled at its first call.

    A row's carry is its random key and JaxMARL's state; ``observe`` alone decides what is shown of it.
    """

    reset: Callable[..., Any]  # keys [R, 2] -> carry
    keep: Callable[..., Any]  # chosen [R], carry of the chosen, carry of the others -> carry
    step: Callable[
        ..., Any
    ]  # carry, actions [R, N], active [R] -> carry, (reward, terminated, truncated, won)
    observe: Callable[..., Any]  # carry -> observations [R, N, O], state [R, S], masks [R, N, A]


@contextmanager
def muted() -> Iterator[None]:
    """jaxmarl prints while it is imported, and sets both streams to the ones Python started with."""
    streams = sys.stdout, sys.stderr, sys.__stdout__
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.BytesIO())  # type: ignore[misc]
    try:
        yield
    finally:
        sys.stdout, sys.stderr, sys.__stdout__ = streams  # type: ignore[misc]


def import_smax() -> tuple[Any, Any]:
    """jax and jaxmarl's smax, quiet, on the CPU and with a compilation cache, unless the user set jax up."""
    # Read when jax starts: no search for accelerators, no memory taken in advance on one that was asked for.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        with muted():
            import jax
            from jaxmarl.environments import smax
    except ImportError as error:
        raise MissingExtraError("jaxmarl", "smax") from error
    # jax fears for a fork that goes on computing; ours (of ffmpeg, say) become another program at once.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return jax, smax


@cache
def programs(name: str, allies: int, enemies: int, episode_limit: int) -> Programs:
    """The functions of a map; corridor is registered with JaxMARL, which has none."""
    jax, smax = import_smax()
    jnp = jax.numpy
    if name == "corridor":
        types = jnp.array([_ZEALOT] * allies + [_ZERGLING] * enemies, jnp.uint8)  # no other type will do
        smax.register_scenario(name, smax.Scenario(types, allies, enemies, False, False))
    battle = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(name))

    def keep(chosen: Any, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda ours, theirs: jnp.where(chosen, ours, theirs), new, old)

    def reset(key: Any) -> Any:
        key, own = jax.random.split(key)
        carry = key, battle.reset(own)[1]
        # Types as `step` returns them (jax counts a Python number's as weaker), or it is compiled twice.
        return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), carry)

    def step(carry: Any, actions: Any, active: Any) -> Any:
        key, state = carry
        key, own = jax.random.split(key)
        named = dict(zip(battle.agents, actions, strict=True))
        _, state, rewards, _, _ = battle.step_env(own, state, named)
        alive = state.state.unit_alive
        survivors, beaten = alive[:allies].any(), ~alive[allies:].any()
        over = beaten | ~survivors
        # JaxMARL's own end comes a step after its limit: it looks at the count before the step.
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
