"""``train`` and ``algorithms``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from omcda_deploy.commands import console, stderr
from omcda_deploy.errors import ConfigError


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
    context: typer.Context,
    dataset: Annotated[
        Path | None, typer.Argument(help="A dataset file; with --resume only where it has moved.")
    ] = None,
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
    snapshot_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between policies that are kept; those between evaluations, or 5000, when omitted."
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations, run beside training in their own process.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder instead.")] = None,
) -> None:
    """Train an algorithm on a dataset into a run folder, or resume a run after it was stopped or killed."""
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.training.run_folder import read_config

    if resume is not None:
        _require_only(context, "resume", "dataset", "evaluate_every")
        begun = read_config(resume)
        run, path = resume, dataset or Path(begun.dataset)
        task, steps, kept_every = begun.team["task"], begun.steps, begun.snapshot_every
    elif dataset is None or out is None:
        raise ConfigError("expected a dataset and --out for a new run, or --resume RUN to continue one")
    else:
        run, path = out, dataset
        kept_every = next((n for n in (snapshot_every, evaluate_every) if n is not None), 5000)
    if evaluate_every is not None:
        _require_multiple(evaluate_every, kept_every)
    chosen = _settings(settings or [], d_tot)
    hidden = 0 if resume else _check_request(algo, chosen, run)
    recorded = read_dataset(path, task)
    if resume is None:
        _announce_recipe(recorded.spec.task, algo, chosen)

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
                behavior=BehaviorConfig(steps=behavior_steps, hidden=hidden),
                device=device,
                threads=threads,
                time_limit_is_terminal=time_limit_is_terminal,
                checkpoint_every=checkpoint_every,
                snapshot_every=kept_every,
                on_behavior=view.behavior,
                on_log=view.log,
                on_snapshot=evaluator,
            )
    if evaluator:
        evaluator.wait()
    console.print(f"trained {run}: export it with  omcda-deploy export {run} --out BUNDLE", highlight=False)


def _settings(pairs: list[str], d_tot: float | None) -> dict[str, Any]:

    chosen: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--set: expected name=value, got {pair!r}")
        chosen[name] = value
    if d_tot is not None:
        chosen["d_tot"] = d_tot
    return chosen


def _require_multiple(evaluate_every: int, kept_every: int) -> None:

    if evaluate_every < 1:
        raise ConfigError(f"evaluate_every: expected at least 1, got {evaluate_every}")
    if kept_every > 0 and evaluate_every % kept_every:
        raise ConfigError(
            f"evaluate_every: expected a multiple of {kept_every}, as policies are kept, got {evaluate_every}"
        )


def _require_only(context: typer.Context, *allowed: str) -> None:
    """Refuse what ``--resume`` would otherwise ignore."""

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT" and parameter.name not in allowed:
            raise ConfigError(
                f"--resume continues a run as it was begun: leave {parameter.opts[0]} out, or start a new run"
            )


def _check_request(algo: str, settings: Mapping[str, Any], out: Path) -> int:
    """Refuse what can be refused before a large dataset is read; returns the networks' hidden size."""
    from omcda_deploy.registry import load_algorithm
    from omcda_deploy.training.settings import build

    config = build(load_algorithm(algo).Config, settings)
    if out.exists():
        raise ConfigError(
            f"{out} exists already: choose another --out, or continue it with  train --resume {out}"
        )
    return int(config.hidden)


def _announce_recipe(task: str, algo: str, chosen: Mapping[str, Any]) -> None:
    from omcda_deploy.training.recipes import recipe

    used = {name: value for name, value in recipe(task, algo).items() if name not in chosen}
    if used:
        shown = " ".join(f"{name}={value}" for name, value in used.items())
        stderr.print(f"recipe of {task.partition('/')[0]}: {shown}", highlight=False, soft_wrap=True)


class TrainingView:
    """Progress and the numbers that matter: a bar and a table on a terminal, about twenty lines elsewhere."""

    _PER_AGENT = (("KL", "kl", 4), ("d", "budget", 4), ("alpha", "alpha", 3), ("m", "influence", 3))
    _SCALARS = (
        ("mean exp z", "z/mean_exp"),
        ("z above its maximum", "z/above_max"),
        ("z clamped", "z/clamped"),
    )

    def __init__(self, steps: int, agents: tuple[str, ...]) -> None:
        self._steps, self._agents = steps, agents
        self._printed = -1  # twentieths of the run
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=stderr,
            )
            self._cloning = self._bar.add_task("cloning the behaviour policy", visible=False)
            self._training = self._bar.add_task("training", total=steps)
            self._live = Live(self._bar, console=stderr, auto_refresh=False)

    def __enter__(self) -> TrainingView:
        if self._bar:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._live.__exit__(*error)

    def behavior(self, step: int, steps: int, loss: float) -> None:
        if self._bar:
            text = f"cloning the behaviour policy, held-out NLL {loss:.3f} nats"
            self._bar.update(self._cloning, completed=step, total=steps, description=text, visible=True)
            self._live.refresh()
        else:
            self._print(
                f"cloning the behaviour policy: step {step} of at most {steps}, held-out NLL {loss:.3f}"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        losses = "  ".join(f"{k.removeprefix('loss/')} {v:.3g}" for k, v in metrics.items() if "loss/" in k)
        if self._bar:
            self._bar.update(self._cloning, visible=False)
            self._bar.update(self._training, completed=step)
            scalars = [f"{title} {metrics[key]:.3g}" for title, key in self._SCALARS if key in metrics]
            if metrics.get("dual_active", 1.0) < 0.5:
                scalars.append("prices wait for the reward critic")
            lines = (Text(f"losses: {losses}", "dim"), Text("  ".join(scalars), "dim"))
            self._live.update(Group(self._bar, self._table(metrics), *lines), refresh=True)
        elif (twentieth := 20 * step // self._steps) > self._printed:
            self._printed = twentieth
            kl = sum(metrics.get(f"kl/{agent}", 0.0) for agent in self._agents)
            self._print(f"step {step} of {self._steps}: {losses}  sum of KL {kl:.4f} nats")

    def _print(self, line: str) -> None:
        stderr.print(line, highlight=False, soft_wrap=True)

    def _table(self, metrics: Mapping[str, float]) -> Table:
        shown = [entry for entry in self._PER_AGENT if f"{entry[1]}/{self._agents[0]}" in metrics]
        table = Table(box=None, pad_edge=False)
        table.add_column("agent")
        for title, *_ in shown:
            table.add_column(title, justify="right")
        for agent in self._agents:
            bound = " (alpha at its bound)" if metrics.get(f"alpha_at_bound/{agent}", 0.0) > 0.5 else ""
            table.add_row(
                agent + bound, *(f"{metrics[f'{key}/{agent}']:.{digits}f}" for _, key, digits in shown)
            )
        return table
