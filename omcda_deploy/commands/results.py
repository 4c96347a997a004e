"""``results``: the table of docs/results.md, from nothing.

Records the dataset, trains every algorithm and seed (one thread per run, as many runs at once as there are cores),
exports the policies of the chosen steps, plays them, and writes the table with everything that its numbers depend
on. What is finished is not done again, and a killed run is resumed: run the command again to go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from omcda_deploy.commands import console, errors

EPISODES = 20


@dataclass(frozen=True)
class Job:
    """One training run of the table."""

    label: str
    algorithm: str
    settings: tuple[str, ...]
    seed: int


def results(
    out: Annotated[Path, typer.Option(help="Folder for datasets, runs and bundles.")] = Path("results"),
    table: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/results.md"),
    task: Annotated[str, typer.Option()] = "mamujoco/halfcheetah-6x1",
    tier: Annotated[str, typer.Option(help="Behaviour policies that record the dataset.")] = "medium-replay",
    transitions: Annotated[int, typer.Option()] = 200_000,
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, … per algorithm.")] = 3,
    steps: Annotated[int, typer.Option(help="Evaluated at half of these and at the end.")] = 20_000,
    d_tot: Annotated[float, typer.Option(help="OMCDA's total budget in nats.")] = 0.3,
    jobs: Annotated[int, typer.Option(help="Runs at once; one per core if 0.")] = 0,
) -> None:
    """Train BC, OMIGA and OMCDA over seeds, evaluate their last policies and write the results table."""
    from omcda_deploy.registry import read_dataset

    out.mkdir(parents=True, exist_ok=True)
    dataset = out / f"{task.replace('/', '-')}-{tier}.hdf5"
    if not dataset.exists():
        _run("collect", task, "--tier", tier, "--transitions", transitions, "--out", dataset)
    recorded = read_dataset(dataset)
    budget = f"d_tot={d_tot:g}"
    contenders = [
        ("BC", "bc", ()),
        ("OMIGA", "omiga", ()),
        (f"OMCDA, {budget}", "omcda", (budget,)),
        (f"OMCDA, {budget}, identity divergence mixer", "omcda", (budget, "divergence_mixer=identity")),
    ]
    queue = [Job(*contender, seed) for seed in range(seeds) for contender in contenders]
    points = [steps // 2, steps]
    # One run first, alone: it clones the dataset's behaviour model, which all others take from the cache.
    _train(queue[0], out, dataset, steps, points[0])
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        list(pool.map(lambda job: _train(job, out, dataset, steps, points[0]), queue[1:]))
        rows = list(pool.map(lambda job: [_evaluate(job, out, task, point) for point in points], queue))
    write_table(table, task, tier, recorded, contenders, points, queue, rows)
    console.print(f"wrote {table}")


def _folder(job: Job, out: Path) -> Path:
    return out / "-".join((job.algorithm, *(s.replace("=", "") for s in job.settings), f"seed{job.seed}"))


def _train(job: Job, out: Path, dataset: Path, steps: int, every: int) -> None:
    run = _folder(job, out) / "run"
    if (run / "policies" / f"step-{steps:08d}.pt").exists():
        return
    if (run / "config.json").exists():
        _run("train", "--resume", run)
        return
    settings = [word for setting in job.settings for word in ("--set", setting)]
    _run(
        *("train", dataset, "--algo", job.algorithm, "--steps", steps, "--seed", job.seed),
        *("--snapshot-every", every, "--out", run, *settings),
    )


def _evaluate(job: Job, out: Path, task: str, step: int) -> dict[str, Any]:
    folder = _folder(job, out)
    bundle, measured = folder / f"bundle-{step}", folder / f"evaluation-{step}.json"
    if not measured.exists():
        if not bundle.exists():
            _run("export", folder / "run", "--step", step, "--out", bundle)
        _run(
            *("evaluate", task, "--bundle", bundle, "--episodes", EPISODES, "--num-envs", EPISODES),
            *("--json", measured),
        )
    result: dict[str, Any] = json.loads(measured.read_text())
    return result


def _run(*words: object) -> None:
    arguments = [str(word) for word in words]
    errors.print("$ omcda-deploy " + " ".join(arguments), highlight=False, soft_wrap=True)
    command = [sys.executable, "-m", "omcda_deploy.cli", *arguments]
    finished = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if finished.returncode:
        errors.print(finished.stderr, highlight=False)
        raise SystemExit(finished.returncode)


def write_table(
    path: Path,
    task: str,
    tier: str,
    dataset: Any,
    contenders: list[tuple[str, str, tuple[str, ...]]],
    points: list[int],
    queue: list[Job],
    rows: list[list[dict[str, Any]]],
) -> None:
    """The Markdown table: per algorithm and step the mean return of every seed, then mean and std over seeds."""
    from omcda_deploy.measurements import machine, now, write_text
    from omcda_deploy.training.run_folder import git_revision

    seeds = sorted({job.seed for job in queue})
    returns = dataset.episode_returns
    lines = [
        "# Results",
        "",
        "Written by `omcda-deploy results`; do not edit. Mean return over "
        f"{EPISODES} deterministic episodes per seed, last policy of each length, no selection.",
        "",
        f"* task `{task}`, dataset `{tier}`: {len(returns)} episodes, {len(dataset.transitions)} transitions, mean "
        f"return {returns.mean():.1f} ± {returns.std():.1f} (best {returns.max():.1f})",
        f"* dataset digest `{dataset.digest}`",
        f"* commit `{git_revision()}`, {machine()}, {now()[:10]}, evaluation seed 0",
        "",
        "| algorithm | steps | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean ± std over seeds |",
        "|---|---|" + "---|" * len(seeds) + "---|",
    ]
    for label, *_ in contenders:
        for index, point in enumerate(points):
            own = {
                job.seed: row[index]["returns"]
                for job, row in zip(queue, rows, strict=True)
                if job.label == label
            }
            means = [float(np.mean(own[seed])) for seed in seeds]
            cells = [f"{np.mean(own[seed]):.0f} ± {np.std(own[seed]):.0f}" for seed in seeds]
            total = f"**{np.mean(means):.0f} ± {np.std(means):.0f}**"
            lines.append(f"| {label} | {point:,} | " + " | ".join([*cells, total]) + " |")
    lines += ["", "Cells are mean ± standard deviation over episodes; the last column is over seeds.", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines))
