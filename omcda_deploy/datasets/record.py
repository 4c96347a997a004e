"""Record what a loop of one's own does in an environment of PettingZoo's parallel shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Episode, Scalar
from omcda_deploy.datasets.episodes import admitted, all_available
from omcda_deploy.datasets.formats.omiga_hdf5 import SUFFIXES
from omcda_deploy.datasets.teams import EPISODE_LIMIT, agents_of_spaces
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.errors import ConfigError, ContractError, DatasetError
from omcda_deploy.spec import TeamSpec

Reward = Literal["shared", "sum", "mean"]
REWARDS: tuple[Reward, ...] = ("shared", "sum", "mean")

logger = logging.getLogger(__name__)


class RecordDataset:
    """An environment that records the episodes that are played in it; a context manager.

    It wraps any environment with PettingZoo's parallel ``reset`` and ``step``, and passes all else on to it::

        with RecordDataset(environment, "reach.hdf5", task="cell/reach", control_rate=10) as recorded:
            for seed in range(100):
                observations, infos = recorded.reset(seed=seed)
                while recorded.agents:
                    actions = {agent: policy(observations[agent]) for agent in recorded.agents}
                    observations, rewards, terminated, truncated, infos = recorded.step(actions)

    ``spec`` is the team's; without it, it is made of the environment's ``spec`` if that is a :class:`TeamSpec`,
    else of its spaces, ``task``, ``control_rate`` (Hz; the environment's ``metadata["render_fps"]`` if None) and
    ``episode_limit`` (steps), with the agents in the order of ``possible_agents``. The state is that of
    ``environment.state()`` where there is one, else all observations joined. Masks of choices are taken from
    observations or infos, as ``action_mask``. ``reward`` says how agents' rewards become the team's: ``shared``
    requires that they are equal. ``behavior`` names the policy that acts.

    An episode ends with a step that terminates or truncates all agents; one that the loop leaves by :meth:`reset`
    or :meth:`close` counts as cut by a time limit. The file appears when it is closed. If the loop ends by an
    exception, Ctrl-C included, finished episodes are kept, and the running one is left out.

    Raises :class:`DatasetError` for a path that exists or ends otherwise than ``.hdf5`` or ``.h5``, spaces that no
    spec can state, and values that cannot be trained on; :class:`ConfigError` where the team is not described;
    :class:`ContractError`, naming the agent and the step, where an agent leaves before the others, rewards differ,
    or only some agents end.
    """

    def __init__(
        self,
        environment: Any,
        path: str | Path,
        *,
        spec: TeamSpec | None = None,
        task: str | None = None,
        control_rate: float | None = None,
        episode_limit: int = EPISODE_LIMIT,
        reward: Reward = "shared",
        behavior: str = "unknown",
        metadata: Mapping[str, Scalar] | None = None,
    ) -> None:
        self.environment = environment
        self._path = Path(path)
        if self._path.suffix not in SUFFIXES:
            raise DatasetError(
                f"{path}: expected a name ending in {' or '.join(SUFFIXES)}: choose another name"
            )
        if self._path.exists():
            raise DatasetError(f"{path} exists already: choose another name, or remove it first")
        if reward not in REWARDS:
            raise ConfigError(f"reward: expected {', '.join(REWARDS)}, got {reward!r}")
        own = getattr(environment, "spec", None)
        self._spec = spec or (own if isinstance(own, TeamSpec) else None)
        if control_rate is None:
            metadata_of = getattr(environment, "metadata", None)
            control_rate = metadata_of.get("render_fps") if isinstance(metadata_of, Mapping) else None
        if self._spec is None and (not task or control_rate is None):
            raise ConfigError("expected spec, or task and control_rate, which no space tells: give them")
        self._told = task or "", control_rate or 0.0, episode_limit
        self._reward, self._behavior = reward, behavior
        self._metadata = {**(metadata or {}), "behavior": behavior}
        self._writer: DatasetWriter | None = None
        self._has_state = False
        self._running: _Rows | None = None
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.environment, name)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Start an episode as the environment does; a running one counts as cut by a time limit."""
        self._keep(cut=True)
        arguments = {"seed": seed} if options is None else {"seed": seed, "options": options}
        observations, infos = self.environment.reset(**arguments)
        if self._writer is None:
            self._open(observations)
        self._running = _Rows(self._team, seed)
        self._running.observe(observations, infos, self._state())
        return observations, infos

    def step(self, actions: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        """Step the environment and keep what it says."""
        rows = self._running
        if rows is None:
            raise ContractError(f"{self._path}: no episode is running: call reset() first")
        rows.act(actions)
        observations, rewards, terminated, truncated, infos = self.environment.step(actions)
        rows.reward(rewards, self._reward)
        ends = rows.ends(terminated, truncated)
        rows.observe(observations, infos, self._state())
        if any(ends):
            self._keep(cut=not ends[0])
        return observations, rewards, terminated, truncated, infos

    def close(self) -> None:
        """Write the file and close the environment. A second call does nothing."""
        self._close(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if error is None:
                self._keep(cut=True)
        except BaseException as refused:
            error = refused
            raise
        finally:
            try:
                self._finish(error)
            finally:
                self.environment.close()

    def _finish(self, error: BaseException | None) -> None:
        """Write the file, unless an error left nothing to write."""
        if self._writer is not None:
            if error is None or self._writer.episodes:
                self._writer.__exit__(None, None, None)
            else:
                self._writer.__exit__(type(error), error, error.__traceback__)

    @property
    def _team(self) -> TeamSpec:
        assert self._spec is not None  # once the file is open
        return self._spec

    def _open(self, observations: Mapping[str, Any]) -> None:
        """Make the spec of the spaces, if there is none, and open the file."""
        state = self._read_state()
        self._has_state = state is not None
        if self._spec is None:
            names = list(self.environment.possible_agents)
            task, control_rate, episode_limit = self._told
            agents = agents_of_spaces(
                names,
                {name: self.environment.observation_space(name) for name in names},
                {name: self.environment.action_space(name) for name in names},
                task,
            )
            joined = len(agents) * max(agent.observation_size for agent in agents)
            self._spec = TeamSpec(
                task,
                agents,
                joined if state is None else state.size,
                control_rate,
                episode_limit=episode_limit,
            )
        self._has_state &= state is not None and state.size == self._spec.state_size
        self._writer = DatasetWriter(self._path, self._spec, self._metadata)
        self._writer.__enter__()

    def _state(self) -> NDArray[Any] | None:
        return self._read_state() if self._has_state else None

    def _read_state(self) -> NDArray[Any] | None:
        try:
            return np.array(self.environment.state()).reshape(-1)  # a copy: it may be one buffer, filled anew
        except (AttributeError, NotImplementedError):  # PettingZoo's own method raises the latter
            return None

    def _keep(self, cut: bool) -> None:
        """Write the running episode, if it has a step."""
        rows, self._running = self._running, None
        if rows is not None and rows.steps and self._writer is not None:
            label = f"{self._path}: episode {self._writer.episodes}"
            self._writer.append(admitted(rows.episode(cut), self._team, label), self._behavior)


class _Rows:
    """The rows of a running episode."""

    def __init__(self, spec: TeamSpec, seed: int | None) -> None:
        self._spec, self._seed = spec, seed
        self._observations: list[NDArray[Any]] = []
        self._masks: list[NDArray[Any]] = []
        self._states: list[NDArray[Any]] = []
        self._actions: list[NDArray[Any]] = []
        self._rewards: list[float] = []

    @property
    def steps(self) -> int:
        """Steps that are complete."""
        return len(self._observations) - 1

    def observe(self, observations: Any, infos: Any, state: NDArray[Any] | None) -> None:
        """Keep a row of observations, masks and the state."""
        self._require_all(observations, "observations")
        row = np.zeros((len(self._spec.agents), self._spec.observation_size), np.float32)
        masks = all_available(self._spec, 1)[0]
        for index, agent in enumerate(self._spec.agents):
            value = observations[agent.name]
            inside = value if isinstance(value, Mapping) else {"observation": value}
            vector = np.asarray(inside.get("observation"))
            self._require_shape(vector, (agent.observation_size,), agent.name, "observation")
            with np.errstate(over="ignore"):  # infinity, which the writer refuses
                row[index, : agent.observation_size] = vector
            mask = inside.get("action_mask", _info(infos, agent.name).get("action_mask"))
            if mask is not None and agent.action.kind == "discrete":
                mask = np.asarray(mask)
                self._require_shape(mask, (agent.action.size,), agent.name, "action mask")
                masks[index, : agent.action.size] = mask
        self._observations.append(row)
        self._masks.append(masks)
        self._states.append(row.reshape(-1) if state is None else state)

    def act(self, actions: Any) -> None:
        """Keep the actions of a step, after those of an attempt that failed are gone."""
        self._require_all(actions, "actions")
        del self._actions[self.steps :], self._rewards[self.steps :]
        if self._spec.action_kind == "discrete":
            row = np.zeros(len(self._spec.agents), np.int64)
        else:
            row = np.zeros((len(self._spec.agents), self._spec.action_size), np.float32)
        for index, agent in enumerate(self._spec.agents):
            value = np.asarray(actions[agent.name])
            size = () if agent.action.kind == "discrete" else (agent.action.size,)
            self._require_shape(value, size, agent.name, "action")
            if size:
                row[index, : agent.action.size] = value
            else:
                row[index] = value
        self._actions.append(row)

    def reward(self, rewards: Any, rule: Reward) -> None:
        """Keep the team's reward of a step. Raises :class:`ContractError` where shared ones differ."""
        self._require_all(rewards, "rewards")
        values = [float(rewards[name]) for name in self._spec.names]
        if rule == "shared":
            self._require_equal(values, "reward", "choose reward='sum' or 'mean', if that is the team's")
        self._rewards.append(
            sum(values) / (len(values) if rule == "mean" else 1) if rule != "shared" else values[0]
        )

    def ends(self, terminated: Any, truncated: Any) -> tuple[bool, bool]:
        """Return if the step ended the episode by itself, and by a time limit, which is equal for all agents."""
        flags = []
        for name, values in (("termination", terminated), ("truncation", truncated)):
            self._require_all(values, f"{name}s")
            agents = [bool(values[agent]) for agent in self._spec.names]
            self._require_equal(agents, name, "a team's episode ends for all of its agents at once")
            flags.append(agents[0])
        return flags[0], flags[1]

    def episode(self, cut: bool) -> Episode:
        """The episode so far; ``cut`` by a time limit, or ended by the task."""
        return Episode(
            np.stack(self._observations),
            np.stack(self._states),
            np.stack(self._actions[: self.steps]),
            np.array(self._rewards[: self.steps], np.float64),
            timeout=cut,
            action_masks=np.stack(self._masks) if self._spec.action_kind == "discrete" else None,
            seed=self._seed,
        )

    def _require_all(self, values: Any, what: str) -> None:
        missing = [name for name in self._spec.names if not isinstance(values, Mapping) or name not in values]
        if missing:
            raise ContractError(
                f"{self._spec.task}: step {self.steps}: expected {what} of {', '.join(self._spec.names)}, those of "
                f"{missing[0]} are missing: a team's agents stay until the episode ends, with an action that does "
                "nothing if need be"
            )

    def _require_equal(self, values: list[Any], what: str, advice: str) -> None:
        for name, value in zip(self._spec.names, values, strict=True):
            if value != values[0]:
                raise ContractError(
                    f"{self._spec.task}: step {self.steps}: expected one {what} for the whole team, got "
                    f"{values[0]} for {self._spec.names[0]} and {value} for {name}: {advice}"
                )

    def _require_shape(self, value: NDArray[Any], shape: tuple[int, ...], name: str, what: str) -> None:
        kinds = "iu" if what == "action" and not shape else "fiub"
        if value.shape != shape or value.dtype.kind not in kinds:
            expected = "an integer" if kinds == "iu" else f"{shape[0]} numbers"
            raise ContractError(
                f"{self._spec.task}: step {self.steps}: {what} of {name}: expected {expected}, got {value.dtype} "
                f"of shape {list(value.shape)}"
            )


def _info(infos: Any, name: str) -> Mapping[str, Any]:
    info = infos.get(name) if isinstance(infos, Mapping) else None
    return info if isinstance(info, Mapping) else {}
