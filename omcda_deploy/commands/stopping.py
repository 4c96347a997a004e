"""The line of a command that Ctrl-C or SIGTERM ends: what is kept, and the command that goes on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from omcda_deploy.commands import print_note
from omcda_deploy.errors import TerminatedError
from omcda_deploy.processes import INTERRUPTED, has_parent


def this_command() -> str:
    """Return the command line of this process, as it is typed again."""
    return command(*sys.argv[1:])


def command(*words: object) -> str:
    """Return a command of ``omcda-deploy`` as it is typed."""
    return shlex.join(["omcda-deploy", *map(str, words)])


def nothing() -> str:
    """Say that nothing is kept."""
    return f"nothing was kept, start again with  {this_command()}"


@contextmanager
def when_stopped(kept: Callable[[], str] = nothing) -> Iterator[None]:
    """Print ``kept()``, what remains of a block or function that Ctrl-C or SIGTERM ends, and end the process.

    Nothing is printed in a process that another of our commands started: that one speaks for both.
    """
    try:
        yield
    except (KeyboardInterrupt, TerminatedError) as stop:
        interrupted = isinstance(stop, KeyboardInterrupt)
        if not has_parent():
            print_note(f"{'interrupted' if interrupted else 'terminated'}: {kept()}")
        if interrupted:
            raise SystemExit(INTERRUPTED) from None
        raise
