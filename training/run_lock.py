"""The claim on a run folder, so that one process at a time trains it.

It is held while a run is created, when there is no folder yet, and while it is trained
(:mod:`omcda_deploy.claims`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omcda_deploy.claims import ClaimedError, claimed, lock_path, require_unclaimed
from omcda_deploy.errors import ConfigError

# A trainer that outlives its sweep notices within a fraction of a second; the next sweep must not trip over it.
PATIENCE_S = 3.0


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which need not exist yet; its parent must.

    Raises :class:`ConfigError` where another process holds it for 3 s, naming that process, and where the place
    beside the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(claimed(run, patience_s=PATIENCE_S, required=True))
        except ClaimedError as error:
            raise _busy(run, error) from None
        except OSError as error:
            raise ConfigError(
                f"cannot lock {run} with {lock_path(run)} ({error.strerror}): expected a folder that can be "
                "written, on a file system with flock"
            ) from error
        yield


def require_unlocked(run: Path) -> None:
    """Raise :class:`ConfigError` where a process trains the run, or creates it."""
    try:
        require_unclaimed(run)
    except ClaimedError as error:
        raise _busy(run, error) from None


def _busy(run: Path, claim: ClaimedError) -> ConfigError:
    if claim.process is None:
        return ConfigError(f"{run} is being trained by another process: wait for it, and try again")
    return ConfigError(
        f"{run} is being trained by process {claim.process}: wait for it, or stop it with  kill {claim.process} "
        f"and continue with  train --resume {run}"
    )
