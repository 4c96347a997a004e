"""Training of a run, or of a run per seed, as functions for notebooks and for the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import ConfigError
from omcda_deploy.references import is_reference, require_trusted, trust
from omcda_deploy.registry import read_dataset, require_simulator
from omcda_deploy.spec import TeamSpec

if TYPE_CHECKING:
    from omcda_deploy.training.observer import TrainObserver
    from omcda_deploy.training.request import TrainRequest
    from omcda_deploy.training.run_folder import RunConfig


def train(
    dataset: Dataset | str | Path,
    algorithm: str,
    out: str | Path,
    *,
    steps: int,
    seed: int | Sequence[int] = 0,
    settings: Mapping[str, Any] | None = None,
    task: TeamSpec | str | None = None,
    behavior: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int = 1,
    time_limit_is_terminal: bool = False,
    log_every: int = 100,
    checkpoint_every: int = 1000,
    snapshot_every: int | None = None,
    evaluate_every: int | None = None,
    reward: str | None = None,
    observer: TrainObserver | None = None,
) -> Path:
    """Train ``algorithm`` on ``dataset`` for ``steps`` gradient steps; return the run folder ``out``.

    Several seeds are trained side by side, each into a run folder ``out/seed<seed>`` with the bits that it would
    have alone, at a fraction of the cost (docs/training-speed.md). ``settings`` are those of the algorithm and
    override the recipe of the dataset's task; ``task``, its name or spec, is for a file without, and a name
    ``module:callable`` lets evaluations run an environment of your own. ``behavior`` are
    settings of cloning, such as ``{"steps": 2000}``. ``device`` is cpu, cuda or cuda:N. With
    ``time_limit_is_terminal`` time limits count as ends, as in published code. Metrics are logged, states saved,
    policies kept and kept policies evaluated every so many steps; by default policies are kept as often as they
    are evaluated, else twenty times (rounded to steps that are logged), and never evaluated. ``reward``, sum or
    mean, joins agents' own rewards in evaluations in an environment of your own.

    Raises :class:`UnknownNameError` and :class:`ConfigError`, before the dataset is read, for names and numbers and
    where ``out`` exists; :class:`DatasetError` for the dataset; :class:`ContractError` where the algorithm does not
    handle its team; NoSimulatorError where a task that nothing here plays is to be evaluated; DivergedError where a
    loss is no longer a finite number.
    """
    from omcda_deploy.training.request import TrainRequest

    seeds = [seed] if isinstance(seed, int) else _distinct(seed)
    request = TrainRequest(
        algorithm=algorithm,
        steps=steps,
        seed=seeds[0],
        settings=settings or {},
        behavior=behavior or {},
        device=device,
        threads=threads,
        time_limit_is_terminal=time_limit_is_terminal,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        snapshot_every=snapshot_every,
        evaluate_every=evaluate_every,
        reward=reward,
    )
    if isinstance(task, str):
        trust(task)
    out = Path(out)
    runs = [out] if isinstance(seed, int) else [run_of(out, number) for number in seeds]
    requests = [replace(request, seed=number) for number in seeds]
    train_runs(dataset, list(zip(requests, runs, strict=True)), task=task, observer=observer)
    return out


def train_runs(
    dataset: Dataset | str | Path,
    runs: Sequence[tuple[TrainRequest, Path]],
    *,
    task: TeamSpec | str | None = None,
    observer: TrainObserver | None = None,
) -> None:
    """Train runs side by side, each into its folder.

    They may differ in seed and in settings that the algorithm lists as ``PER_RUN``. Raises as :func:`train` does,
    and :class:`ConfigError` for runs that differ otherwise.
    """
    from omcda_deploy.training import loop

    for request, run in runs:
        request.check()
        loop.require_new(run)
    path = "" if isinstance(dataset, Dataset) else str(dataset)
    data = _dataset(dataset, task)
    for reward in {request.reward for request, _ in runs if request.evaluate_every is not None}:
        _try_out(data.spec, reward)
    loop.train_fleet(data, runs, dataset_path=path, observer=observer)


def resume(
    run: str | Path,
    dataset: Dataset | str | Path | None = None,
    *,
    seeds: Sequence[int] | None = None,
    evaluate_every: int | None = None,
    reward: str | None = None,
    observer: TrainObserver | None = None,
) -> Path:
    """Take a run that was stopped or killed, or a folder of runs per seed, to the last step; return the folder.

    ``seeds`` choose runs ``run/seed<seed>`` of such a folder, all by default. ``dataset`` is needed only where the
    file has moved or the run began with a :class:`Dataset`; ``reward`` is as for :func:`train`. Raises
    :class:`ConfigError` for a folder that is no run, and for another dataset; and NoSimulatorError where a task
    that nothing here plays is to be evaluated.
    """
    run = Path(run)
    runs = _runs_in(run, seeds)
    resume_runs(runs, dataset, evaluate_every=evaluate_every, reward=reward, observer=observer)
    return run


def resume_runs(
    runs: Sequence[Path],
    dataset: Dataset | str | Path | None = None,
    *,
    evaluate_every: int | None = None,
    reward: str | None = None,
    observer: TrainObserver | None = None,
) -> None:
    """Take runs that were stopped or killed to the last step, side by side; they need not have begun so.

    Raises as :func:`resume` does, and :class:`ConfigError` for runs that cannot be trained side by side.
    """
    from omcda_deploy.training import loop

    def read(config: RunConfig) -> Dataset:
        source = config.dataset if dataset is None else dataset
        if not source:
            raise ConfigError(f"{runs[0]} did not begin with a dataset file: expected its dataset, got none")
        if evaluate_every is not None:
            _try_out(config.spec, reward)
        return _dataset(source, config.spec)

    loop.resume_fleet(read, runs, evaluate_every=evaluate_every, reward=reward, observer=observer)


def _try_out(spec: TeamSpec, reward: str | None) -> None:
    """Refuse a task that cannot be evaluated, before cloning; environments of the user's own are played a step."""
    from omcda_deploy.play.evaluate import try_out

    require_simulator(spec.task)
    require_trusted(spec.task)
    if is_reference(spec.task) or reward is not None:
        try_out(spec.task, spec, {} if reward is None else {"reward": reward})


def run_of(out: Path, seed: int) -> Path:
    """Return the run folder of one of several seeds."""
    return out / f"seed{seed}"


def _runs_in(folder: Path, seeds: Sequence[int] | None) -> list[Path]:
    """List the folder itself where it is a run, else those of ``seeds``, or all of its runs per seed."""
    if seeds is not None:
        return [run_of(folder, seed) for seed in _distinct(seeds)]
    runs = sorted(path.parent for path in folder.glob("seed*/config.json"))
    return runs if runs and not (folder / "config.json").exists() else [folder]


def _distinct(seeds: Sequence[int]) -> Sequence[int]:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds: expected one or more numbers, each once, got {list(seeds)}")
    return seeds


def _dataset(dataset: Dataset | str | Path, task: TeamSpec | str | None) -> Dataset:
    return dataset if isinstance(dataset, Dataset) else read_dataset(Path(dataset), task)
