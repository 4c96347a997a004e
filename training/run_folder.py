"""The run folder, which training writes and export reads.

config.json                    everything that the run depends on (:class:`RunConfig`)
behavior.pt                    the behaviour model that divergence is measured against
metrics.jsonl  tensorboard/    one line per logging interval
resume.pt                      the newest full training state
timing.json                    seconds spent on training up to it, in all processes that resumed the run
policies/step-00010000.pt      policy snapshots: actor, prices, budgets
evaluations.jsonl              returns measured beside training, where asked for
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from omcda_deploy.bundle import DivergenceKind
from omcda_deploy.datasets import DIGEST_VERSION
from omcda_deploy.errors import ConfigError
from omcda_deploy.files import write_json
from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.checkpoint import load_state
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.settings import build
from omcda_deploy.version import __version__

CONFIG, RESUME, BEHAVIOR, POLICIES = "config.json", "resume.pt", "behavior.pt", "policies"
TIMING = "timing.json"


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on, as stored in ``config.json``."""

    algorithm: str
    settings: dict[str, Any]  # all fields of the algorithm's Config
    steps: int
    seed: int
    device: str
    threads: int
    time_limit_is_terminal: bool
    log_every: int
    checkpoint_every: int
    snapshot_every: int
    dataset: str  # path as given
    dataset_digest: str
    behavior: dict[str, Any]  # settings and held-out likelihood of the behaviour model
    team: dict[str, Any]  # TeamSpec.to_json()
    versions: dict[str, str]
    # What the digest of the newest version says, where the dataset file goes by an older one that covers less.
    dataset_content: str = ""
    budget: dict[str, Any] | None = None  # BudgetChoice.to_json() where d_tot was chosen from the dataset
    recipe: str = ""  # name of the recipe that was asked for beside the task's own

    @property
    def spec(self) -> TeamSpec:
        """The team."""
        return TeamSpec.from_json(self.team)

    def began_with(self, digests: Mapping[int, str]) -> bool:
        """Test if a dataset of these :attr:`~omcda_deploy.datasets.Dataset.digests` is the one it began with."""
        known = self.dataset_digest in digests.values()
        return known and self.dataset_content in ("", digests[DIGEST_VERSION])


@dataclass(frozen=True)
class Snapshot:
    """A policy at one step of a run. ``budgets`` and ``alphas`` are None for algorithms without them."""

    step: int
    divergence_kind: DivergenceKind
    policy: nn.Module
    behavior: nn.Module
    observations: NDArray[np.float32]  # [M, N, O] of the dataset, for the parity check of an export
    action_masks: NDArray[np.uint8] | None  # [M, N, A]
    budgets: dict[str, float] | None
    alphas: dict[str, float] | None
    episodes: str  # TrainingEpisodes.to_text() of the dataset; empty in runs that are older than this


def versions() -> dict[str, str]:
    """Return the versions of this package, torch and the source tree."""
    return {"omcda-deploy": __version__, "torch": torch.__version__, "git": git_revision()}


def git_revision() -> str:
    """Return the commit of the source tree, with ``+`` where it has changes; ``unknown`` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.strip()


def read_config(run: Path) -> RunConfig:
    """Read the configuration of a run. Raises :class:`ConfigError` unless ``run`` is a run folder."""
    path = run / CONFIG
    if not path.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no {CONFIG}. Make one with  omcda-deploy train")
    try:
        config = RunConfig(**json.loads(path.read_text()))
        for field in dataclasses.fields(config):
            kind, value = str(field.type).partition("[")[0], getattr(config, field.name)
            if type(value).__name__ != kind and not (value is None and "None" in str(field.type)):
                raise TypeError(f"{field.name}: expected {kind}, got {value!r}")
        return config
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def write_config(run: Path, config: RunConfig) -> None:
    """Write ``config.json``."""
    write_json(run / CONFIG, dataclasses.asdict(config))


def training_seconds(run: Path) -> float:
    """Return the wall-clock seconds of training up to the newest checkpoint, 0 before it, without cloning."""
    seconds: float = _timing(run)["seconds"]
    return seconds


def saved_step(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 before it."""
    step: int = _timing(run)["step"]
    return step


def _timing(run: Path) -> dict[str, Any]:
    path = run / TIMING
    if not path.is_file():
        return {"step": 0, "seconds": 0.0}
    try:
        timing = json.loads(path.read_text())
        return {"step": int(timing["step"]), "seconds": float(timing["seconds"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}): remove it; only the time it tells is lost"
        ) from error


def snapshot_path(run: Path, step: int) -> Path:
    """Return the file of the policy at ``step``."""
    return run / POLICIES / f"step-{step:08d}.pt"


def snapshot_steps(run: Path) -> list[int]:
    """List the steps at which policies were kept, in order."""
    names = (path.stem.removeprefix("step-") for path in (run / POLICIES).glob("step-*.pt"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_snapshot(run: Path, step: int | None = None) -> Snapshot:
    """Read the policy at ``step``, or the last one. Raises :class:`ConfigError` where there is none."""
    config = read_config(run)
    steps = snapshot_steps(run)
    if not steps:
        raise ConfigError(f"{run} holds no policy yet: let it train to its first snapshot, or resume it")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(f"{run} holds no policy of step {step}: it has {', '.join(map(str, steps))}")
    state = load_state(snapshot_path(run, step))
    spec = config.spec
    module = load_algorithm(config.algorithm)
    settings = build(module.Config, config.settings)
    policy = module.make_policy(settings, NetworkFactory(spec, settings.hidden))
    try:
        policy.load_state_dict(state["policy"])
    except RuntimeError as error:  # torch raises it for tensors that do not fit
        raise ConfigError(
            f"{snapshot_path(run, step)} does not fit the {config.algorithm} of this version: train the run again"
        ) from error
    behavior = NetworkFactory(spec, config.behavior["hidden"]).actor()
    behavior_state = load_state(run / BEHAVIOR)
    behavior.load_state_dict(behavior_state["model"])
    masks = behavior_state["action_masks"]
    return Snapshot(
        step,
        module.DIVERGENCE[spec.action_kind],
        policy.eval(),
        behavior.eval(),
        behavior_state["observations"].numpy(),
        None if masks is None else masks.numpy(),
        state["budgets"],
        state["alphas"],
        behavior_state.get("episodes", ""),
    )
