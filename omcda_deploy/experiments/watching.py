"""The progress of runs that other processes train, read from their folders, wherever an engine trains them."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.sweep import Job

LOOK_S = 2.0  # between two looks at the folders
_TAIL = 2**16  # bytes, more than a line of metrics has


@contextmanager
def watching(jobs: Sequence[Job], observer: Observer) -> Iterator[None]:
    """Tell ``observer`` the training steps of all ``jobs`` while the block runs."""
    with observer.progress(f"training {len(jobs)} runs", "steps") as report:
        if report is None:
            yield
            return
        ended = threading.Event()
        watch = threading.Thread(target=_watch, args=(jobs, report, ended), name="watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join()


def _watch(jobs: Sequence[Job], report: Callable[[float, float], None], ended: threading.Event) -> None:
    total = sum(job.steps for job in jobs)
    while True:  # at first before anything is trained, which tells what was there
        report(sum(steps_taken(job) for job in jobs), total)
        if ended.wait(LOOK_S):
            return


def steps_taken(job: Job) -> int:
    """Return the training steps of a run so far, as of its last line of metrics."""
    return job.steps if job.finished else min(_last_logged(job.run / "metrics.jsonl"), job.steps)


def _last_logged(metrics: Path) -> int:
    """Return the step of the last line, 0 where there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            tail = file.read()
    except OSError:  # not begun
        return 0
    steps = re.findall(rb'^\{"step": (\d+),', tail, re.MULTILINE)
    return int(steps[-1]) if steps else 0
