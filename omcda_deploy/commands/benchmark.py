"""``bench``: costs of training and serving, as ratios within one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from omcda_deploy.commands import print_table, print_text, require_outputs
from omcda_deploy.commands.estimate import Confidence
from omcda_deploy.commands.progress import progress_bar
from omcda_deploy.commands.stopping import when_stopped

app = typer.Typer(help="Benchmarks: ratios measured within one run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("train")
@when_stopped()
def train(
    task: Annotated[str, typer.Option(help="Task whose shapes are used.")] = "mamujoco/halfcheetah-6x1",
    algo: Annotated[list[str] | None, typer.Option(help="Algorithms; all when omitted. Repeatable.")] = None,
    hidden: Annotated[
        list[int] | None, typer.Option(help="Hidden units; 64, 128 and 256 when omitted.")
    ] = None,
    runs: Annotated[
        list[int] | None, typer.Option(min=1, help="Runs side by side; 1 and 5 when omitted.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Transitions of a batch.")] = 128,
    rounds: Annotated[
        int, typer.Option(min=1, help="Alternating rounds of steps and of their matrix products alone.")
    ] = 5,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Measure CPU milliseconds per run and training step beside its matrix products alone, in the same run."""
    require_outputs(json_file)
    import torch

    from omcda_deploy import registry
    from omcda_deploy.files import write_json
    from omcda_deploy.play.measurements import machine
    from omcda_deploy.training.benchmark import Contender, step_costs

    torch.set_num_threads(threads)
    spec = registry.team_spec(task)
    table = Table(title=f"{task}, batch {batch_size}, {threads} thread(s), {machine()}", title_justify="left")
    for column in (
        "algorithm",
        "hidden",
        "runs",
        "ms",
        "products alone, ms",
        "ratio",
        "GFLOP",
    ):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    rows = []
    for width in hidden or (64, 128, 256):
        for name in algo or _algorithms(spec.action_kind):
            contenders = [Contender(name, {"hidden": width}, count) for count in runs or (1, 5)]
            for cost in step_costs(spec, contenders, batch_size=batch_size, rounds=rounds):
                count = cost.contender.runs
                figures = (cost.step_ms, cost.products_ms, cost.ratio, cost.gflop)
                table.add_row(name, str(width), str(count), *(f"{figure:.2f}" for figure in figures))
                names = ("step_ms", "products_ms", "ratio", "gflop")
                rows.append(
                    {
                        "algorithm": name,
                        "hidden": width,
                        "runs": count,
                        **dict(zip(names, figures, strict=True)),
                    }
                )
    if json_file:
        write_json(json_file, {"task": task, "batch_size": batch_size, "threads": threads, "rows": rows})
    print_table(table)


def _algorithms(kind: str) -> list[str]:
    """List the algorithms that handle a kind of actions."""
    from omcda_deploy import registry

    return [name for name, module in registry.load_algorithms().items() if kind in module.ACTIONS]


@app.command("comparison")
@when_stopped()
def comparison(
    hidden: Annotated[int, typer.Option(help="Hidden units.")] = 128,
    task: Annotated[
        list[str] | None, typer.Option(help="Tasks; three of MuJoCo when omitted. Repeatable.")
    ] = None,
    datasets: Annotated[int, typer.Option(min=1, help="Datasets of each task.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each algorithm on each dataset.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of each run.")] = 20_000,
    runs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measurement.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Estimate what a comparison of all algorithms and OMCDA's three ablations costs to train on this machine."""
    require_outputs(json_file)
    import torch

    from omcda_deploy import registry
    from omcda_deploy.files import write_json
    from omcda_deploy.play.measurements import machine
    from omcda_deploy.training.benchmark import Contender, step_costs

    torch.set_num_threads(1)
    tasks = task or ["mamujoco/hopper-3x1", "mamujoco/ant-2x4", "mamujoco/halfcheetah-6x1"]
    hours: dict[str, list[float]] = {}
    for name in tasks:
        spec = registry.team_spec(name)
        variants: list[tuple[str, dict[str, Any]]] = [(algo, {}) for algo in _algorithms(spec.action_kind)]
        variants += [
            ("omcda", {"allocation": "uniform"}),
            ("omcda", {"allocation": "random"}),
            ("omcda", {"decoupled": False}),
        ]
        for algo, settings in variants:
            [cost] = step_costs(spec, [Contender(algo, {**settings, "hidden": hidden}, runs)], rounds=rounds)
            label = str(Contender(algo, settings))
            hours.setdefault(label, []).append(cost.step_ms * steps * seeds * datasets / 3.6e6)
    size = f"{datasets} datasets of each task, {seeds} seeds, {steps} steps, hidden {hidden}"
    table = Table(title=f"CPU-hours: {size}, {machine()}", title_justify="left")
    table.add_column("algorithm")
    for name in (*tasks, "together"):
        table.add_column(name, justify="right")
    for label, each in hours.items():
        table.add_row(label, *(f"{value:.1f}" for value in (*each, sum(each))))
    columns = [sum(column) for column in zip(*hours.values(), strict=True)]
    total = sum(columns)
    table.add_row("together", *(f"{value:.1f}" for value in (*columns, total)))
    if json_file:
        write_json(json_file, {"tasks": tasks, "hidden": hidden, "hours": hours, "total_hours": total})
    print_table(table)


@app.command("serve")
@when_stopped()
def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    seconds: Annotated[float, typer.Option(help="Seconds for each scenario in each round.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Rounds of all scenarios, each in another order.")] = 7,
    clients: Annotated[int, typer.Option(help="Clients of the busy scenarios.")] = 8,
    rate: Annotated[float, typer.Option(help="Requests per second of the open loops.")] = 200.0,
    processes: Annotated[
        bool, typer.Option("--processes", help="Measure one server process per agent, too.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Measure a server that records its steps, too.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="Configuration of the servers (TOML).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure a served step beside a bare gRPC echo of the same messages, as ratios within one run."""
    require_outputs(json_file)
    from omcda_deploy.files import write_json
    from omcda_deploy.play.measurements import machine
    from omcda_deploy.serve.bench.steps import run

    with progress_bar("measuring", "scenarios") as progress:
        report = run(
            bundle,
            seconds=seconds,
            rounds=rounds,
            clients=clients,
            rate=rate,
            processes=processes,
            record=record,
            config=config,
            progress=progress,
        )
    if json_file:
        write_json(json_file, report.to_json())
    load = " to ".join(f"{value:.1f}" for value in report.load_average)
    table = Table(title=f"Medians of {rounds} rounds, {machine()}, load average {load}", title_justify="left")
    columns = ("p50 ms", "p95 ms", "p99 ms", "steps/s", "server CPU us", "client CPU us", "RSS MB", "refused")
    table.add_column("step")
    for column in columns:
        table.add_column(column, justify="right")
    for scenario in report.scenarios:
        median = report.median(scenario.name)
        table.add_row(
            scenario.name,
            *(f"{median[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
            *(f"{median[name]:.0f}" for name in ("rate", "cpu_us", "client_cpu_us", "rss_mb", "refused")),
        )
    print_table(table)
    ratios = Table(title="Medians of ratios within a round", title_justify="left")
    for column in ("ratio", "of", "is", "should be", ""):
        ratios.add_column(column, justify="right" if column == "is" else "left")
    for ratio in report.ratios:
        value = ratio.of(report.rounds)
        holds = ratio.holds(value)
        ratios.add_row(
            f"{ratio.scenario} / {ratio.base}",
            ratio.measure,
            f"{value:.2f}",
            ratio.target,
            "" if holds is None else "holds" if holds else "missed",
        )
    print_table(ratios)
    print_text(f"The server of all agents was ready in {report.ready_s:.1f} s.")


@app.command("reload")
@when_stopped()
def reload(
    bundle: Annotated[Path, typer.Argument(help="A bundle; two copies of it are exchanged.")],
    seconds: Annotated[
        float, typer.Option(help="Seconds without and seconds with reloads in each round.")
    ] = 60.0,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 5,
    rate: Annotated[float, typer.Option(help="Requests per second, to all agents together.")] = 200.0,
    reloads: Annotated[
        int, typer.Option(help="Reloads between the two measurements of CPU and memory.")
    ] = 1000,
    processes: Annotated[
        bool, typer.Option("--processes", help="One server process per agent instead of one for all.")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="Configuration of the servers (TOML).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure reloads of a team's policies: their cost for concurrent requests, and their lasting effect."""
    require_outputs(json_file)
    from omcda_deploy.files import write_json
    from omcda_deploy.play.measurements import machine
    from omcda_deploy.serve.bench.reload import DRIFT, P99_RATIO, run

    with progress_bar("measuring", "parts") as progress:
        report = run(
            bundle,
            seconds=seconds,
            rounds=rounds,
            rate=rate,
            reloads=reloads,
            processes=processes,
            config=config,
            progress=progress,
        )
    if json_file:
        write_json(json_file, report.to_json())
    load = " to ".join(f"{value:.1f}" for value in report.load_average)
    table = Table(title=f"{rate:g} requests/s, {machine()}, load average {load}", title_justify="left")
    for column in ("round", "", "p50 ms", "p99 ms", "max ms", "requests", "refused", "reloads", "p99 ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for number, each in enumerate(report.rounds, start=1):
        for name, half in (("quiet", each.quiet), ("reloading", each.reloading)):
            table.add_row(
                str(number) if name == "quiet" else "",
                name,
                *(f"{value:.2f}" for value in (half.p50_ms, half.p99_ms, half.max_ms)),
                *(str(value) for value in (half.requests, half.refused, half.reloads)),
                "" if name == "quiet" else f"{each.p99_ratio:.2f}",
            )
    print_table(table)
    rows = (
        ("p99 while reloading / quiet, median", f"{report.p99_ratio:.2f}", P99_RATIO, report.p99_ratio),
        ("requests refused", str(report.refused), 0, report.refused),
        (f"CPU per request after {reloads} reloads", f"{report.cpu_drift:+.1%}", DRIFT, report.cpu_drift),
        (f"memory after {reloads} reloads", f"{report.rss_drift:+.1%}", DRIFT, report.rss_drift),
    )
    verdicts = Table()
    for column in ("", "is", "at most", " "):
        verdicts.add_column(column, justify="right" if column == "is" else "left")
    for name, text, limit, value in rows:
        verdicts.add_row(name, text, f"{limit:g}", "holds" if value <= limit else "missed")
    print_table(verdicts)


@app.command("promotions")
@when_stopped()
def promotions(
    games: Annotated[list[str] | None, typer.Option("--game", help="Only these; repeatable.")] = None,
    episodes: Annotated[
        list[int] | None, typer.Option(min=1, help="Recorded episodes; 300 and 600 when omitted. Repeatable.")
    ] = None,
    count: Annotated[int, typer.Option(min=5, help="Candidates of each game and number of episodes.")] = 200,
    confidence: Confidence = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the candidates and the episodes.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
) -> None:
    """Simulate promotions on toy games: how often evidence lets a harmful team act, or misses a better one."""
    require_outputs(json_file)
    from omcda_deploy.experiments.promotions import GAMES, LEAST_CLEAR, MOST_HARMFUL, Outcome, simulate
    from omcda_deploy.files import write_json

    tasks, sizes = games or GAMES, episodes or (300, 600)
    outcomes: list[Outcome] = []
    with progress_bar("deciding", "promotions") as report:
        total = len(tasks) * len(sizes) * count
        for size in sizes:
            for task in tasks:
                before = len(outcomes) * count

                def progress(done: int, before: int = before) -> None:
                    report(before + done, total)

                outcomes.append(
                    simulate(task, size, count, confidence=confidence, seed=seed, progress=progress)
                )
    columns = {
        "harmful_promoted": "harmful",
        "better_promoted": "better",
        "clear_promoted": "clearly better",
        "silent": "data cannot tell",
        "above_low": "bound holds",
    }
    table = Table(title=f"{count} candidates each, seed {seed}", title_justify="left")
    for column in ("episodes", "game", "harmful ones", *columns.values()):
        table.add_column(column, justify="left" if column == "game" else "right")
    rows = [outcome.to_json() for outcome in outcomes]
    for row in rows:
        shares = (f"{100 * row[name]:.1f} %" for name in columns)
        table.add_row(str(row["episodes"]), row["task"], str(row["harmful"]), *shares)
    if json_file:
        write_json(json_file, rows)
    print_table(table)
    for size in sizes:
        of_size = [row for row in rows if row["episodes"] == size]
        worst = max(row["harmful_promoted"] for row in of_size)
        least = min(row["clear_promoted"] for row in of_size)
        harm = "holds" if worst <= MOST_HARMFUL else "missed"
        gain = "holds" if least >= LEAST_CLEAR else "missed"
        print_text(
            f"{size} episodes: of harmful candidates at most {100 * worst:.1f} % are promoted, at most "
            f"{100 * MOST_HARMFUL:g} % may be: {harm}; of clearly better ones at least {100 * least:.1f} %, "
            f"at least {100 * LEAST_CLEAR:g} % shall be: {gain}"
        )
