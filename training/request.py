"""The request for a training run, and the run that it resolves to on a team."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.references import require_trusted
from omcda_deploy.registry import load_algorithm
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.behavior_model import BehaviorConfig
from omcda_deploy.training.budget import BUDGETS, BudgetSearch, require_budgets
from omcda_deploy.training.estimation import FittedConfig
from omcda_deploy.training.recipes import recipe, require_recipe
from omcda_deploy.training.settings import build, parse

AUTO = "auto"  # in place of d_tot: it is chosen from the dataset
RECIPE = "recipe"  # among the settings: the name of a recipe, which stands for settings of its own
SEARCH_STEPS = 5000  # most steps of a training for the choice of d_tot
FITTED_STEPS = 2000  # most steps of fitted values, in discrete tasks
SNAPSHOTS = 20  # policies that are kept of a run, unless a request says how often; a score needs several
MOST_STEPS = 10**9
MOST_THREADS = 1024
_WHOLE = ("steps", "seed", "threads", "log_every", "checkpoint_every", "snapshot_every", "evaluate_every")


@dataclass(frozen=True)
class ResolvedRun:
    """A request that was checked against a team: all settings of the algorithm and of cloning are settled."""

    request: TrainRequest
    config: Any  # the algorithm's Config
    behavior: BehaviorConfig
    recipe: Mapping[
        str, Any
    ]  # the settings that come from recipes: the task's, and the one asked for by name
    chooses_budget: bool = False  # d_tot is still to be chosen from the dataset; `config` holds the default

    @property
    def search(self) -> BudgetSearch:
        """The search for the budget: as long as the run, up to 5,000 steps, and the same for all seeds."""
        return BudgetSearch(
            dataclasses.asdict(self.config),
            min(self.request.steps, SEARCH_STEPS),
            # One measurement serves all seeds.
            dataclasses.replace(
                self.behavior, seed=self.behavior.seed if "seed" in self.request.behavior else 0
            ),
            time_limit_is_terminal=self.request.time_limit_is_terminal,
            device=self.request.device,
            budgets=self.request.budgets,
            fitted=FittedConfig(
                steps=min(self.request.steps, FITTED_STEPS),
                gamma=self.config.gamma,
                hidden=self.config.hidden,
            ),
        )


@dataclass(frozen=True)
class TrainRequest:
    """One training run as a user asks for it. Nothing is checked before :meth:`check` or :meth:`resolved`."""

    algorithm: str
    steps: int
    seed: int = 0
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # the algorithm's, which override recipes; RECIPE
    behavior: Mapping[str, Any] = field(
        default_factory=dict
    )  # BehaviorConfig's; hidden is the algorithm's, and seed the run's
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int = 1  # torch's
    time_limit_is_terminal: bool = False
    log_every: int = 100  # steps, like the next three
    checkpoint_every: int = 1000
    snapshot_every: int | None = None  # None: at every evaluation, else SNAPSHOTS times a run
    evaluate_every: int | None = None  # None: never
    reward: str | None = None  # how agents' own rewards join in evaluations
    budgets: Sequence[float] = BUDGETS  # among which d_tot is chosen where it is AUTO

    @property
    def kept_every(self) -> int:
        """Steps between policies that are kept."""
        intervals = (n for n in (self.snapshot_every, self.evaluate_every) if n is not None)
        logged = max(self.log_every, 1)
        return next(intervals, max(self.steps // SNAPSHOTS // logged, 1) * logged)

    @property
    def chooses_budget(self) -> bool:
        """True where d_tot is ``auto``: chosen from the dataset."""
        return self.settings.get("d_tot") == AUTO

    @property
    def recipe(self) -> str | None:
        """Name of the recipe that the settings ask for, None without."""
        return self.settings.get(RECIPE)

    @property
    def _fixed(self) -> Mapping[str, Any]:
        """Settings without those that are still to be chosen or looked up."""
        if self.chooses_budget and self.algorithm != "omcda":
            raise ConfigError(
                f"d_tot=auto: expected the algorithm omcda, got {self.algorithm}: leave d_tot out"
            )
        left = {RECIPE, "d_tot"} if self.chooses_budget else {RECIPE}
        return {name: value for name, value in self.settings.items() if name not in left}

    def check(self) -> None:
        """Refuse what can be refused before a dataset is read.

        Raises :class:`UnknownNameError` for algorithms and settings, :class:`ConfigError` for numbers and devices.
        """
        for name in _WHOLE:
            if (number := getattr(self, name)) is not None and type(number) is not int:  # nor true or false
                raise ConfigError(f"{name}: expected int, got {number!r}")
        check_evaluation(self.evaluate_every, self.kept_every)
        for name in ("steps", "log_every", "threads"):
            if (number := getattr(self, name)) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {number}")
        if self.steps > MOST_STEPS:
            raise ConfigError(f"steps: expected at most {MOST_STEPS:,}, got {self.steps:,}")
        if self.threads > MOST_THREADS:  # torch ends the process where the system gives it no more
            raise ConfigError(f"threads: expected at most {MOST_THREADS}, got {self.threads}")
        for name, number in (
            ("checkpoint_every", self.checkpoint_every),
            ("snapshot_every", self.kept_every),
        ):
            if number < 1 or number % self.log_every:
                raise ConfigError(
                    f"{name}: expected a multiple of {self.log_every}, as metrics are logged, got {number}"
                )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed: expected 0 to {2**32 - 1}, got {self.seed}")
        parse(load_algorithm(self.algorithm).Config, self._fixed)
        if self.recipe is not None:
            require_recipe(self.recipe, self.algorithm)
        parse(BehaviorConfig, self.behavior)
        check_device(self.device)

    def resolved(self, spec: TeamSpec) -> ResolvedRun:
        """Merge the task's recipe, the one asked for by name and the settings, and check everything.

        Raises as :meth:`check` does, :class:`ContractError` for a team that the algorithm does not handle, and
        :class:`ConfigError` for evaluations in an environment of the user's own that the user has not given.
        """
        self.check()
        if self.evaluate_every is not None:
            require_trusted(spec.task)
        module = load_algorithm(self.algorithm)
        if spec.action_kind not in module.ACTIONS:
            raise ContractError(
                f"{self.algorithm} handles {' and '.join(sorted(module.ACTIONS))} actions, {spec.task} has "
                f"{spec.action_kind} ones: choose another algorithm"
            )
        from_recipe = {
            name: value
            for name, value in recipe(spec.task, self.algorithm, self.recipe).items()
            if name not in self.settings
        }
        settings = {**from_recipe, **self._fixed}
        if self.chooses_budget:
            require_budgets(self.budgets, settings)  # before hours are spent on measuring the first of them
        config = build(module.Config, settings)
        behavior = build(BehaviorConfig, {"hidden": config.hidden, "seed": self.seed, **self.behavior})
        if behavior.hidden != config.hidden:
            raise ConfigError(
                f"expected behavior hidden {config.hidden} as the algorithm's, got {behavior.hidden}: leave it out"
            )
        return ResolvedRun(self, config, behavior, from_recipe, self.chooses_budget)


def check_evaluation(evaluate_every: int | None, kept_every: int) -> None:
    """Raise :class:`ConfigError` unless every evaluation finds a policy that is kept."""
    if evaluate_every is None:
        return
    if evaluate_every < 1:
        raise ConfigError(f"evaluate_every: expected at least 1, got {evaluate_every}")
    if kept_every > 0 and evaluate_every % kept_every:
        raise ConfigError(
            f"evaluate_every: expected a multiple of {kept_every}, as policies are kept, got {evaluate_every}"
        )


def check_device(device: str) -> None:
    """Raise :class:`ConfigError` for a device that does not exist."""
    if device == "cpu":
        return
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if named is None:
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(
            f"device {device}: this torch sees no GPU. Use --device cpu, or install a CUDA build of torch"
        )
    if int(named[1] or 0) >= count:
        raise ConfigError(f"device: expected cuda:0 to cuda:{count - 1}, as this machine has, got {device!r}")
