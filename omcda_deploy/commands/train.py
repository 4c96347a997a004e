"""``train`` and ``algorithms``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from omcda_deploy.commands import console, errors


def algorithms() -> None:
    """List the algorithms: the actions they handle, their papers, one line each."""
    from omcda_deploy import registry

    table = Table(box=None, pad_edge=False)
    for column in ("algorithm", "actions", "what it does", "paper"):
        table.add_column(column)
    for name in registry.algorithms():
        module = registry.load_algorithm(name)
        table.add_row(name, ", ".join(sorted(module.ACTIONS)), module.SUMMARY, module.PAPER)
    console.print(table)


def train(
    dataset: Annotated[Path | None, typer.Argument(help="A dataset file.")] = None,
    algo: Annotated[str, typer.Option(help="See  omcda-deploy algorithms.")] = "omcda",
    out: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 100_000,
    seed: Annotated[int, typer.Option()] = 0,
    d_tot: Annotated[float | None, typer.Option(help="Total divergence budget in nats (omcda).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the algorithm, name=value; repeatable.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of a dataset that does not say.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Torch threads; part of what makes a run repeatable.")] = 1,
    time_limit_is_terminal: Annotated[
        bool,
        typer.Option("--time-limit-is-terminal", help="Count time limits as ends, as published code does."),
    ] = False,
    behavior_steps: Annotated[
        int, typer.Option(help="Most steps for cloning the behaviour policy.")
    ] = 10_000,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between resumable states.")] = 1000,
    snapshot_every: Annotated[int, typer.Option(help="Steps between policies that are kept.")] = 5000,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations, run beside training in their own process.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder instead.")] = None,
) -> None:
    """Train an algorithm on a dataset into a run folder, or resume a run after it was stopped or killed."""
    from omcda_deploy.errors import ConfigError
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.training.run_folder import read_config

    if resume is not None:
        if dataset is not None or out is not None:
            raise ConfigError(
                "--resume continues a run as it was begun: give neither a dataset nor --out with it"
            )
        config = read_config(resume)
        run, path = resume, Path(config.dataset)
        task, steps = config.team["task"], config.steps
    elif dataset is None or out is None:
        raise ConfigError("expected a dataset and --out for a new run, or --resume RUN to continue one")
    else:
        run, path = out, dataset
    chosen = _settings(settings or [], d_tot)
    if resume is None:
        _check_request(algo, chosen, run)
    recorded = read_dataset(path, task)

    from omcda_deploy.training import loop
    from omcda_deploy.training.behavior_model import BehaviorConfig
    from omcda_deploy.training.evaluation import Evaluator

    evaluator = Evaluator(run, evaluate_every) if evaluate_every else None
    with TrainingView(steps, recorded.spec.names) as view:
        if resume is not None:
            loop.resume(recorded, run, on_log=view.log, on_snapshot=evaluator)
        else:
            loop.train(
                recorded,
                algo,
                run,
                dataset_path=str(path),
                steps=steps,
                seed=seed,
                settings=chosen,
                behavior=BehaviorConfig(steps=behavior_steps),
                device=device,
                threads=threads,
                time_limit_is_terminal=time_limit_is_terminal,
                checkpoint_every=checkpoint_every,
                snapshot_every=evaluate_every or snapshot_every,
                on_behavior=view.behavior,
                on_log=view.log,
                on_snapshot=evaluator,
            )
    if evaluator:
        evaluator.wait()
    console.print(f"trained {run}: export it with  omcda-deploy export {run} --out BUNDLE", highlight=False)


def _settings(pairs: list[str], d_tot: float | None) -> dict[str, Any]:
    from omcda_deploy.errors import ConfigError

    chosen: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set: expected name=value, got {pair!r}")
        chosen[name] = value
    if d_tot is not None:
        chosen["d_tot"] = d_tot
    return chosen


def _check_request(algo: str, settings: Mapping[str, Any], out: Path) -> None:
    """What can be refused before a large dataset is read."""
    from omcda_deploy.errors import ConfigError
    from omcda_deploy.registry import load_algorithm
    from omcda_deploy.training.settings import build

    build(load_algorithm(algo).Config, settings)
    if out.exists():
        raise ConfigError(
            f"{out} exists already: choose another --out, or continue it with  train --resume {out}"
        )


class TrainingView:
    """Progress and the numbers that matter: a live table on a terminal, a line now and then elsewhere."""

    _PER_AGENT = (("KL", "kl", 4), ("d", "budget", 4), ("alpha", "alpha", 3), ("m", "influence", 3))
    _SCALARS = (("mean exp z", "z/mean_exp"), ("above z_max", "z/above_max"), ("dual", "dual_active"))

    def __init__(self, steps: int, agents: tuple[str, ...]) -> None:
        self._steps, self._agents = steps, agents
        self._terminal = sys.stderr.isatty()
        self._live = Live(console=errors, transient=True, auto_refresh=False)

    def __enter__(self) -> TrainingView:
        if self._terminal:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._terminal:
            self._live.__exit__(*error)

    def behavior(self, step: int, steps: int, loss: float) -> None:
        line = f"cloning the behaviour policy: step {step} of at most {steps}, held-out NLL {loss:.3f} nats"
        if self._terminal:
            self._live.update(line, refresh=True)
        else:
            errors.print(line, highlight=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._terminal:
            self._live.update(self._table(step, metrics), refresh=True)
        elif step % max(1, self._steps // 20) < 100 or step == self._steps:
            losses = ", ".join(
                f"{k.removeprefix('loss/')} {v:.3g}" for k, v in metrics.items() if "loss/" in k
            )
            kl = sum(metrics.get(f"kl/{agent}", 0.0) for agent in self._agents)
            errors.print(f"step {step} of {self._steps}: {losses}; sum of KL {kl:.4f} nats", highlight=False)

    def _table(self, step: int, metrics: Mapping[str, float]) -> Table:
        shown = [entry for entry in self._PER_AGENT if f"{entry[1]}/{self._agents[0]}" in metrics]
        table = Table(title=f"step {step} of {self._steps}  ({step / self._steps:.0%})", title_justify="left")
        table.add_column("agent")
        for title, *_ in shown:
            table.add_column(title, justify="right")
        for agent in self._agents:
            bound = " (at bound)" if metrics.get(f"alpha_at_bound/{agent}", 0.0) > 0.5 else ""
            table.add_row(
                agent + bound, *(f"{metrics[f'{key}/{agent}']:.{digits}f}" for _, key, digits in shown)
            )
        losses = [f"{k.removeprefix('loss/')} {v:.3g}" for k, v in metrics.items() if k.startswith("loss/")]
        scalars = [f"{title} {metrics[key]:.3g}" for title, key in self._SCALARS if key in metrics]
        table.caption = "  ".join(losses) + "\n" + "  ".join(scalars)
        return table
