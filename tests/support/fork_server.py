"""Processes forked from one that has imported torch and training: a start takes milliseconds, not seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

PRELOADED = [
    "pytest",
    "torch._dynamo",  # torch's optimisers import it in their first step
    "torch.utils.tensorboard",
    "omcda_deploy.cli",
    "omcda_deploy.datasets.formats.omiga_hdf5",
    "omcda_deploy.training.loop",
    "omcda_deploy.training.algorithms.bc",
]


@contextmanager
def fork_server() -> Iterator[ForkServerContext]:
    """Yield a context whose processes are forked; the process that they are forked from starts with the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    yield context
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # else it would outlive the tests
