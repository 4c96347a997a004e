"""``behavior``: train, measure and ship the policies that datasets are recorded with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from omcda_deploy.commands import console, progress_bar

app = typer.Typer(help="Make the behaviour policies that datasets are recorded with.", no_args_is_help=True)

EPISODES = 20
REPLAY_CHECKPOINTS = 8  # of medium-replay
RETURNS = "returns.jsonl"


@app.command("train")
def train(
    task: Annotated[str, typer.Argument(help="For instance mamujoco/halfcheetah-6x1.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")],
    seed: Annotated[int, typer.Option()] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Environment steps; the task's own number if omitted.")
    ] = None,
) -> None:
    """Train a joint Gaussian policy on the team's own MDP with PPO, acting on u where the task receives tanh(u)."""
    import dataclasses
    import logging

    import torch

    from omcda_deploy.training import behavior_policies

    logging.getLogger(behavior_policies.__name__).setLevel(logging.INFO)
    torch.set_num_threads(1)
    config = behavior_policies.default_config(task)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    behavior_policies.train(task, out, seed, config)


@app.command("measure")
def measure(
    run: Annotated[Path, typer.Argument(help="Folder of  omcda-deploy behavior train.")],
    first: Annotated[int, typer.Option("--from", help="First checkpoint, in steps.")] = 0,
    last: Annotated[int, typer.Option("--to", help="Last checkpoint, in steps.")] = 10**12,
    workers: Annotated[int, typer.Option()] = 2,
) -> None:
    """Play each checkpoint for 20 episodes, stochastically as recording does, and note its returns."""
    task = json.loads((run / "config.json").read_text())["task"]
    for checkpoint in sorted(run.glob("checkpoint-*.npz")):
        steps = _steps(checkpoint)
        if first <= steps <= last:
            result = _export_measured(checkpoint, task, None, "candidate", workers)
            line = {"steps": steps, **result}
            with (run / RETURNS).open("a") as file:
                file.write(json.dumps(line) + "\n")
            console.print(
                f"{steps:>9}  {result['return_mean']:8.1f} ± {result['return_std']:.1f}", highlight=False
            )


@app.command("ship")
def ship(
    run: Annotated[Path, typer.Argument(help="Folder of  omcda-deploy behavior train, measured.")],
    out: Annotated[Path, typer.Option(help="Folder of shipped policies.")] = Path("omcda_deploy/policies"),
    workers: Annotated[int, typer.Option()] = 2,
) -> None:
    """Export the measured checkpoints nearest to the published mean returns as medium and expert.

    medium-replay gets checkpoints evenly spread up to medium.
    """
    from omcda_deploy.errors import ConfigError
    from omcda_deploy.training.behavior_policies import PUBLISHED_RETURNS

    task = json.loads((run / "config.json").read_text())["task"]
    if not (run / RETURNS).is_file():
        raise ConfigError(f"{run} has not been measured: run  omcda-deploy behavior measure {run}  first")
    measured = [json.loads(line) for line in (run / RETURNS).read_text().splitlines()]
    folder = out / task
    chosen = {}
    for tier, wanted in PUBLISHED_RETURNS[task].items():
        near = min(measured, key=lambda line: abs(line["return_mean"] - wanted))
        chosen[tier] = run / f"checkpoint-{near['steps']:08d}.npz"
        result = _export_measured(chosen[tier], task, folder / tier, tier, workers)
        console.print(
            f"{task} {tier}: {near['steps']} steps, {result} (published data: {wanted})", highlight=False
        )
    medium = _steps(chosen["medium"])
    earlier = [path for path in sorted(run.glob("checkpoint-*.npz")) if _steps(path) <= medium]
    count = min(REPLAY_CHECKPOINTS, len(earlier))
    for index in range(count):
        checkpoint = earlier[(index + 1) * len(earlier) // count - 1]
        target = folder / "medium-replay" / f"{index:02d}"
        result = _export_measured(checkpoint, task, target, "medium-replay", workers)
        console.print(
            f"{task} medium-replay/{index:02d}: {_steps(checkpoint)} steps, {result}", highlight=False
        )
    write_index(out)


@app.command("index")
def write_index(
    out: Annotated[Path, typer.Argument(help="Folder of shipped policies.")] = Path("omcda_deploy/policies"),
) -> None:
    """Write README.md of a folder of shipped policies from their manifests."""
    from omcda_deploy.measurements import write_text
    from omcda_deploy.training.behavior_policies import PUBLISHED_RETURNS

    lines = [
        "# Behaviour policies",
        "",
        "Written by `omcda-deploy behavior ship`; do not edit. Each folder is a bundle. Returns are of 20",
        "stochastic episodes (mean ± standard deviation, evaluation seed 0), as in recording; the published column",
        "is the mean return of OMIGA's dataset of that name, to which `ship` chooses the nearest checkpoint.",
        "",
        "| bundle | PPO steps | seed | return | published |",
        "|---|---|---|---|---|",
    ]
    tasks: dict[str, int] = {}
    for manifest in sorted(out.rglob("bundle.json")):
        data = json.loads(manifest.read_text())
        training, task = data["training"], data["team"]["task"]
        returns, seed = training["returns"], training["ppo"]["seed"]
        tasks[task] = seed
        wanted = PUBLISHED_RETURNS[task].get(training["tier"])
        published = "" if wanted is None else f"{wanted:.0f}"
        lines.append(
            f"| `{manifest.parent.relative_to(out)}` | {training['ppo_steps']:,} | {seed} "
            f"| {returns['return_mean']:.0f} ± {returns['return_std']:.0f} | {published} |"
        )
    lines += ["", "The commands that made them:", "", "```bash"]
    for task, seed in tasks.items():
        run = f"runs/{task.split('/')[1]}"
        lines += [
            f"omcda-deploy behavior train {task} --out {run} --seed {seed}",
            f"omcda-deploy behavior measure {run}",
            f"omcda-deploy behavior ship {run}",
        ]
    lines += [
        "```",
        "",
        "`measure --from … --to …` limits the checkpoints that are played. Training of the shipped policies was",
        "stopped once the expert's return had been passed.",
        "",
    ]
    write_text(out / "README.md", "\n".join(lines))


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("checkpoint-"))


def _export_measured(
    checkpoint: Path, task: str, out: Path | None, tier: str, workers: int
) -> dict[str, Any]:
    """Returns over 20 stochastic episodes of the exported policy; kept as a bundle that says so, if ``out``."""
    import tempfile

    from omcda_deploy.evaluate import evaluate
    from omcda_deploy.export.behavior_policy import export_behavior_policy
    from omcda_deploy.local import JointTeam

    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_behavior_policy(checkpoint, task, Path(scratch) / "bundle", tier=tier)
        with progress_bar(f"playing {checkpoint.name}") as progress:
            result = evaluate(
                JointTeam(bundle),
                task,
                episodes=EPISODES,
                num_envs=EPISODES,
                stochastic=True,
                workers=workers,
                progress=progress,
            )
    returns = {"episodes": EPISODES, "return_mean": round(result.mean, 1), "return_std": round(result.std, 1)}
    if out is not None:
        config = json.loads((checkpoint.parent / "config.json").read_text())
        export_behavior_policy(
            checkpoint,
            task,
            out,
            tier=tier,
            provenance={
                "ppo": config,
                "ppo_steps": _steps(checkpoint),
                "returns": returns,
                "evaluation_seed": 0,
            },
        )
    return returns
