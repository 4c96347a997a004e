"""The command line: ``omcda-deploy <command>``.

Commands live in :mod:`omcda_deploy.commands`, one file per group, and import the packages they need only when they
run, so that ``serve`` never waits for torch. An :class:`OmcdaError` becomes one line on stderr and exit status 2.
"""

from __future__ import annotations

import logging
import sys

import typer

from omcda_deploy.commands import (
    behavior,
    benchmark,
    compare,
    convert,
    data,
    demo,
    export,
    play,
    release,
    results,
    serve,
    sweep,
    toy_results,
    train,
)
from omcda_deploy.errors import OmcdaError
from omcda_deploy.processes import end_with_parent
from omcda_deploy.version import __version__

app = typer.Typer(
    help="Train, export, serve and evaluate offline multi-agent policies: "
    "collect → train → export → serve → evaluate / replay.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.inspect_app, name="inspect")
app.add_typer(behavior.app, name="behavior")
app.add_typer(benchmark.app, name="bench")
app.add_typer(release.app, name="release")
app.command("tasks")(data.tasks)
app.command("collect")(data.collect)
app.command("merge")(data.merge)
app.command("convert")(convert.convert)
app.command("algorithms")(train.algorithms)
app.command("train")(train.train)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("status")(release.status)
app.command("evaluate")(play.evaluate)
app.command("replay")(play.replay)
app.command("sweep")(sweep.sweep)
app.command("compare")(compare.compare)
app.command("results")(results.results)
app.command("toy-results")(toy_results.toy_results)
app.command("demo")(demo.demo)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log progress and decisions to stderr."),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main() -> None:
    """Run the command line: the entry point of the ``omcda-deploy`` script."""
    end_with_parent()
    try:
        app()
    except OmcdaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("omcda_deploy"):
            raise
        print(f"error: {error.name} is not installed: run  pip install 'omcda-deploy[all]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
