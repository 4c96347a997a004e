"""``results``: the table of docs/results.md, from nothing.

Records the dataset, trains every algorithm and seed (:mod:`omcda_deploy.commands.sweep`), exports the policies of
the chosen steps, plays them, and writes the table with everything that its numbers depend on. What is finished is
not done again, and a killed run is resumed: run the command again to go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from omcda_deploy.commands import console, errors
from omcda_deploy.commands.sweep import Job, Sweep, jobs_of, run_queue
from omcda_deploy.errors import OmcdaError

EPISODES = 20


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
    grid: dict[str, dict[str, list[Any]]] = {"omcda": {"d_tot": [d_tot]}}
    points = [steps // 2, steps]
    sweep = Sweep([str(dataset)], ["bc", "omiga", "omcda"], list(range(seeds)), steps, points[0], grid)
    queue = jobs_of(sweep, out)
    if failed := run_queue(queue, jobs):
        raise OmcdaError(f"{len(failed)} of {len(queue)} runs failed, the first: {failed[0][1]}")
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        rows = list(pool.map(lambda job: [_evaluate(job, task, point) for point in points], queue))
    write_table(table, task, tier, read_dataset(dataset), points, queue, rows)
    console.print(f"wrote {table}")


def _evaluate(job: Job, task: str, step: int) -> dict[str, Any]:
    bundle = job.run.with_name(f"{job.run.name}-bundle-{step}")
    measured = job.run.with_name(f"{job.run.name}-evaluation-{step}.json")
    if not measured.exists():
        if not bundle.exists():
            _run("export", job.run, "--step", step, "--out", bundle)
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
    points: list[int],
    queue: list[Job],
    rows: list[list[dict[str, Any]]],
) -> None:
    """The Markdown table: per algorithm and step the mean return of every seed, then mean and std over seeds."""
    from omcda_deploy.measurements import machine, now, write_text
    from omcda_deploy.training.run_folder import read_config

    seeds = sorted({job.seed for job in queue})
    returns = dataset.episode_returns
    commits = sorted({read_config(job.run).versions["git"] for job in queue})
    lines = [
        "# Results",
        "",
        "Written by `omcda-deploy results`; do not edit. Mean return over "
        f"{EPISODES} deterministic episodes per seed, last policy of each length, no selection.",
        "",
        f"* task `{task}`, dataset `{tier}`: {len(returns)} episodes, {len(dataset.transitions)} transitions, mean "
        f"return {returns.mean():.1f} ± {returns.std():.1f} (best {returns.max():.1f})",
        f"* dataset digest `{dataset.digest}`",
        f"* trained at commit {', '.join(f'`{commit}`' for commit in commits)}, {machine()}, {now()[:10]}, "
        "evaluation seed 0",
        "",
        "| algorithm | steps | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean ± std over seeds |",
        "|---|---|" + "---|" * len(seeds) + "---|",
    ]
    variants: dict[tuple[str, tuple[tuple[str, Any], ...]], dict[int, list[dict[str, Any]]]] = {}
    for job, measured in zip(queue, rows, strict=True):
        variants.setdefault((job.algorithm, job.settings), {})[job.seed] = measured
    for (algorithm, settings), by_seed in variants.items():
        label = ", ".join((algorithm.upper(), *(f"{key} {value}" for key, value in settings)))
        for index, point in enumerate(points):
            own = [by_seed[seed][index]["returns"] for seed in seeds]
            means = np.mean(own, axis=1)
            cells = [f"{np.mean(values):.0f} ± {np.std(values):.0f}" for values in own]
            total = f"**{means.mean():.0f} ± {means.std():.0f}**"
            lines.append(f"| {label} | {point:,} | " + " | ".join([*cells, total]) + " |")
    lines += ["", "Cells are mean ± standard deviation over episodes; the last column is over seeds.", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines))
