"""The command line: ``omcda-deploy <command>``.

Commands live in :mod:`omcda_deploy.commands`, one file per group, and import the packages they need only when they
run, so that ``serve`` never waits for torch. An :class:`OmcdaError` becomes one line on stderr and exit status 2.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from typing import Any

import typer

from omcda_deploy.commands import (
    behavior,
    benchmark,
    budget,
    compare,
    data,
    datasets,
    demo,
    describe,
    estimate,
    export,
    inspection,
    is_terminal,
    play,
    print_text,
    recordings,
    release,
    results,
    serve,
    settings,
    sweep,
    toy_results,
    train,
    watch,
)
from omcda_deploy.commands.progress import PACE
from omcda_deploy.errors import MissingExtraError, OmcdaError
from omcda_deploy.files import refusal
from omcda_deploy.processes import INTERRUPTED, end_with_parent, unwinding_on_sigterm
from omcda_deploy.version import __version__

UsageError: Any = typer.BadParameter.__base__  # click's or typer's own, which no public name leads to

UNREAD = 128 + signal.SIGPIPE  # exit status, as of a program that SIGPIPE ends

EXTRAS = {  # modules that import an extra's packages without naming it, longest names first
    "omcda_deploy.training.behavior": "behavior",
    "omcda_deploy.commands.behavior": "behavior",
    "omcda_deploy.commands.benchmark": "train",
    "omcda_deploy.training": "train",
    "omcda_deploy.export": "export",
    "omcda_deploy.serve": "serve",
}

HELP_WIDTH = "120"  # columns of help texts that are piped: names of options are whole

app = typer.Typer(
    help="Train, export, serve and evaluate offline multi-agent policies: "
    "collect → train → export → serve → evaluate / replay.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(inspection.app, name="inspect")
app.add_typer(behavior.app, name="behavior")
app.add_typer(benchmark.app, name="bench")
app.add_typer(recordings.app, name="recordings")
app.add_typer(release.app, name="release")
app.command("tasks")(data.tasks)
app.command("describe")(describe.describe)
app.command("collect")(data.collect)
app.command("import")(datasets.import_dataset)
app.command("convert", hidden=True)(datasets.import_dataset)  # its name before; kept for scripts
app.command("merge")(datasets.merge)
app.command("split")(datasets.split)
app.command("subset")(datasets.subset)
app.command("to-minari")(datasets.to_minari)
app.command("algorithms")(train.algorithms)
app.command("settings")(settings.settings)
app.command("train")(train.train)
app.command("choose-budget")(budget.choose_budget)
app.command("export")(export.export)
app.command("estimate")(estimate.estimate)
app.command("serve")(serve.serve)
app.command("status")(release.status)
app.command("watch")(watch.watch)
app.command("evaluate")(play.evaluate)
app.command("replay")(play.replay)
app.command("sweep")(sweep.sweep)
app.command("train-jobs", hidden=True)(sweep.train_jobs)
app.command("compare")(compare.compare)
app.command("results")(results.results)
app.command("toy-results")(toy_results.toy_results)
app.command("demo")(demo.demo)


def _print_version(requested: bool) -> None:
    if requested:
        print_text(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log progress and decisions to stderr."),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    PACE.start()
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def _extra_of(error: ModuleNotFoundError) -> str:
    """Return the smallest extra with what the innermost of our modules imported when it failed."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    for module in reversed(modules):
        for prefix, extra in EXTRAS.items():
            if module.startswith(prefix):
                return extra
    return "all"


def main() -> None:
    """Run the command line: the entry point of the ``omcda-deploy`` script."""
    end_with_parent()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks is no reason to fail
    if not is_terminal(sys.stdout):
        os.environ.setdefault("TERMINAL_WIDTH", HELP_WIDTH)
    try:
        with unwinding_on_sigterm():
            status = app(prog_name="omcda-deploy", standalone_mode=False)
        if status == INTERRUPTED:  # typer's, of a command that has nothing to say about it
            print("interrupted", file=sys.stderr)
        sys.exit(status or 0)
    except UsageError as error:
        sys.exit(_report(error))
    except OmcdaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("omcda_deploy"):
            raise
        package = (error.name or str(error)).partition(".")[0]
        print(f"error: {MissingExtraError(package, _extra_of(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of what is printed has ended, as  head  does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(UNREAD)
    except OSError as error:  # of the disk, the network or the system's limits
        place = f"{error.filename} cannot be used" if error.filename else "the system refused"
        print(f"error: {place} {refusal(error)}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(
            f"error: not enough memory ({str(error) or 'the system refused'}): ask for less at once",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _report(error: UsageError) -> int:
    """Print a command line's error, in one line; return the exit status."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text
        error.show()
        return int(error.exit_code)
    path = context.command_path if context else "omcda-deploy"
    message = " ".join(error.format_message().split()).rstrip(".")
    print(f"error: {message}: see  {path} --help", file=sys.stderr)
    return int(error.exit_code)


if __name__ == "__main__":
    main()
