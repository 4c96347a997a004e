"""``watch``: a page that shows what a team's servers do."""

from __future__ import annotations

import math
import threading
from typing import Annotated

import typer

from omcda_deploy.commands import addresses, print_text
from omcda_deploy.errors import ConfigError


def watch(
    metrics: Annotated[
        str, typer.Option(help="Metrics ports of all servers of the team, with ranges: 127.0.0.1:9600-9605.")
    ],
    port: Annotated[int, typer.Option(help="Port of the page, on loopback; 0 takes a free one.")] = 9700,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the servers.")] = 2.0,
) -> None:
    """Serve a page on loopback with divergence, guard, latency, misses and version of every agent, until Ctrl-C."""
    from omcda_deploy.watch.site import watching

    if not 0.0 < every < math.inf:
        raise ConfigError(f"--every: expected seconds above 0, got {every}")
    endpoints = addresses(metrics)
    with watching(endpoints, port, every) as url:
        print_text(f"watching {len(endpoints)} servers on {url}")
        threading.Event().wait()
