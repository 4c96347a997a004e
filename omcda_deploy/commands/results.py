"""``results``: train and play the runs of pages of docs/results, and write them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import print_note, print_text, require_folder
from omcda_deploy.commands.progress import TerminalObserver
from omcda_deploy.commands.stopping import this_command, when_stopped
from omcda_deploy.commands.sweep import Address, EngineName, EngineOptions, engine_options
from omcda_deploy.errors import ConfigError, OmcdaError

FOLDER = Path("docs/results")


@when_stopped(lambda: f"what was recorded, trained and played is kept, go on with  {this_command()}")
def results(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="TOML file of a page, or of a comparison's pages; they are written beside it as .md."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help=f"Every file of {FOLDER}.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK/TIER", help="Datasets of a comparison, such as 'smax/*'; repeatable."),
    ] = None,
    add: Annotated[
        bool,
        typer.Option("--add", help="Train and play what the records beside pages do not hold, and add it."),
    ] = False,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="With --add: rows whose runs are trained, such as 'omcda*'; repeatable."
        ),
    ] = None,
    write_only: Annotated[
        bool,
        typer.Option(
            "--write-only", help="Train nothing; add finished runs to the records, and write of them."
        ),
    ] = False,
    pdf: Annotated[
        bool, typer.Option("--pdf", help="Write every figure as PDF, too; needs the extra pdf.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for datasets, runs and bundles.")] = Path("results"),
    jobs: Annotated[
        int,
        typer.Option(min=0, help="Training processes at a time, up to five runs each; 0: one per core."),
    ] = 0,
    engine: EngineName = "local",
    engine_option: EngineOptions = None,
    address: Address = None,
) -> None:
    """Train and play every run of results pages, and write them. The engine trains; the rest happens here."""
    from omcda_deploy.experiments.engines import make_engine
    from omcda_deploy.experiments.pages import plan_results, write_plan

    files = _files(file, every)
    if every and only:
        raise ConfigError("expected --all or --only, got both: name the file whose datasets are meant")
    if add and write_only:
        raise ConfigError("expected --add or --write-only, got both: --write-only trains nothing")
    if row and not add:
        raise ConfigError("expected --add with --row: without it a page is made anew, of these rows alone")
    require_folder(out)
    run_jobs = make_engine(engine, engine_options(engine_option, address), out)
    plans = plan_results(
        files,
        out,
        only=only or (),
        rows=row or (),
        train="none" if write_only else "new" if add else "all",
        pdf=pdf,
    )
    errors: list[OmcdaError] = []
    for plan in plans:
        if plan.empty:
            print_note(f"{plan.source}: skipped, it has no record, and no run in {out}")
            continue
        try:
            written = write_plan(plan, jobs, TerminalObserver(), run_jobs)
        except OmcdaError as error:
            if not every:
                raise
            errors.append(error)
            continue
        print_text(f"wrote {', '.join(map(str, written))}")
    if errors:
        raise OmcdaError(f"{len(errors)} of {len(plans)} files could not be written. The first: {errors[0]}")


def _files(file: Path | None, every: bool) -> list[Path]:
    """The file, or all of the folder of pages."""
    if (file is not None) == every:
        raise ConfigError("expected a results file or --all, " + ("got both" if every else "got neither"))
    if file is not None:
        return [file]
    if not (files := sorted(FOLDER.glob("*.toml"))):
        raise ConfigError(
            f"--all: expected files {FOLDER}/*.toml here, there are none: go to the source tree"
        )
    return files
