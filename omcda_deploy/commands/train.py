"""``train`` and ``algorithms``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from omcda_deploy.commands import (
    AsJson,
    DatasetTask,
    RewardRule,
    named_values,
    print_json,
    print_table,
    print_text,
    rule_of,
)
from omcda_deploy.commands.completion import algorithm_names
from omcda_deploy.commands.stopping import command, nothing, this_command, when_stopped
from omcda_deploy.errors import ConfigError
from omcda_deploy.references import is_reference, trust

AlgorithmName = Annotated[
    str, typer.Option(help="See  omcda-deploy algorithms.", autocompletion=algorithm_names)
]
Budget = Annotated[
    str | None,
    typer.Option(help="Total divergence budget in nats (omcda); auto: as  omcda-deploy choose-budget  says."),
]
Recipe = Annotated[
    str | None,
    typer.Option(help="Settings by name, such as paper (omcda by its paper's letter); --set overrides them."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the algorithm, name=value; repeatable.")
]


def algorithms(as_json: AsJson = False) -> None:
    """List the algorithms: the actions they handle, their papers, one line each."""
    from omcda_deploy import registry

    modules = registry.load_algorithms()
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "actions": sorted(module.ACTIONS),
                    "summary": module.SUMMARY,
                    "paper": module.PAPER,
                    "divergence": dict(module.DIVERGENCE),
                }
                for name, module in modules.items()
            ]
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("algorithm", "actions", "what it does", "paper"):
        table.add_column(column)
    for name, module in modules.items():
        table.add_row(name, ", ".join(sorted(module.ACTIONS)), module.SUMMARY, module.PAPER)
    print_table(table)


def train(
    context: typer.Context,
    dataset: Annotated[
        Path | None, typer.Argument(help="A dataset file; with --resume only where it has moved.")
    ] = None,
    algo: AlgorithmName = "omcda",
    out: Annotated[Path | None, typer.Option(help="Run folder to make.")] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Seed of the weights and batches.")] = 0,
    seeds: Annotated[
        str | None,
        typer.Option(help="Several, as 0,1,2: trained side by side into OUT/seed0, OUT/seed1, …"),
    ] = None,
    d_tot: Budget = None,
    recipe: Recipe = None,
    settings: Settings = None,
    task: DatasetTask = None,
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
            help="Steps between policies that are kept; those between evaluations, or a twentieth of the steps, "
            "when omitted."
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations, run beside training in their own process.")
    ] = None,
    reward: RewardRule = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder instead.")] = None,
) -> None:
    """Train an algorithm on a dataset into a run folder, or resume a run after it was stopped or killed."""
    from omcda_deploy.commands.training_view import TrainingView
    from omcda_deploy.experiments import train as training

    rule = rule_of(reward, "--evaluate-every", evaluate_every is not None)
    evaluations: dict[str, Any] = {"evaluate_every": evaluate_every, "reward": rule}
    with when_stopped(lambda: _kept(out, resume, task, **evaluations)), TrainingView() as view:
        if resume is not None:
            own = ["task"] if task is not None and is_reference(task) else []
            _require_only(context, "resume", "dataset", "seeds", *evaluations, *own)
            trust(task or "")
            chosen = None if seeds is None else _numbers(seeds)
            run = training.resume(resume, dataset, seeds=chosen, observer=view, **evaluations)
        elif dataset is None or out is None:
            raise ConfigError("expected a dataset and --out for a new run, or --resume RUN to continue one")
        elif seeds is not None and _given(context, "seed"):
            raise ConfigError("expected --seed or --seeds, got both: leave one of them out")
        else:
            run = training.train(
                dataset,
                algo,
                out,
                steps=steps,
                seed=seed if seeds is None else _numbers(seeds),
                settings=named_values("--set", settings, d_tot=d_tot, recipe=recipe),
                task=task,
                behavior={"steps": behavior_steps},
                device=device,
                threads=threads,
                time_limit_is_terminal=time_limit_is_terminal,
                checkpoint_every=checkpoint_every,
                snapshot_every=snapshot_every,
                observer=view,
                **evaluations,
            )
    _print_next(run)


def _kept(
    out: Path | None, resumed: Path | None, task: str | None, evaluate_every: int | None, reward: str | None
) -> str:
    """Say what is kept of a new or resumed run, or of the runs in a folder."""
    from omcda_deploy.training.run_folder import CONFIG, saved_step

    folder = resumed or out
    runs = [] if folder is None else [folder, *sorted(folder.glob("seed*"))]
    runs = [run for run in runs if (run / CONFIG).is_file()]
    if not runs:
        return nothing()
    beside = () if evaluate_every is None else ("--evaluate-every", evaluate_every)
    own = ("--env", task) if beside and task and is_reference(task) else ()
    rule = () if reward is None else ("--reward", reward)
    go_on = this_command() if resumed else command("train", "--resume", folder, *beside, *own, *rule)
    return f"the state of step {min(map(saved_step, runs))} is kept, go on with  {go_on}"


def _print_next(run: Path) -> None:
    """Say what to do with a trained run, or with one of those in a folder."""
    from omcda_deploy.training.run_folder import CONFIG

    single = (run / CONFIG).is_file()
    which, one = ("it", run) if single else ("one", min(run.glob("seed*"), default=run))
    print_text(f"trained {run}: export {which} with  {command('export', one, '--out', 'BUNDLE')}")


def _numbers(seeds: str) -> list[int]:
    """Read the numbers of ``--seeds``."""
    try:
        return [int(number) for number in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds: expected numbers such as 0,1,2, got {seeds!r}") from None


def _require_only(context: typer.Context, *allowed: str) -> None:
    """Refuse options that ``--resume`` would otherwise ignore."""
    for parameter in context.command.params:
        if _given(context, parameter.name or "") and parameter.name not in allowed:
            raise ConfigError(
                f"--resume continues a run as it was begun: leave {parameter.opts[0]} out, or start a new run"
            )


def _given(context: typer.Context, name: str) -> bool:
    """Test if an option was given, be it with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
