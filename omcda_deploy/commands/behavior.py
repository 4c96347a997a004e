"""``behavior``: train, measure and ship the policies that datasets are recorded with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from omcda_deploy.commands import console, progress_bar
from omcda_deploy.errors import ConfigError, UnknownNameError

app = typer.Typer(help="Make the behaviour policies that datasets are recorded with.", no_args_is_help=True)

EPISODES = 20
BATTLES = 200  # short episodes, of which a share is won
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
    """Train behaviour policies with PPO: one joint Gaussian policy for MuJoCo, one that agents share for SMAX."""
    import dataclasses
    import logging

    import torch

    from omcda_deploy.training.behavior import mujoco as behavior_policies

    logging.getLogger(behavior_policies.__name__).setLevel(logging.INFO)
    torch.set_num_threads(1)
    trainer: Any = behavior_policies
    if task.startswith("smax/"):
        from omcda_deploy.training.behavior import smax as behavior_policies_smax

        trainer = behavior_policies_smax
    config = trainer.default_config(task)
    if steps is not None:
        config = dataclasses.replace(config, steps=steps)
    trainer.train(task, out, seed, config)


@app.command("measure")
def measure(
    run: Annotated[Path, typer.Argument(help="Folder of  omcda-deploy behavior train.")],
    first: Annotated[int, typer.Option("--from", help="First checkpoint, in steps.")] = 0,
    last: Annotated[int, typer.Option("--to", help="Last checkpoint, in steps.")] = 10**12,
    workers: Annotated[int, typer.Option()] = 2,
) -> None:
    """Play each checkpoint for 20 episodes (SMAX: 200), stochastically as recording does, and note its returns."""
    config = run / "config.json"
    if not config.is_file():
        raise ConfigError(
            f"{run}: expected a folder of  omcda-deploy behavior train, found no {config.name} there"
        )
    task = json.loads(config.read_text())["task"]
    for checkpoint in sorted(run.glob("checkpoint-*.npz")):
        steps = _steps(checkpoint)
        if first <= steps <= last:
            result = _export_measured(checkpoint, task, None, "candidate", workers)
            line = {"steps": steps, **result}
            with (run / RETURNS).open("a") as file:
                file.write(json.dumps(line) + "\n")
            console.print(f"{steps:>9}  {_described(result)}", highlight=False)


@app.command("ship")
def ship(
    run: Annotated[Path, typer.Argument(help="Folder of  omcda-deploy behavior train, measured.")],
    out: Annotated[Path, typer.Option(help="Folder of shipped policies.")] = Path("omcda_deploy/policies"),
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--tier", help="TIER=STEPS: ship the checkpoint of that many steps; repeat for each tier."
        ),
    ] = None,
    workers: Annotated[int, typer.Option()] = 2,
) -> None:
    """Export the measured checkpoints nearest to the published mean returns as medium and expert.

    medium-replay gets checkpoints evenly spread up to medium. SMAX has no published returns: there --tier says
    which checkpoints are good, medium and poor.
    """
    from omcda_deploy.training.behavior.mujoco import PUBLISHED_RETURNS

    task = json.loads((run / "config.json").read_text())["task"]
    if checkpoints:
        for name, checkpoint in _chosen(run, checkpoints).items():
            result = _export_measured(checkpoint, task, out / task / name, name, workers)
            console.print(f"{task} {name}: {_steps(checkpoint)} steps, {_described(result)}", highlight=False)
        write_index(out)
        return
    if task not in PUBLISHED_RETURNS:
        raise ConfigError(
            f"{task} has no published returns to choose by: give each tier's checkpoint, as --tier medium=2500000"
        )
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
    from omcda_deploy.play.measurements import write_text
    from omcda_deploy.training.behavior.mujoco import PUBLISHED_RETURNS

    lines = [
        "# Behaviour policies",
        "",
        "Written by `omcda-deploy behavior ship`; do not edit. Each folder is a bundle. Returns are of 20",
        "stochastic episodes (mean ± standard deviation, evaluation seed 0), as in recording, and of 200 in SMAX,",
        "with the share of battles won. Published is the mean return of OMIGA's dataset of that name, to which",
        "`ship` chooses the nearest checkpoint; SMAX is not SMAC, and nothing published compares with it.",
        "",
        "| bundle | PPO steps | seed | return | won | published |",
        "|---|---|---|---|---|---|",
    ]
    tasks: dict[str, int] = {}
    chosen: dict[str, list[str]] = {}
    for manifest in sorted(out.rglob("bundle.json")):
        data = json.loads(manifest.read_text())
        training, task = data["training"], data["team"]["task"]
        returns, seed = training["returns"], training["ppo"]["seed"]
        tasks[task] = seed
        wanted = PUBLISHED_RETURNS.get(task, {}).get(training["tier"])
        published = "" if wanted is None else f"{wanted:.0f}"
        won = f"{returns['win_rate']:.1%}" if "win_rate" in returns else ""
        digits = 2 if task.startswith("smax/") else 0
        lines.append(
            f"| `{manifest.parent.relative_to(out)}` | {training['ppo_steps']:,} | {seed} "
            f"| {returns['return_mean']:.{digits}f} ± {returns['return_std']:.{digits}f} | {won} | {published} |"
        )
        if task not in PUBLISHED_RETURNS:
            chosen.setdefault(task, []).append(f" --tier {training['tier']}={training['ppo_steps']}")
    lines += ["", "The commands that made them:", "", "```bash"]
    for task, seed in tasks.items():
        run = f"runs/{task.split('/')[1]}"
        lines += [
            f"omcda-deploy behavior train {task} --out {run} --seed {seed}",
            f"omcda-deploy behavior measure {run}",
            f"omcda-deploy behavior ship {run}{''.join(chosen.get(task, []))}",
        ]
    lines += [
        "```",
        "",
        "`measure --from … --to …` limits the checkpoints that are played. Training of the shipped policies was",
        "stopped once the expert's return had been passed.",
        "",
    ]
    write_text(out / "README.md", "\n".join(lines))


def _chosen(run: Path, tiers: list[str]) -> dict[str, Path]:
    """Checkpoints by tier, from TIER=STEPS each."""

    there = {str(_steps(path)): path for path in sorted(run.glob("checkpoint-*.npz"))}
    chosen = {}
    for text in tiers:
        name, _, steps = text.partition("=")
        if not name or not steps:
            raise ConfigError(f"--tier: expected TIER=STEPS, such as medium=2500000, got {text!r}")
        if steps not in there:
            raise UnknownNameError(f"checkpoint of {run}, in steps,", steps, there)
        chosen[name] = there[steps]
    return chosen


def _described(returns: dict[str, Any]) -> str:
    won = f", {returns['win_rate']:.1%} won" if "win_rate" in returns else ""
    return f"return {returns['return_mean']:g} ± {returns['return_std']:g}{won}"


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("checkpoint-"))


def _export_measured(
    checkpoint: Path, task: str, out: Path | None, tier: str, workers: int
) -> dict[str, Any]:
    """Returns over stochastic episodes of the exported policy; kept as a bundle that says so, if ``out``."""
    import tempfile

    from omcda_deploy.export import behavior_policy, behavior_policy_smax
    from omcda_deploy.local import JointTeam
    from omcda_deploy.play.evaluate import evaluate

    smax = task.startswith("smax/")
    episodes = BATTLES if smax else EPISODES
    export_behavior_policy = (behavior_policy_smax if smax else behavior_policy).export_behavior_policy
    with tempfile.TemporaryDirectory() as scratch:
        bundle = export_behavior_policy(checkpoint, task, Path(scratch) / "bundle", tier=tier)
        with progress_bar(f"playing {checkpoint.name}") as progress:
            result = evaluate(
                JointTeam(bundle),
                task,
                episodes=episodes,
                num_envs=episodes,
                stochastic=True,
                workers=workers,
                progress=progress,
            )
    returns: dict[str, Any] = {
        "episodes": episodes,
        "return_mean": round(result.mean, 3),
        "return_std": round(result.std, 3),
    }
    if result.won is not None:
        returns["win_rate"] = round(float(result.won.mean()), 4)
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
